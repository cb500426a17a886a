"""The embedding cache on a real Valkey: what is found is what was stored, and any failure is a miss."""

import asyncio
import gc
import hashlib
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
import redis
import xxhash
from numpy.typing import NDArray
from query_system import PATIENCE_S, System, World, assert_exact, query_of, running, until
from retrieval.query.v1 import query_service_pb2
from toy_checkpoint import ToyModel, toy_model
from valkey_server import ValkeyServer

from query_service.cache import EmbeddingCache
from towers.store import Store

QUERY = {"user_id": "1", "history": ["3", "4"]}
DIM = 4
DIGEST = hashlib.blake2b(b"query", digest_size=32).digest()
OTHER_DIGEST = hashlib.blake2b(b"other query", digest_size=32).digest()
EMBEDDING = np.array([0.5, -0.5, 0.5, -0.5], dtype=np.float32)


def only(valkey: ValkeyServer) -> dict[str, Any]:
    """Settings with which every embedding is looked up there and nowhere else."""
    return {"redis_url": valkey.url, "cache_entries": 0, "cache_bypass": False}


@asynccontextmanager
async def caching(
    valkey: ValkeyServer, *, ttl_s: float = 600.0, timeout_s: float = 5.0, dtype: Any = "float32"
) -> AsyncIterator[EmbeddingCache]:
    cache = EmbeddingCache(valkey.url, ttl_s=ttl_s, timeout_s=timeout_s, dtype=dtype)
    try:
        yield cache
    finally:
        await cache.close()
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def stored(cache: EmbeddingCache, version: int, digest: bytes, embedding: NDArray[np.float32]) -> None:
    """Puts an embedding and waits until it is there."""

    async def look() -> Any:
        cache.put(version, [digest], embedding[np.newaxis])
        return (await cache.get(version, [digest], len(embedding)))[0]

    await until(look, lambda found: found is not None)


def key_of(version: int, digest: bytes) -> str:
    return f"twotower:{version}:{digest.hex()}"


def value_of(version: int, digest: bytes, embedding: NDArray[Any]) -> bytes:
    content = struct.pack("<Q", version) + digest + embedding.tobytes()
    return content + xxhash.xxh3_64_digest(content)


def test_what_is_found_is_what_was_stored(valkey: ValkeyServer) -> None:
    async def check() -> None:
        async with caching(valkey) as cache:
            assert await cache.get(1, [DIGEST], DIM) == [None]
            await stored(cache, 1, DIGEST, EMBEDDING)
            missing, found, foreign = await cache.get(1, [OTHER_DIGEST, DIGEST, b"\0" * 32], DIM)
            assert missing is None
            assert foreign is None
            assert found is not None
            assert found.tobytes() == EMBEDDING.tobytes()
            assert await cache.get(2, [DIGEST], DIM) == [None]
            assert cache.num_errors == 0
            with redis.Redis.from_url(valkey.url) as client:
                assert client.keys() == [key_of(1, DIGEST).encode()]
                assert client.get(key_of(1, DIGEST)) == value_of(1, DIGEST, EMBEDDING)

    asyncio.run(check())


def test_half_precision_takes_half_the_room_and_gives_unit_embeddings(valkey: ValkeyServer) -> None:
    embedding = np.random.default_rng(1).normal(size=64).astype(np.float32)
    embedding /= np.linalg.norm(embedding)

    async def check() -> None:
        async with caching(valkey, dtype="float16") as half, caching(valkey) as whole:
            await stored(half, 1, DIGEST, embedding)
            assert await whole.get(1, [DIGEST], 64) == [None]
            await stored(whole, 1, DIGEST, embedding)
            [found], [exact] = await half.get(1, [DIGEST], 64), await whole.get(1, [DIGEST], 64)
            assert found is not None
            assert exact is not None
            assert found.dtype == np.float32
            assert exact.tobytes() == embedding.tobytes()
            assert 0 < np.linalg.norm(found - embedding) < 5e-4
            assert abs(np.linalg.norm(found) - 1) < 1e-6
            assert (half.num_errors, whole.num_errors) == (0, 0)
            with redis.Redis.from_url(valkey.url) as client:
                value = client.get(f"twotower:1:f2:{DIGEST.hex()}")
                assert isinstance(value, bytes)
                assert len(value) == 8 + 32 + 2 * 64 + 8
                for wrong in (np.zeros(64, np.float16), np.full(64, np.inf, np.float16)):
                    client.set(f"twotower:1:f2:{DIGEST.hex()}", value_of(1, DIGEST, wrong))
                    assert await half.get(1, [DIGEST], 64) == [None]
            assert half.num_errors == 2

    asyncio.run(check())


