"""Embeddings from the process, from a real Valkey or from the tower: the same, each looked up or computed once."""

import asyncio
import gc
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
from query_system import PATIENCE_S, World, assert_exact, running, until
from test_retrieve import with_taste
from toy_checkpoint import ToyModel, toy_model
from valkey_server import ValkeyServer

from query_service.cache import EmbeddingCache
from query_service.digest import digests_of
from query_service.embed import Embedded, Embedder, Held
from query_service.hot import HotQueries
from query_service.offload import Offload
from query_service.parse import InvalidQueriesError, RawFeatures, encode
from query_service.versions import Pin, Versions
from towers.checkpoint import CheckpointStore

HOT: RawFeatures = {"user_id": "1", "history": ["3", "4"]}
OTHERS: list[RawFeatures] = [{"user_id": "2"}, {"user_id": "3"}, {"history": ["5"]}]


class Desk:
    """An embedder and both versions of the world."""

    def __init__(self, embedder: Embedder, cache: EmbeddingCache, pins: Mapping[int, Pin]) -> None:
        self._embedder = embedder
        self.cache = cache
        self.pins = pins

    @property
    def held(self) -> Held:
        return dict(self._embedder.held())[1]

    @property
    def held_versions(self) -> list[int]:
        return [version for version, _ in self._embedder.held()]

    async def embed(self, *queries: RawFeatures, version: int = 1) -> Embedded:
        return await self._embedder.embed(queries, self.pins[version])

    async def started(self, *queries: RawFeatures) -> asyncio.Task[Embedded]:
        """Asks, and returns once all of it is under way."""
        task = asyncio.create_task(self.embed(*queries))
        await asyncio.sleep(0)
        assert all(digest in self.held.under_way for digest in self.digests(*queries))
        return task

    def digests(self, *queries: RawFeatures) -> list[bytes]:
        return digests_of(encode(queries, self.pins[1]), self.pins[1].fingerprint)


@asynccontextmanager
async def desk(
    world: World, url: str = "", *, num_entries: int = 1000, may_leave_out: bool = False
) -> AsyncIterator[Desk]:
    """Both versions, the first of which is live."""
    versions, offload = Versions(world.store, 0.02, [2]), Offload()
    cache = EmbeddingCache(url, ttl_s=600.0, timeout_s=PATIENCE_S, dtype="float32")
    following = asyncio.create_task(versions.follow())
    await until(
        lambda: asyncio.sleep(0), lambda _: bool(versions.live and (versions.standby_pin or not versions.standby))
    )
    pins = {pin.version: pin for pin in (versions.live, versions.standby_pin) if pin}
    try:
        yield Desk(Embedder(cache, offload, HotQueries(0), num_entries, may_leave_out), cache, pins)
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await cache.close()
        offload.close()


def assert_right(embedded: Embedded, model: ToyModel, *queries: RawFeatures) -> None:
    assert np.abs(embedded.embeddings - model.query_embeddings(queries)).max() < 1e-5  # type: ignore[arg-type]


def test_what_the_process_holds_is_not_asked_for_again(
    world: World, models: dict[int, ToyModel], valkey: ValkeyServer
) -> None:
    async def check() -> None:
        async with desk(world, valkey.url) as at:
            first = await at.embed(HOT, *OTHERS)
            assert_right(first, models[1], HOT, *OTHERS)
            assert list(first.is_cached) == [False] * 4
            again = await at.embed(OTHERS[1], HOT)
            assert list(again.is_cached) == [True, True]
            assert again.embeddings.tobytes() == first.embeddings[[2, 0]].tobytes()
            mixed = await at.embed({"user_id": "9"}, HOT)
            assert list(mixed.is_cached) == [False, True]
            assert_right(mixed, models[1], {"user_id": "9"}, HOT)
            assert (at.held.num_hits, at.held.num_misses, len(at.held.recent)) == (3, 5, 5)
            assert (at.cache.num_hits, at.cache.num_misses) == (0, 5)
            assert at.held.tower.num_batches == 2

    asyncio.run(check())


