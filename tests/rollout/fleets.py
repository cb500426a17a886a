"""Fleets in a few words, for the tables of the policy and the gates."""

from collections.abc import Mapping, Sequence
from typing import Any

from rollout.fleet import Fleet, LoadStatus, Replica, State

OTHER_STATES = tuple(state for state in State if state is not State.AVAILABLE)


def load(version: int, state: State = State.AVAILABLE, **fields: Any) -> LoadStatus:
    return LoadStatus(version=version, state=state, **{"num_items": 100, **fields})


def shard(number: int, *loads: LoadStatus, error: str = "") -> Replica:
    return Replica("shard", f"shard:{number}", number, 1, loads, error)


def query_service(*loads: LoadStatus, error: str = "") -> Replica:
    return Replica("query service", "query:0", None, 1, loads, error)


def fleet(*loads: LoadStatus, num_shards: int = 2) -> Fleet:
    """Two shards and a query service that all say the same."""
    return Fleet([shard(number, *loads) for number in range(num_shards)], [query_service(*loads)])


def with_shard(base: Fleet, replica: Replica) -> Fleet:
    """The same fleet with one shard replaced."""
    shards: Sequence[Replica] = [replica if replica.shard == other.shard else other for other in base.shards]
    return Fleet(shards, base.query_services)


METRIC = "test.recall_at_10"


def recall(value: float) -> Mapping[str, float]:
    return {METRIC: value}