def test_every_truncation_and_every_changed_byte_is_a_miss(valkey: ValkeyServer) -> None:
    right = value_of(1, DIGEST, EMBEDDING)
    wrong = [right[:size] for size in range(len(right))]
    wrong += [right[:place] + bytes([right[place] ^ 0x10]) + right[place + 1 :] for place in range(len(right))]
    wrong += [right + b"\0", right + right]

    async def check() -> None:
        async with caching(valkey) as cache:
            with redis.Redis.from_url(valkey.url) as client:
                client.set(key_of(1, DIGEST), right)
                assert (await cache.get(1, [DIGEST], DIM))[0] is not None
                for number, value in enumerate(wrong, start=1):
                    client.set(key_of(1, DIGEST), value)
                    assert await cache.get(1, [DIGEST], DIM) == [None]
                    assert (cache.num_hits, cache.num_misses, cache.num_errors) == (1, number, number)
            assert cache.is_reachable

    asyncio.run(check())


@pytest.mark.parametrize(
    "value",
    [
        value_of(2, DIGEST, EMBEDDING),
        value_of(1, OTHER_DIGEST, EMBEDDING),
        value_of(1, DIGEST, EMBEDDING[:3]),
        value_of(1, DIGEST, np.append(EMBEDDING, EMBEDDING)),
        value_of(1, DIGEST, np.array([0.5, np.nan, 0.5, 0.5], dtype=np.float32)),
        value_of(1, DIGEST, np.array([0.5, np.inf, 0.5, 0.5], dtype=np.float32)),
        EMBEDDING.tobytes(),
        b"",
    ],
    ids=["version", "digest", "shorter", "longer", "nan", "inf", "bare", "empty"],
)
def test_a_whole_value_of_another_kind_is_a_miss(valkey: ValkeyServer, value: bytes) -> None:
    async def check() -> None:
        async with caching(valkey) as cache:
            with redis.Redis.from_url(valkey.url) as client:
                client.set(key_of(1, DIGEST), value)
            assert await cache.get(1, [DIGEST], DIM) == [None]
            assert (cache.num_misses, cache.num_errors) == (1, 1)

    asyncio.run(check())


def test_a_key_of_another_type_is_a_miss(valkey: ValkeyServer) -> None:
    async def check() -> None:
        async with caching(valkey) as cache:
            with redis.Redis.from_url(valkey.url) as client:
                client.hset(key_of(1, DIGEST), "field", "value")
            assert await cache.get(1, [DIGEST], DIM) == [None]

    asyncio.run(check())


def test_lifetimes_vary_by_a_tenth(valkey: ValkeyServer) -> None:
    digests = [hashlib.blake2b(bytes([number]), digest_size=32).digest() for number in range(100)]

    async def check() -> None:
        async with caching(valkey, ttl_s=1000.0) as cache:
            cache.put(1, digests, np.tile(EMBEDDING, (100, 1)))

            async def num_stored() -> int:
                return sum(embedding is not None for embedding in await cache.get(1, digests, DIM))

            await until(num_stored, lambda stored: stored == 100)
        with redis.Redis.from_url(valkey.url) as client:
            lifetimes_ms = [client.pttl(key_of(1, digest)) for digest in digests]
        assert all(900_000 - 1000 * PATIENCE_S <= lifetime_ms <= 1_100_000 for lifetime_ms in lifetimes_ms)
        assert max(lifetimes_ms) - min(lifetimes_ms) > 100_000

    asyncio.run(check())


