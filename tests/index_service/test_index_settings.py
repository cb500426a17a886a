"""Settings from keywords and from the environment, and all that is wrong with them at once."""

import pytest
from pydantic import ValidationError

from index_service.plan import TuningGoal
from index_service.settings import IndexSettings
from towers.errors import InvalidInputError


def test_keywords_and_defaults():
    settings = IndexSettings(store="/somewhere", shard="0/2")
    assert (settings.shard, settings.num_shards) == (0, 2)
    assert settings.address == "127.0.0.1:50061"
    assert (settings.poll_interval_s, settings.drain_s, settings.grace_s) == (0.5, 0.5, 10)
    assert settings.goal == TuningGoal()
    assert settings.filterable == ()
    assert not settings.reflection
    with pytest.raises(ValidationError, match="frozen"):
        settings.store = "/elsewhere"


def test_environment(monkeypatch):
    for name, value in {"STORE": "s3://b/p", "SHARD": "3/4", "POLL_INTERVAL_S": "0.1", "EXACT_BELOW": "0"}.items():
        monkeypatch.setenv(f"TWOTOWER_{name}", value)
    monkeypatch.setenv("TWOTOWER_FILTERABLE", "genres, year")
    settings = IndexSettings()
    assert (settings.store, settings.shard, settings.num_shards) == ("s3://b/p", 3, 4)
    assert (settings.poll_interval_s, settings.exact_below) == (0.1, 0)
    assert settings.filterable == ("genres", "year")
    assert IndexSettings(shard="1/4").shard == 1


def test_what_an_index_must_reach(monkeypatch):
    settings = {
        "TARGET_RECALL": "0.9",
        "TARGET_K": "50",
        "MAX_LATENCY_MS": "0.5",
        "MAX_INDEX_MB": "100",
        "INDEX_TYPE": "IVF64,SQ8",
        "EXACT_BELOW": "7",
    }
    for name, value in settings.items():
        monkeypatch.setenv(f"TWOTOWER_{name}", value)
    goal = IndexSettings(store="/somewhere", shard="0/2").goal
    assert goal == TuningGoal(
        target_recall=0.9, target_k=50, max_latency_ms=0.5, max_index_mb=100, index_type="IVF64,SQ8", exact_below=7
    )
    with pytest.raises(InvalidInputError, match="TWOTOWER_TARGET_RECALL: Input should be less than or equal to 1"):
        IndexSettings(store="/somewhere", shard="0/2", target_recall=1.1)


def test_all_problems_are_reported_together(monkeypatch):
    monkeypatch.setenv("TWOTOWER_SHARD", "2/2")
    monkeypatch.setenv("TWOTOWER_POLL_INTERVAL_S", "soon")
    with pytest.raises(InvalidInputError) as caught:
        IndexSettings(grace_s=-1)
    message = str(caught.value)
    assert "TWOTOWER_STORE is not set" in message
    assert "TWOTOWER_SHARD: say which shard this is, of how many, for example 0/2" in message
    assert message.count("TWOTOWER_SHARD") == 1
    assert "TWOTOWER_POLL_INTERVAL_S: Input should be a valid number" in message
    assert "TWOTOWER_GRACE_S: Input should be greater than or equal to 0" in message


@pytest.mark.parametrize("shard", ["", "0", "1/1", "-1/2", "0/0", "a/b", "0/2/3", 0, "99999999/999999999"])
def test_what_is_not_a_shard_is_refused(shard):
    with pytest.raises(InvalidInputError, match="TWOTOWER_SHARD: say which shard this is"):
        IndexSettings(store="/somewhere", shard=shard)


def test_the_number_of_shards_is_never_set_by_itself(monkeypatch):
    monkeypatch.setenv("TWOTOWER_NUM_SHARDS", "7")
    assert IndexSettings(store="/somewhere", shard="0/2").num_shards == 2
    with pytest.raises(InvalidInputError, match="TWOTOWER_SHARD"):
        IndexSettings(store="/somewhere", shard="0")


def test_an_unknown_setting_is_refused():
    with pytest.raises(InvalidInputError, match="there is no setting 'shards'"):
        IndexSettings(store="/somewhere", shard="0/2", shards="x")
