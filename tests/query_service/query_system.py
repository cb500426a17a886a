"""A query service with shards and a store, in one event loop, and what its answers must be.

Deliberately does not know what a test wants of it.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import grpc
import numpy as np
from exact_shard import ExactShard
from retrieval.feature.v1 import feature_pb2
from retrieval.query.v1 import query_service_pb2, query_service_pb2_grpc
from toy_checkpoint import ToyModel

from query_service.serve import serving
from query_service.settings import QuerySettings
from towers.checkpoint import CheckpointStore
from towers.deployment import Deployment, DeploymentStore, promoted, staged
from towers.store import Store

PATIENCE_S = 30.0
"""How long anything may take on a noisy machine before a test gives up."""
TOLERANCE = 1e-5


@dataclass(frozen=True)
class World:
    """A store with what operators put into it."""

    store: Store

    def publish(self, model: ToyModel) -> int:
        return CheckpointStore(self.store).publish(model.draft()).version

    def deploy(self, live: int, standby: int | None = None, **changes: Any) -> Deployment:
        """Writes the next record, with its defaults where nothing is said."""
        records = DeploymentStore(self.store)
        deployment = Deployment(
            revision=records.current().revision + 1,
            live_version=live,
            standby_version=standby,
            **{"held": False, "reason": "test", "created": datetime.now(UTC), **changes},
        )
        records.write(deployment)
        return deployment

    def go_live(self, version: int) -> None:
        records = DeploymentStore(self.store)
        records.write(staged(records.current(), version, "test"))
        records.write(promoted(records.current(), "test"))


@dataclass(frozen=True)
class System:
    """What runs, and how to call it."""

    stub: Any
    shards: Sequence[ExactShard]
    """All replicas of all shards of all layouts."""
    address: str

    async def retrieve(self, features: Mapping[str, Any], *, timeout: float = PATIENCE_S, **fields: Any) -> Any:
        request = query_service_pb2.RetrieveRequest(query=query_of(features), **{"k": 10, **fields})
        return await self.stub.Retrieve(request, timeout=timeout)

    async def batch_retrieve(self, queries: Sequence[Mapping[str, Any]], **fields: Any) -> Any:
        built = [query_of(features) for features in queries]
        request = query_service_pb2.BatchRetrieveRequest(queries=built, **{"k": 10, **fields})
        return await self.stub.BatchRetrieve(request, timeout=PATIENCE_S)

    async def status(self) -> Any:
        return await self.stub.GetStatus(query_service_pb2.GetStatusRequest(), timeout=PATIENCE_S)

    async def until_live(self, version: int) -> None:
        await until(lambda: self.status(), lambda status: status.live_version == version)


@asynccontextmanager
async def running(
    world: World,
    models: Mapping[int, ToyModel],
    *,
    layouts: Sequence[int] = (2,),
    replicas: int = 1,
    shard_order: Sequence[int] = (),
    **settings: Any,
) -> AsyncIterator[System]:
    """Shards, the query service and a channel; ends them all and checks that no task is left.

    Args:
        world: The store.
        models: What the shards hold.
        layouts: The number of shards of each layout.
        replicas: Of each shard.
        shard_order: In which the query service is told the shards, where it is not the right one.
        settings: Of the query service.
    """
    before = asyncio.all_tasks()
    async with AsyncExitStack() as stack:
        shards: list[ExactShard] = []
        addresses: list[list[list[str]]] = []
        for num_shards in layouts:
            addresses.append([[] for _ in range(num_shards)])
            for shard in range(num_shards):
                for _ in range(replicas):
                    shards.append(await stack.enter_async_context(ExactShard(shard, num_shards, models)))
                    addresses[-1][shard].append(shards[-1].address)
        if shard_order:
            addresses = [[layout[number] for number in shard_order] for layout in addresses]
        defaults = {
            "store": world.store.url,
            "shards": addresses,
            "address": "127.0.0.1:0",
            "redis_url": "",
            # A sample of chance would call shards that a test counts.
            "shadow_share": 0.0,
            # Another would embed queries that a test counts.
            "cache_prewarm": 0,
            # Where no shard answers, most tests want to see it.
            "popular_items": 0,
            "poll_interval_s": 0.02,
            "drain_s": 0,
            "cache_timeout_s": 5.0,
        }
        port = await stack.enter_async_context(serving(QuerySettings(**{**defaults, **settings})))
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{port}"))
        system = System(query_service_pb2_grpc.QueryServiceStub(channel), shards, f"127.0.0.1:{port}")
        live = DeploymentStore(world.store).current().live_version
        if live is not None:
            await system.until_live(live)
        yield system
    await until(lambda: _nothing(), lambda _: asyncio.all_tasks() <= before)


async def until(look: Callable[[], Any], is_right: Callable[[Any], bool]) -> Any:
    """Looks until what is seen is right, and returns it."""
    give_up = time.monotonic() + PATIENCE_S
    while True:
        seen = await look()
        if is_right(seen):
            return seen
        assert time.monotonic() < give_up, f"not within {PATIENCE_S} s; last: {seen}"
        await asyncio.sleep(0.01)


def query_of(features: Mapping[str, Any]) -> query_service_pb2.Query:
    return query_service_pb2.Query(features={name: value_of(value) for name, value in features.items()})


def value_of(value: Any) -> feature_pb2.FeatureValue:
    if value is None:
        return feature_pb2.FeatureValue()
    if isinstance(value, str):
        return feature_pb2.FeatureValue(string_value=value)
    if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
        return feature_pb2.FeatureValue(string_list=feature_pb2.StringList(values=value))
    if isinstance(value, list):
        return feature_pb2.FeatureValue(number_list=feature_pb2.NumberList(values=value))
    return feature_pb2.FeatureValue(number_value=value)


def assert_exact(
    response: Any, model: ToyModel, features: Mapping[str, Any], k: int = 10, item_ids: Sequence[str] | None = None
) -> None:
    """An answer equals exact search over the items."""
    candidates = list(model.item_ids if item_ids is None else item_ids)
    _, best = model.nearest(features, candidates, k)
    scores = np.array(response.scores, dtype=np.float64)
    assert len(set(response.item_ids)) == len(response.item_ids) == len(scores) == len(best)
    assert set(response.item_ids) <= set(candidates)
    assert (np.diff(scores) <= 0).all()
    assert np.abs(scores - best).max(initial=0.0) <= TOLERANCE
    own = model.item_embeddings(list(response.item_ids)) @ model.query_embeddings([features])[0]
    assert np.abs(scores - own).max(initial=0.0) <= TOLERANCE


async def status_code(awaitable: Any) -> tuple[grpc.StatusCode, str]:
    """How a call fails."""
    try:
        await awaitable
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""
    raise AssertionError("the call succeeded")


async def _nothing() -> None:
    return None