def test_another_process_finds_it_on_the_server(world: World, valkey: ValkeyServer) -> None:
    async def check() -> None:
        async with desk(world, valkey.url) as one:
            first = await one.embed(HOT)

            async def stored() -> Any:
                return (await one.cache.get(1, one.digests(HOT), one.pins[1].tower.dim))[0]

            await until(stored, lambda found: found is not None)
        async with desk(world, valkey.url) as other:
            found = await other.embed(HOT)
            assert list(found.is_cached) == [True]
            assert found.embeddings.tobytes() == first.embeddings.tobytes()
            assert other.held.tower.num_batches == 0
            await other.embed(HOT)
            assert (other.held.num_hits, other.cache.num_hits) == (1, 1)

    asyncio.run(check())


def test_versions_share_nothing(world: World, models: dict[int, ToyModel]) -> None:
    async def check() -> None:
        async with desk(world) as at:
            await at.embed(HOT)
            other = await at.embed(HOT, version=2)
            assert list(other.is_cached) == [False]
            assert_right(other, models[2], HOT)
            assert_right(await at.embed(HOT), models[1], HOT)
            assert at.held_versions == [1, 2]

    asyncio.run(check())


def test_what_is_held_goes_with_its_tower(world: World, models: dict[int, ToyModel]) -> None:
    async def check() -> None:
        async with running(world, models) as system:
            await system.retrieve(HOT)
            assert [held.checkpoint_version for held in (await system.status()).cache.versions] == [1]
            world.deploy(live=2)
            await system.until_live(2)
            gc.collect()
            assert not (await system.status()).cache.versions
            assert_exact(await system.retrieve(HOT), models[2], HOT)
            [held] = (await system.status()).cache.versions
            assert (held.checkpoint_version, held.entries, held.hits, held.misses) == (2, 1, 0, 1)

    asyncio.run(check())


def test_a_batch_asks_once_for_queries_alike(world: World, models: dict[int, ToyModel], valkey: ValkeyServer) -> None:
    async def check() -> None:
        async with desk(world, valkey.url) as at:
            queries = [HOT, OTHERS[0], HOT, HOT]
            assert_right(await at.embed(*queries), models[1], *queries)
            assert (at.cache.num_misses, at.held.num_joined, at.held.tower.num_batches) == (2, 2, 1)

    asyncio.run(check())


@pytest.mark.parametrize("num_entries", [0, 1000])
def test_batches_at_once_ask_once_for_queries_alike(
    world: World, models: dict[int, ToyModel], valkey: ValkeyServer, num_entries: int
) -> None:
    async def check() -> None:
        async with desk(world, valkey.url, num_entries=num_entries) as at:
            await at.embed(OTHERS[2])  # Connects.
            valkey.stop()
            first = await at.started(HOT, OTHERS[0])
            second = await at.started(OTHERS[1], HOT)
            third = await at.started(HOT)
            valkey.resume()
            assert_right(await third, models[1], HOT)
            assert_right(await second, models[1], OTHERS[1], HOT)
            assert_right(await first, models[1], HOT, OTHERS[0])
            assert (at.cache.num_misses, at.held.num_joined) == (4, 2)
            assert at.held.tower.num_batches == 3
            assert not at.held.under_way

    asyncio.run(check())


def test_who_waits_for_a_request_that_is_cancelled_asks_for_itself(
    world: World, models: dict[int, ToyModel], valkey: ValkeyServer
) -> None:
    async def check() -> None:
        async with desk(world, valkey.url) as at:
            await at.embed(OTHERS[2])
            valkey.stop()
            first = await at.started(HOT, OTHERS[0])
            second, third, fourth = [await at.started(*queries) for queries in ([HOT], [HOT, OTHERS[1]], [HOT])]
            fourth.cancel()
            first.cancel()
            await asyncio.wait([first, fourth])
            assert first.cancelled()
            assert fourth.cancelled()
            valkey.resume()
            assert_right(await second, models[1], HOT)
            assert_right(await third, models[1], HOT, OTHERS[1])
            assert not at.held.under_way
            assert (await at.embed(HOT)).is_cached == [True]

    asyncio.run(check())


