"""The most frequent queries are known, and embedded by a standby version before it answers."""

import asyncio
import random
from typing import Any

import numpy as np
import pytest
from query_system import PATIENCE_S, System, World, assert_exact, query_of, running, until
from retrieval.query.v1 import query_service_pb2
from test_retrieve import with_taste
from toy_checkpoint import ToyModel, toy_model
from valkey_server import ValkeyServer

from query_service.hot import HotQueries
from query_service.parse import RawFeatures
from towers.checkpoint import CheckpointStore

HOT: list[RawFeatures] = [{"user_id": str(user), "history": ["3", "4"]} for user in range(1, 6)]


def test_the_hottest_are_those_that_come_most_often() -> None:
    random.seed(1)
    hot = HotQueries(5)
    for number in range(20_000):
        hot.notice([HOT[number % 5], {"user_id": f"rare {number}"}])
        hot.notice([{"history": [number]}])
    assert sorted(hot.hottest(), key=lambda query: str(query["user_id"])) == HOT


def test_a_batch_counts_for_all_its_queries() -> None:
    random.seed(2)
    hot = HotQueries(2)
    for _ in range(4000):
        hot.notice([HOT[0]] * 9 + [HOT[1]])
        hot.notice([HOT[1]])
        hot.notice([HOT[2]])
    assert hot.hottest() == [HOT[0], HOT[1]]


def test_what_was_hot_is_forgotten() -> None:
    random.seed(3)
    hot = HotQueries(1)
    for query in (HOT[0], HOT[1]):
        for number in range(2000):
            hot.notice([query])
            hot.notice([{"user_id": f"rare {number}"}])
        assert hot.hottest() == [query]


def test_large_queries_and_unwanted_ones_are_not_kept() -> None:
    random.seed(4)
    hot, nothing = HotQueries(3), HotQueries(0)
    for _ in range(200):
        hot.notice([{"history": ["item"] * 10_000}])
        hot.notice([{"user_id": "\ud800"}])
        nothing.notice([HOT[0]])
    assert hot.hottest() == [{"user_id": "\ud800"}]
    assert nothing.hottest() == []


def version_in(status: Any, version: int) -> Any:
    found = [held for held in status.cache.versions if held.checkpoint_version == version]
    return found[0] if found else query_service_pb2.VersionCache()


async def made_hot(system: System, queries: list[RawFeatures], times: int = 120) -> None:
    """Asks so often that each is sampled."""
    for _ in range(times):
        for query in queries:
            await system.stub.Embed(query_service_pb2.EmbedRequest(queries=[query_of(query)]), timeout=PATIENCE_S)


def test_a_standby_version_holds_the_hot_queries_before_it_answers(
    empty_world: World, models: dict[int, ToyModel], valkey: ValkeyServer
) -> None:
    for model in models.values():
        empty_world.publish(model)
    empty_world.deploy(live=1)

    async def check() -> None:
        async with running(empty_world, models, redis_url=valkey.url, cache_bypass=False, cache_prewarm=10) as system:
            await made_hot(system, HOT[:3])
            empty_world.deploy(live=1, standby=2)
            status = await until(system.status, lambda status: version_in(status, 2).prewarmed == 3)
            held = version_in(status, 2)
            assert (held.entries, held.hits, held.misses) == (3, 0, 0)
            assert version_in(status, 1).prewarmed == 0
            assert_exact(await system.retrieve(HOT[0]), models[1], HOT[0])
            empty_world.deploy(live=2, standby=1)
            await system.until_live(2)
            for query in HOT[:3]:
                response = await system.retrieve(query)
                assert (response.checkpoint_version, response.embedding_cached) == (2, True)
                assert_exact(response, models[2], query)
            assert version_in(await system.status(), 2).hits == 3
        # Other replicas find them on the server.
        async with running(empty_world, models, redis_url=valkey.url, cache_bypass=False) as system:
            response = await system.retrieve(HOT[1])
            assert (response.checkpoint_version, response.embedding_cached) == (2, True)

    asyncio.run(check())


@pytest.mark.parametrize("settings", [{"cache_prewarm": 0}, {"cache_entries": 0}])
def test_nothing_is_embedded_ahead_where_it_is_not_wanted(
    empty_world: World, models: dict[int, ToyModel], settings: dict[str, Any]
) -> None:
    for model in models.values():
        empty_world.publish(model)
    empty_world.deploy(live=1)

    async def check() -> None:
        async with running(empty_world, models, cache_bypass=False, **{"cache_prewarm": 10, **settings}) as system:
            await made_hot(system, HOT[:1], times=50)
            empty_world.deploy(live=1, standby=2)
            available = query_service_pb2.TOWER_STATE_AVAILABLE
            await until(system.status, lambda status: [t.state for t in status.towers] == [available] * 2)
            empty_world.deploy(live=2, standby=1)
            await system.until_live(2)
            assert not (await system.retrieve(HOT[0])).embedding_cached
            assert version_in(await system.status(), 2).prewarmed == 0

    asyncio.run(check())


def test_hot_queries_that_the_next_version_cannot_embed_are_left_out(
    empty_world: World, models: dict[int, ToyModel]
) -> None:
    """Version 2 knows none of version 1's features, so that all of its queries are empty, and have no embedding."""
    model = toy_model(dim=2)
    empty_world.publish(models[1])
    CheckpointStore(empty_world.store).publish(with_taste(model.draft()))
    empty_world.deploy(live=1)

    async def check() -> None:
        async with running(empty_world, {1: models[1], 2: model}, cache_bypass=False, cache_prewarm=10) as system:
            await made_hot(system, HOT[:2])
            empty_world.deploy(live=1, standby=2)
            await until(system.status, lambda status: version_in(status, 2).checkpoint_version == 2)
            empty_world.deploy(live=2, standby=1)
            await system.until_live(2)
            taste = query_service_pb2.EmbedRequest(queries=[query_of({"taste": [3.0, 4.0]})])
            answer = await system.stub.Embed(taste, timeout=PATIENCE_S)
            np.testing.assert_allclose(np.frombuffer(answer.embeddings, "<f4"), [0.6, 0.8], rtol=1e-6)
            held = version_in(await system.status(), 2)
            assert (held.prewarmed, held.entries) == (0, 1)

    asyncio.run(check())
