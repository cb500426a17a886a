"""A sample of the live queries is answered by the standby version too: what is counted, and that nobody waits."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from query_system import System, World, assert_exact, running, until
from retrieval.query.v1 import query_service_pb2
from toy_checkpoint import ToyModel

QUERIES: list[dict[str, Any]] = [{"user_id": str(user), "history": [str(user)]} for user in range(1, 11)]
LONG_S = 600.0


@asynccontextmanager
async def shadowing(
    world: World,
    models: dict[int, ToyModel],
    *,
    share: float = 1.0,
    lacking: Sequence[int] = (),
    timeout_s: float = 30.0,
    **changes: Any,
) -> AsyncIterator[System]:
    """Version 1 answers from two shards, version 2 stands by on three; its tower is loaded.

    Args:
        world: The store.
        models: Both versions.
        share: Of the sample.
        lacking: Which of the three shards do not hold version 2.
        timeout_s: Of a comparison.
        changes: To the record.
    """
    world.deploy(**{"live": 1, "standby": 2, "standby_num_shards": 3, **changes})
    available = query_service_pb2.TOWER_STATE_AVAILABLE
    async with running(world, models, layouts=(2, 3), shadow_share=share, default_timeout_s=timeout_s) as system:
        for number in lacking:
            del system.shards[2 + number].models[2]
        await until(system.status, lambda status: all(tower.state == available for tower in status.towers))
        yield system


def overlap(models: dict[int, ToyModel], query: dict[str, Any]) -> float:
    """Of the ten best."""
    first, second = (set(model.nearest(query, model.item_ids, 10)[0]) for model in models.values())
    return len(first & second) / len(first)


async def until_compared(system: System, num_queries: int) -> Any:
    status = await until(
        system.status, lambda status: status.shadow.num_queries + status.shadow.num_errors >= num_queries
    )
    return status.shadow


def test_overlap_and_latencies_are_told(world: World, models: dict[int, ToyModel]) -> None:
    async def check() -> None:
        async with shadowing(world, models) as system:
            for query in QUERIES:
                response = await system.retrieve(query, attribute_names=["title"])
                assert (response.checkpoint_version, response.shards_total) == (1, 2)
                await until_compared(system, QUERIES.index(query) + 1)
            shadow = (await system.status()).shadow
            assert (shadow.checkpoint_version, shadow.live_version) == (2, 1)
            assert (shadow.num_queries, shadow.num_errors) == (len(QUERIES), 0)
            expected = sum(overlap(models, query) for query in QUERIES) / len(QUERIES)
            assert 0 < expected < 1
            assert shadow.mean_overlap == pytest.approx(expected)
            assert 0 < shadow.live_p50_s <= shadow.live_p99_s < LONG_S
            assert 0 < shadow.standby_p50_s <= shadow.standby_p99_s < LONG_S
            assert [count.checkpoint_version for count in (await system.status()).traffic] == [1], "nobody asked for it"
            assert list(system.shards[2].last_request.attribute_names) == []

    asyncio.run(check())


def test_the_same_version_on_another_layout_answers_alike(world: World, models: dict[int, ToyModel]) -> None:
    async def check() -> None:
        async with shadowing(world, models, standby=1) as system:
            await system.batch_retrieve(QUERIES)
            shadow = await until_compared(system, len(QUERIES))
            assert (shadow.checkpoint_version, shadow.live_version) == (1, 1)
            assert (shadow.num_queries, shadow.mean_overlap) == (len(QUERIES), 1.0)

    asyncio.run(check())


def test_no_live_answer_waits_for_it_and_it_takes_little_room(world: World, models: dict[int, ToyModel]) -> None:
    async def check() -> None:
        async with shadowing(world, models, timeout_s=2.0) as system:
            for shard in system.shards[2:]:
                shard.delay_s = LONG_S
            for query in itertools.islice(itertools.cycle(QUERIES), 15):
                # That there is an answer at all says that it did not wait.
                assert_exact(await system.retrieve(query), models[1], query)
            await until(lambda: asyncio.sleep(0, system.shards[2].num_calls), lambda num_calls: num_calls == 4)
            assert [shard.num_calls for shard in system.shards[2:]] == [4] * 3
            # They have a deadline of their own.
            shadow = await until_compared(system, 4)
            assert (shadow.num_queries, shadow.num_errors) == (0, 4)

    asyncio.run(check())


def test_a_standby_version_that_fails_is_counted(
    world: World, models: dict[int, ToyModel], caplog: pytest.LogCaptureFixture
) -> None:
    async def check() -> None:
        async with shadowing(world, models) as system:
            system.shards[2].failure = grpc.StatusCode.INTERNAL
            for number in (1, 2):
                await system.retrieve(QUERIES[0])
                shadow = await until_compared(system, number)
            assert (shadow.num_queries, shadow.num_errors) == (0, 2)
            assert caplog.text.count("version 2 fails in the shadow") == 1

    asyncio.run(check())


def test_until_every_shard_holds_the_version_nothing_is_counted(world: World, models: dict[int, ToyModel]) -> None:
    async def check() -> None:
        async with shadowing(world, models, lacking=[1]) as system:
            await system.retrieve(QUERIES[0])
            await until(lambda: asyncio.sleep(0, system.shards[3].num_calls), lambda num_calls: num_calls == 1)
            system.shards[3].models[2] = models[2]

            async def compared() -> Any:
                await system.retrieve(QUERIES[0])
                return (await system.status()).shadow

            shadow = await until(compared, lambda shadow: shadow.num_queries > 0)
            assert shadow.num_errors == 0

    asyncio.run(check())


def test_large_batches_and_canaries_are_not_sampled(world: World, models: dict[int, ToyModel]) -> None:
    async def check() -> None:
        async with shadowing(world, models) as system:
            await system.batch_retrieve(QUERIES * 2)
            assert (await until_compared(system, 0)).num_queries == 0
            await system.batch_retrieve((QUERIES * 2)[:16])
            assert (await until_compared(system, 1)).num_queries == 16
            world.deploy(live=1, standby=2, standby_num_shards=3, canary_share=1.0)
            await until(system.status, lambda status: status.deployment_revision == 3)
            assert (await system.retrieve(QUERIES[0])).checkpoint_version == 2
            await asyncio.sleep(0.1)
            assert (await system.status()).shadow.num_queries == 16, "the comparison goes on, with the same two"
            assert [shard.num_calls for shard in system.shards[2:]] == [2] * 3

    asyncio.run(check())


def test_another_standby_version_begins_anew_and_without_one_there_is_none(
    world: World, models: dict[int, ToyModel]
) -> None:
    async def check() -> None:
        async with shadowing(world, models) as system:
            await system.retrieve(QUERIES[0])
            await until_compared(system, 1)
            world.deploy(live=2, live_num_shards=3, standby=1)
            status = await until(system.status, lambda status: status.live_version == 2)
            assert (status.shadow.checkpoint_version, status.shadow.live_version) == (1, 2)
            assert status.shadow.num_queries == 0
            await system.retrieve(QUERIES[0])
            assert (await until_compared(system, 1)).mean_overlap == pytest.approx(overlap(models, QUERIES[0]))
            world.deploy(live=2)
            status = await until(system.status, lambda status: status.standby_version == 0)
            assert not status.HasField("shadow")

    asyncio.run(check())


def test_with_a_share_of_nothing_nothing_is_asked(world: World, models: dict[int, ToyModel]) -> None:
    async def check() -> None:
        async with shadowing(world, models, share=0.0) as system:
            for query in QUERIES * 3:
                await system.retrieve(query)
            status = await system.status()
            assert (status.shadow.checkpoint_version, status.shadow.num_queries) == (2, 0)
            assert [shard.num_calls for shard in system.shards[2:]] == [0] * 3

    asyncio.run(check())
