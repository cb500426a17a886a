"""Settings: from the environment, by argument, and all that can be wrong at once."""

from typing import Any

import pytest
from pydantic import ValidationError

from query_service.settings import QuerySettings
from towers.errors import InvalidInputError

RIGHT: dict[str, Any] = {"store": "var/store", "shards": "a:1,b:2"}


@pytest.fixture(autouse=True)
def _empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TWOTOWER_STORE", "TWOTOWER_SHARDS", "TWOTOWER_REDIS_URL", "REDIS_URL"):
        monkeypatch.delenv(name, raising=False)


def test_the_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {
        "STORE": "s3://bucket/prefix",
        "SHARDS": " one:50061, [::1]:50062 | two:50062 ,unix:/run/shard",
        "ADDRESS": "0.0.0.0:50051",
        "CACHE_TIMEOUT_S": "0.05",
        "MAX_K": "50",
        "REFLECTION": "true",
    }
    for name, value in environment.items():
        monkeypatch.setenv(f"TWOTOWER_{name}", value)
    settings = QuerySettings()
    assert settings.store == "s3://bucket/prefix"
    assert settings.shards == ((("one:50061",), ("[::1]:50062", "two:50062"), ("unix:/run/shard",)),)
    assert settings.address == "0.0.0.0:50051"
    assert (settings.cache_timeout_s, settings.max_k, settings.reflection) == (0.05, 50, True)


def test_arguments_override_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"STORE": "other", "SHARDS": "c:3", "REDIS_URL": "redis://other", "MAX_K": "5"}.items():
        monkeypatch.setenv(f"TWOTOWER_{name}", value)
    monkeypatch.setenv("REDIS_URL", "redis://third")
    settings = QuerySettings(**RIGHT, redis_url="redis://mine", max_k=6)
    assert (settings.store, settings.shards, settings.max_k) == ("var/store", ((("a:1",), ("b:2",)),), 6)
    assert settings.redis_url == "redis://mine"
    assert QuerySettings(**RIGHT, redis_url="").redis_url == "", "turned off"


def test_redis_has_its_usual_variable_and_one_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert QuerySettings(**RIGHT).redis_url == ""
    monkeypatch.setenv("REDIS_URL", "redis://usual")
    assert QuerySettings(**RIGHT).redis_url == "redis://usual"
    monkeypatch.setenv("TWOTOWER_REDIS_URL", "rediss://own")
    assert QuerySettings(**RIGHT).redis_url == "rediss://own"


def test_all_that_is_wrong_is_told_at_once_by_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWOTOWER_SHARDS", "one:50061,two")
    monkeypatch.setenv("TWOTOWER_CACHE_TTL_S", "soon")
    monkeypatch.setenv("REDIS_URL", "http://user:secret@cache")
    with pytest.raises(InvalidInputError) as caught:
        QuerySettings(max_k=0, address="everywhere", drain_s=-1, poll_interval_s=0, grace_s=float("inf"))
    message = str(caught.value)
    for expected in (
        "TWOTOWER_STORE is not set",
        "TWOTOWER_SHARDS: 'two' is not host:port",
        "TWOTOWER_CACHE_TTL_S: ",
        "REDIS_URL: must start with one of redis://, rediss://, unix://",
        "TWOTOWER_MAX_K: ",
        "TWOTOWER_ADDRESS: 'everywhere' is not host:port",
        "TWOTOWER_DRAIN_S: ",
        "TWOTOWER_POLL_INTERVAL_S: ",
        "TWOTOWER_GRACE_S: ",
    ):
        assert expected in message
    assert "secret" not in message


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"shards": ""}, "TWOTOWER_SHARDS: give at least one address"),
        ({"shards": ()}, "TWOTOWER_SHARDS: give at least one address"),
        ({"shards": "a:1,a:1"}, "TWOTOWER_SHARDS: a:1 is named more than once"),
        ({"shards": "a:1,"}, "TWOTOWER_SHARDS: '' is not host:port"),
        ({"shards": "a:70000"}, "TWOTOWER_SHARDS: 'a:70000' is not host:port"),
        ({"store": ""}, "TWOTOWER_STORE: "),
        ({"address": "unix:"}, "TWOTOWER_ADDRESS: 'unix:' is not host:port"),
        ({"workers": 0}, "TWOTOWER_WORKERS: "),
        ({"workers": 2, "address": "unix:/run/query"}, "TWOTOWER_WORKERS: 2 processes cannot share a unix socket"),
        ({"max_batch_size": 0}, "TWOTOWER_MAX_BATCH_SIZE: "),
        ({"default_timeout_s": float("nan")}, "TWOTOWER_DEFAULT_TIMEOUT_S: "),
        ({"colour": "blue"}, "there is no setting 'colour'"),
    ],
)
def test_what_is_wrong_is_told(overrides: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        QuerySettings(**{**RIGHT, **overrides})
    assert told in str(caught.value)


def test_settings_do_not_change_and_do_not_show_the_password() -> None:
    settings = QuerySettings(**RIGHT, redis_url="redis://user:secret@cache")
    with pytest.raises(ValidationError, match="frozen"):
        settings.max_k = 3
    assert "secret" not in repr(settings)
