"""Settings of the rollout controller: what the environment may say."""

import pytest

from rollout.settings import RolloutSettings
from towers.errors import InvalidInputError


def test_layouts_and_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWOTOWER_SHARDS", "a:1|a:2,b:1;c:1,d:1,e:1")
    assert RolloutSettings(store="s").shards == (
        (("a:1", "a:2"), ("b:1",)),
        (("c:1",), ("d:1",), ("e:1",)),
    )


def test_every_limit_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWOTOWER_MIN_SHADOW_QUERIES", "50")
    monkeypatch.setenv("TWOTOWER_MIN_SHADOW_OVERLAP", "0.7")
    monkeypatch.setenv("TWOTOWER_CANARY_SHARE", "0.05")
    monkeypatch.setenv("TWOTOWER_MAX_SCORE_SHIFT", "3")
    limits = RolloutSettings(store="s").thresholds
    assert (limits.min_shadow_queries, limits.min_shadow_overlap, limits.canary_share) == (50, 0.7, 0.05)
    assert (limits.max_score_shift, limits.max_shadow_latency_ratio) == (3.0, None)


@pytest.mark.parametrize("limit", ["min_shadow_overlap", "max_shadow_latency_ratio"])
def test_a_limit_of_the_shadow_stage_needs_queries(limit: str) -> None:
    words = f"TWOTOWER_{limit.upper()}: has no effect without queries to judge by: set TWOTOWER_MIN_SHADOW_QUERIES too"
    with pytest.raises(InvalidInputError, match=words):
        RolloutSettings(store="s", **{limit: 0.9})
    assert getattr(RolloutSettings(store="s", min_shadow_queries=9, **{limit: 0.9}), limit) == 0.9


@pytest.mark.parametrize("share", ["-0.1", "1", "nan"])
def test_a_canary_share_that_is_none(share: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWOTOWER_CANARY_SHARE", share)
    with pytest.raises(InvalidInputError, match="TWOTOWER_CANARY_SHARE"):
        RolloutSettings(store="s")