def test_a_stopped_server_is_asked_once_and_then_skipped(
    valkey: ValkeyServer, caplog: pytest.LogCaptureFixture
) -> None:
    async def check() -> None:
        async with caching(valkey, timeout_s=0.02) as cache:
            valkey.stop()
            for _ in range(1000):
                assert await cache.get(1, [DIGEST], DIM) == [None]
                cache.put(1, [DIGEST], EMBEDDING[np.newaxis])
            assert (cache.num_hits, cache.num_misses) == (0, 1000)
            # Later failures are those of the probe, which no request waits for.
            assert cache.num_errors == 1
            assert not cache.is_reachable
            valkey.resume()
            await until(lambda: asyncio.sleep(0, cache.is_reachable), bool)
            await stored(cache, 1, DIGEST, EMBEDDING)

    asyncio.run(check())
    gc.collect()
    assert [record.message for record in caplog.records if record.name == "asyncio"] == []


def test_a_full_server_refuses_writes_and_is_still_read(valkey: ValkeyServer) -> None:
    async def check() -> None:
        async with caching(valkey) as cache:
            await stored(cache, 1, DIGEST, EMBEDDING)
            with redis.Redis.from_url(valkey.url) as client:
                client.config_set("maxmemory", "1")
            cache.put(1, [OTHER_DIGEST], EMBEDDING[np.newaxis])
            await until(lambda: asyncio.sleep(0, cache.num_errors), lambda errors: errors >= 1)
            assert cache.is_reachable
            found, missing = await cache.get(1, [DIGEST, OTHER_DIGEST], DIM)
            assert found is not None
            assert missing is None

    asyncio.run(check())


def test_writes_under_way_are_bounded_and_dropped_at_the_end(valkey: ValkeyServer) -> None:
    async def check() -> None:
        async with caching(valkey, timeout_s=PATIENCE_S) as cache:
            valkey.stop()
            for _ in range(500):
                cache.put(1, [DIGEST], EMBEDDING[np.newaxis])
            await asyncio.sleep(0)
            assert len(asyncio.all_tasks()) == 1 + 64
        valkey.resume()

    asyncio.run(check())


def test_without_a_server_nothing_is_counted() -> None:
    async def check() -> None:
        cache = EmbeddingCache("", ttl_s=1.0, timeout_s=1.0, dtype="float32")
        cache.put(1, [DIGEST], EMBEDDING[np.newaxis])
        assert await cache.get(1, [DIGEST], DIM) == [None]
        assert not cache.is_enabled
        assert (cache.num_hits, cache.num_misses, cache.num_errors) == (0, 0, 0)
        await cache.close()

    asyncio.run(check())


def test_a_hit_equals_the_miss_bit_for_bit(world: World, models: dict[int, ToyModel], valkey: ValkeyServer) -> None:
    async def check() -> None:
        async with running(world, models, **only(valkey)) as system:
            request = query_service_pb2.EmbedRequest(queries=[query_of(QUERY), query_of({})])
            missed_embeddings = await system.stub.Embed(request, timeout=PATIENCE_S)
            missed = await system.retrieve({"user_id": "2"}, attribute_names=["title"])
            assert not missed.embedding_cached
            found = await until_cached(system, {"user_id": "2"}, attribute_names=["title"])
            found.embedding_cached = False
            assert found == missed
            # The last of the batch, so that all of it is there.
            await until_cached(system, {})
            assert await system.stub.Embed(request, timeout=PATIENCE_S) == missed_embeddings
            cache = (await system.status()).cache
            assert (cache.enabled, cache.reachable, cache.errors) == (True, True, 0)
            assert cache.hits >= 4
            assert cache.misses >= 3

    asyncio.run(check())


def test_batches_find_what_single_queries_stored_and_the_reverse(
    world: World, models: dict[int, ToyModel], valkey: ValkeyServer
) -> None:
    short, long = {"history": ["3"]}, {"history": [str(item) for item in range(1, 16)]}

    async def check() -> None:
        async with running(world, models, **only(valkey)) as system:
            await system.retrieve(short)
            await until_cached(system, short)
            batch = (await system.batch_retrieve([long, short, {}])).results
            assert [result.embedding_cached for result in batch] == [False, True, False]
            await until_cached(system, long)
            batch = (await system.batch_retrieve([short, {"user_id": "7"}, long])).results
            assert [result.embedding_cached for result in batch] == [True, False, True]
            for result, features in zip(batch, [short, {"user_id": "7"}, long], strict=True):
                assert_exact(result, models[1], features)

    asyncio.run(check())