def test_a_query_without_an_embedding_fails_alone(empty_world: World, valkey: ValkeyServer) -> None:
    CheckpointStore(empty_world.store).publish(with_taste(toy_model(dim=2).draft()))
    empty_world.deploy(live=1)
    right, other, wrong = ({"taste": taste} for taste in ([3.0, 4.0], [4.0, 3.0], [3e38, 1.0]))

    async def check() -> None:
        async with desk(empty_world, valkey.url) as at:
            await at.embed(other)
            valkey.stop()
            first = await at.started(right, wrong)
            second = await at.started(wrong, right)
            third = await at.started(right)
            valkey.resume()
            for failing, position in ((first, 1), (second, 0)):
                with pytest.raises(InvalidQueriesError) as failure:
                    await failing
                assert list(failure.value.failures) == [position]
            np.testing.assert_allclose((await third).embeddings, [[0.6, 0.8]], rtol=1e-6)
            assert not at.held.under_way

    asyncio.run(check())


@pytest.mark.parametrize("left_out", ["shared", "local"])
def test_a_cache_that_costs_more_than_the_tower_is_tried_now_and_then(
    world: World, models: dict[int, ToyModel], valkey: ValkeyServer, left_out: str
) -> None:
    queries: list[RawFeatures] = [{"history": [str(item) for item in range(1, 1 + number)]} for number in range(1, 20)]

    async def check() -> None:
        async with desk(world, valkey.url, num_entries=1, may_leave_out=True) as at:
            await at.embed(HOT)
            for _ in range(1000):
                at.held.tower.add(3600.0, 1)
            lookups = {"shared": at.held.shared.lookup, "local": at.held.local.lookup}
            for _ in range(2000):
                lookups[left_out].add(7200.0, 1)
            assert (at.held.local.is_left_out, at.held.shared.is_left_out) == (
                left_out == "local",
                left_out == "shared",
            )
            for number in range(2 * 128):
                query = queries[number % len(queries)]
                assert_right(await at.embed(query), models[1], query)
            num_tried = at.held.num_misses if left_out == "local" else at.cache.num_misses + at.cache.num_hits
            assert num_tried == 1 + 2

    asyncio.run(check())


def test_a_table_in_which_nothing_is_found_is_left_out(world: World, models: dict[int, ToyModel]) -> None:
    async def check() -> None:
        async with desk(world, num_entries=1, may_leave_out=True) as at:
            for number in range(1000):
                await at.embed({"history": [str(1 + number // place % 10) for place in (1, 10, 100)]})
            assert at.held.num_hits == 0
            assert at.held.local.is_left_out
            assert at.held.num_misses < 1000
            for _ in range(1000):
                at.held.tower.add(3600.0, 1)
            assert not at.held.local.is_left_out
            assert_right(await at.embed(HOT), models[1], HOT)
            assert (await at.embed(HOT)).is_cached == [True]

    asyncio.run(check())


def test_a_table_before_the_server_is_not_judged_by_what_it_finds(world: World, valkey: ValkeyServer) -> None:
    async def check() -> None:
        async with desk(world, valkey.url, num_entries=1, may_leave_out=False) as at:
            for number in range(100):
                await at.embed(OTHERS[number % 2])
            assert (at.held.num_hits, at.held.num_misses) == (0, 100)
            assert at.held.local.share_found == 1.0

    asyncio.run(check())


def test_the_status_tells_what_each_version_costs(
    world: World, models: dict[int, ToyModel], valkey: ValkeyServer
) -> None:
    async def check() -> None:
        async with running(world, models, redis_url=valkey.url, cache_bypass=False) as system:
            for _ in range(3):
                assert_exact(await system.retrieve(HOT), models[1], HOT)
            status = (await system.status()).cache
            assert (status.hits, status.misses) == (0, 1)
            [held] = status.versions
            assert (held.checkpoint_version, held.entries, held.hits, held.misses, held.joined) == (1, 1, 2, 1, 0)
            assert min(held.tower_s, held.local_s, held.redis_s) > 0
            assert not held.local_bypassed
            assert not held.redis_bypassed

    asyncio.run(check())
