"""Fleets in a few words, for the tables of the policy and the gates."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rollout.fleet import Fleet, LoadStatus, Replica, State
from rollout.gates import Thresholds
from rollout.settings import RolloutSettings

OTHER_STATES = tuple(state for state in State if state is not State.AVAILABLE)


def load(version: int, state: State = State.AVAILABLE, **fields: Any) -> LoadStatus:
    sound = {"num_items": 100, "index_type": "Flat", "item_similarity": 0.1, "score_deviation": 0.2}
    return LoadStatus(version=version, state=state, **{**sound, **fields})


def shard(number: int, *loads: LoadStatus, num_shards: int = 2, address: str = "", error: str = "") -> Replica:
    return Replica("shard", address or f"shard:{number}", number, num_shards, 1, loads, error)


def query_service(*loads: LoadStatus, error: str = "", **fields: Any) -> Replica:
    known = {"layouts": frozenset((2, 3, 4)), **fields}
    return Replica("query service", "query:0", deployment_revision=1, loads=loads, error=error, **known)


def fleet(*loads: LoadStatus, num_shards: int = 2) -> Fleet:
    """Two shards and a query service that all say the same."""
    shards = [shard(number, *loads, num_shards=num_shards) for number in range(num_shards)]
    return Fleet(shards, [query_service(*loads)])


def with_shard(base: Fleet, replica: Replica) -> Fleet:
    """The same fleet with one shard replaced."""
    shards: Sequence[Replica] = [replica if replica.shard == other.shard else other for other in base.shards]
    return Fleet(shards, base.query_services)


def thresholds(**changes: Any) -> Thresholds:
    """The settings' defaults, save some."""
    return replace(RolloutSettings(store="unused").thresholds, **changes)


METRIC = "test.recall_at_10"


def recall(value: float) -> Mapping[str, float]:
    return {METRIC: value}