def test_versions_do_not_share_embeddings(world: World, models: dict[int, ToyModel], valkey: ValkeyServer) -> None:
    async def check() -> None:
        async with running(world, models, **only(valkey)) as system:
            await until_cached(system, QUERY)
            world.deploy(live=2, standby=1)
            await system.until_live(2)
            response = await system.retrieve(QUERY)
            assert (response.checkpoint_version, response.embedding_cached) == (2, False)
            assert_exact(response, models[2], QUERY)
            assert_exact(await until_cached(system, QUERY), models[2], QUERY)
            world.deploy(live=1, standby=2)
            await system.until_live(1)
            response = await system.retrieve(QUERY)
            assert (response.checkpoint_version, response.embedding_cached) == (1, True)
            assert_exact(response, models[1], QUERY)

    asyncio.run(check())


def test_stores_that_share_a_server_do_not_share_embeddings(
    world: World, models: dict[int, ToyModel], valkey: ValkeyServer, tmp_path: Any
) -> None:
    """The other store's version 1 has the same dimension and vocabulary, and other weights."""
    other_models = {1: toy_model(dim=8, seed=9)}
    other_world = World(Store(str(tmp_path / "other")))
    other_world.publish(other_models[1])
    other_world.deploy(live=1)

    async def check() -> None:
        async with running(world, models, **only(valkey)) as system:
            await until_cached(system, QUERY)
        async with running(other_world, other_models, **only(valkey)) as system:
            response = await system.retrieve(QUERY)
            assert not response.embedding_cached
            assert_exact(response, other_models[1], QUERY)

    asyncio.run(check())


def test_an_emptied_server_is_filled_again(world: World, models: dict[int, ToyModel], valkey: ValkeyServer) -> None:
    async def check() -> None:
        async with running(world, models, **only(valkey)) as system:
            await until_cached(system, QUERY)
            with redis.Redis.from_url(valkey.url) as client:
                client.flushall()
            assert not (await system.retrieve(QUERY)).embedding_cached
            await until_cached(system, QUERY)
            assert (await system.status()).cache.errors == 0

    asyncio.run(check())


def _kill(valkey: ValkeyServer) -> None:
    valkey.kill()


def _stop(valkey: ValkeyServer) -> None:
    valkey.stop()


@pytest.mark.parametrize(("fail", "recover"), [(_kill, ValkeyServer.start), (_stop, ValkeyServer.resume)])
def test_a_server_that_dies_or_stops_costs_no_answer(
    world: World,
    models: dict[int, ToyModel],
    valkey: ValkeyServer,
    fail: Callable[[ValkeyServer], None],
    recover: Callable[[ValkeyServer], None],
) -> None:
    async def keep_calling(system: System, until_done: asyncio.Event) -> int:
        num_answers = 0
        while not until_done.is_set():
            for features in (QUERY, {"user_id": str(num_answers)}):
                response = await system.retrieve(features, timeout=PATIENCE_S)
                assert_exact(response, models[1], features)
                assert response.shards_answered == 2
                num_answers += 1
        return num_answers

    async def check() -> None:
        async with running(world, models, **only(valkey), cache_timeout_s=0.2) as system:
            await until_cached(system, QUERY)
            done = asyncio.Event()
            callers = [asyncio.create_task(keep_calling(system, done)) for _ in range(4)]
            await asyncio.sleep(0.2)
            fail(valkey)
            await until(system.status, lambda status: not status.cache.reachable)
            await asyncio.sleep(0.2)
            assert not (await system.retrieve(QUERY)).embedding_cached
            recover(valkey)
            await until(system.status, lambda status: status.cache.reachable)
            await until_cached(system, QUERY)
            done.set()
            assert min(await asyncio.gather(*callers)) > 0

    asyncio.run(check())


async def until_cached(system: System, features: Any, **fields: Any) -> Any:
    """Asks until the embedding comes from the cache: it is stored in the background."""
    return await until(lambda: system.retrieve(features, **fields), lambda response: response.embedding_cached)
