"""Several replicas of a shard, and several layouts: who is asked, who is asked instead, and what a caller sees."""

import asyncio
from collections.abc import Sequence
from typing import Any

import grpc
import pytest
from exact_shard import ExactShard
from query_system import System, World, assert_exact, running, status_code, until
from retrieval.feature.v1 import feature_pb2, filter_pb2
from retrieval.query.v1 import query_service_pb2
from toy_checkpoint import ToyModel

from query_service.replicas import Replica, Shard

QUERY: dict[str, Any] = {"user_id": "1", "history": ["3", "4"]}
LONG_S = 600.0
"""Longer than any test."""


def calls(shards: Sequence[ExactShard]) -> list[int]:
    return [shard.num_calls for shard in shards]


def assert_full(response: Any, num_shards: int = 2) -> None:
    assert (response.shards_answered, response.shards_total) == (num_shards, num_shards)
    assert not response.degraded_reasons


def test_replicas_are_asked_in_turn(world: World, models: dict[int, ToyModel]) -> None:
    async def check() -> None:
        async with running(world, models, replicas=3) as system:
            for _ in range(9):
                assert_exact(await system.retrieve(QUERY), models[1], QUERY)
            assert calls(system.shards) == [3] * 6
            seen = [(shard.num_shards, shard.shard, shard.address) for shard in (await system.status()).shards]
            expected = [(2, number // 3, shard.address) for number, shard in enumerate(system.shards)]
            assert seen == expected

    asyncio.run(check())


def test_a_replica_that_dies_under_load_costs_no_answer_and_takes_its_turn_again(
    world: World, models: dict[int, ToyModel]
) -> None:
    async def keep_calling(system: System, is_over: asyncio.Event) -> int:
        num_answers = 0
        while not is_over.is_set():
            response = await system.retrieve(QUERY)
            assert_full(response)
            assert_exact(response, models[1], QUERY)
            num_answers += 1
        return num_answers

    async def check() -> None:
        async with running(world, models, replicas=2) as system:
            first, second = system.shards[0], system.shards[1]
            is_over = asyncio.Event()
            callers = [asyncio.create_task(keep_calling(system, is_over)) for _ in range(8)]
            await until(lambda: asyncio.sleep(0, first.num_calls), lambda num_calls: num_calls > 10)
            await first.stop()
            status = await until(system.status, lambda status: not all(shard.reachable for shard in status.shards))
            assert [shard.address for shard in status.shards if not shard.reachable] == [first.address]
            before = second.num_calls
            await until(lambda: asyncio.sleep(0, second.num_calls), lambda num_calls: num_calls > before + 50)
            await first.start()
            before = first.num_calls
            await until(lambda: asyncio.sleep(0, first.num_calls), lambda num_calls: num_calls > before + 10)
            assert all(shard.reachable for shard in (await system.status()).shards)
            is_over.set()
            assert min(await asyncio.gather(*callers)) > 0

    asyncio.run(check())


def test_a_replica_that_says_it_does_not_serve_is_asked_last(world: World, models: dict[int, ToyModel]) -> None:
    async def seen_serving(system: System, *expected: bool) -> None:
        await until(system.status, lambda status: [shard.reachable for shard in status.shards[:2]] == list(expected))

    async def check() -> None:
        async with running(world, models, replicas=2) as system:
            first, second = system.shards[:2]
            await first.set_serving(False)
            await seen_serving(system, False, True)
            before = first.num_calls
            for _ in range(6):
                assert_full(await system.retrieve(QUERY))
            assert first.num_calls == before
            # Better than nothing.
            await second.set_serving(False)
            await seen_serving(system, False, False)
            assert_full(await system.retrieve(QUERY))
            await second.stop()
            assert_full(await system.retrieve(QUERY))
            await first.set_serving(True)
            await seen_serving(system, True, False)
            await second.start()
            await seen_serving(system, True, True)
            before = first.num_calls, second.num_calls
            for _ in range(4):
                assert_full(await system.retrieve(QUERY))
            assert first.num_calls > before[0]
            assert second.num_calls > before[1]

    asyncio.run(check())


@pytest.mark.parametrize(
    "status", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED]
)
def test_what_another_replica_can_heal_is_tried_there(
    world: World, models: dict[int, ToyModel], status: grpc.StatusCode
) -> None:
    async def check() -> None:
        async with running(world, models, replicas=2) as system:
            system.shards[0].failure = status
            for _ in range(4):
                response = await system.retrieve(QUERY)
                assert_full(response)
                assert_exact(response, models[1], QUERY)
            assert system.shards[0].num_calls > 0
            assert system.shards[1].num_calls == 4

    asyncio.run(check())


def test_a_replica_that_hangs_has_half_of_the_time(world: World, models: dict[int, ToyModel]) -> None:
    async def check() -> None:
        async with running(world, models, replicas=2) as system:
            system.shards[0].delay_s = LONG_S
            for _ in range(2):
                # That it is full says that the time was enough for the second replica too.
                response = await system.retrieve(QUERY, timeout=4.0)
                assert_full(response)
                assert_exact(response, models[1], QUERY)
            await until(lambda: asyncio.sleep(0, system.shards[0].num_cancelled), lambda cancelled: cancelled == 1)

    asyncio.run(check())


def test_a_replica_that_lacks_the_version_leaves_no_gap(world: World, models: dict[int, ToyModel]) -> None:
    async def check() -> None:
        async with running(world, models, replicas=2) as system:
            del system.shards[0].models[1]
            for _ in range(4):
                response = await system.retrieve(QUERY)
                assert_full(response)
                assert_exact(response, models[1], QUERY)
            assert system.shards[0].num_calls > 0
            assert all(shard.reachable for shard in (await system.status()).shards), "it answers, after all"

    asyncio.run(check())


@pytest.mark.parametrize("status", [grpc.StatusCode.INTERNAL, grpc.StatusCode.RESOURCE_EXHAUSTED])
def test_what_another_replica_would_not_heal_is_not_tried_again(
    world: World, models: dict[int, ToyModel], status: grpc.StatusCode
) -> None:
    async def check() -> None:
        async with running(world, models, replicas=2) as system:
            for shard in system.shards[:2]:
                shard.failure = status
            response = await system.retrieve(QUERY)
            assert (response.shards_answered, response.shards_total) == (1, 2)
            assert sum(calls(system.shards[:2])) == 1

    asyncio.run(check())


def test_with_all_replicas_gone_both_tries_are_named(world: World, models: dict[int, ToyModel]) -> None:
    async def check() -> None:
        async with running(world, models, replicas=2) as system:
            first, second = system.shards[0], system.shards[1]
            await first.stop()
            second.failure = grpc.StatusCode.CANCELLED
            response = await system.retrieve(QUERY)
            assert (response.shards_answered, response.shards_total) == (1, 2)
            tried = [f"shard 0 ({first.address}): UNAVAILABLE", f"shard 0 ({second.address}): CANCELLED"]
            assert response.degraded_reasons[0] in (", then ".join(tried), ", then ".join(tried[::-1]))
            code, message = await status_code(system.retrieve(QUERY, min_shards=2))
            assert code is grpc.StatusCode.UNAVAILABLE
            assert all(reason in message for reason in tried)

    asyncio.run(check())


def test_one_replica_ahead_of_this_service_makes_it_look_at_the_record(
    world: World, models: dict[int, ToyModel]
) -> None:
    async def check() -> None:
        async with running(world, models, replicas=2, poll_interval_s=LONG_S) as system:
            available = query_service_pb2.TOWER_STATE_AVAILABLE
            await until(system.status, lambda status: [tower.state for tower in status.towers] == [available] * 2)
            world.deploy(live=2, standby=1)
            del system.shards[0].models[1]
            await system.shards[1].stop()
            response = await system.retrieve(QUERY)
            assert response.checkpoint_version == 2
            assert_full(response)
            assert_exact(response, models[2], QUERY)

    asyncio.run(check())


def test_a_replica_that_failed_is_probed_by_one_request_at_a_time() -> None:
    first, second = Replica("first", None), Replica("second", None)
    shard = Shard([first, second])

    def num_turns(replica: Replica, version: int, now_s: float) -> int:
        """Of eight requests at that moment."""
        return [shard.first(version, now_s) for _ in range(8)].count(replica)

    assert num_turns(first, 1, 0.0) == 4
    for _ in range(9):
        first.failed(now_s=0.0)
    assert shard.first(1, 0.1) is second
    assert shard.other(second, 1, 0.1) is first
    assert shard.spare(second, 1, 0.1) is None
    assert num_turns(first, 1, 0.4) == 0
    assert num_turns(first, 1, 0.6) == 1
    first.failed(now_s=0.6)
    assert num_turns(first, 1, 1.5) == 0, "the pause grows"
    assert num_turns(first, 1, 1.7) == 1
    first.answered()
    assert num_turns(first, 1, 1.7) == 4
    for now_s in range(10, 100, 10):
        first.failed(now_s)
    assert num_turns(first, 1, 90 + 3.9) == 0
    assert num_turns(first, 1, 90 + 4.1) == 1, "but not for ever"


def test_a_replica_that_lacks_a_version_comes_last_for_that_version_alone() -> None:
    first, second = Replica("first", None), Replica("second", None)
    shard = Shard([first, second])
    second.lacks(1, now_s=0.0)
    assert second.is_reachable
    assert [shard.first(1, 0.9) for _ in range(4)] == [first] * 4
    assert [shard.first(2, 0.9) for _ in range(4)].count(second) == 2
    assert [shard.first(1, 1.1) for _ in range(4)].count(second) == 2


def test_a_single_replica_is_asked_whatever_happened() -> None:
    only = Replica("only", None)
    only.failed(now_s=0.0)
    shard = Shard([only])
    assert shard.first(1, 0.0) is only
    assert shard.other(only, 1, 0.0) is None


def test_the_record_says_which_layout_answers(world: World, models: dict[int, ToyModel]) -> None:
    async def check() -> None:
        async with running(world, models, layouts=(2, 3)) as system:
            assert_full(await system.retrieve(QUERY), 2)
            assert calls(system.shards) == [1, 1, 0, 0, 0]
            world.deploy(live=1, live_num_shards=3)
            response = await until(lambda: system.retrieve(QUERY), lambda answer: answer.shards_total == 3)
            assert_full(response, 3)
            assert_exact(response, models[1], QUERY)
            before = calls(system.shards)
            assert_full(await system.retrieve(QUERY, min_shards=3), 3)
            assert calls(system.shards) == [*before[:2], *(num_calls + 1 for num_calls in before[2:])]

    asyncio.run(check())


def test_re_sharding_under_load_mixes_no_layouts(world: World, models: dict[int, ToyModel]) -> None:
    queries: list[dict[str, Any]] = [{"user_id": str(user), "history": [str(user)]} for user in range(1, 11)]
    seen: set[int] = set()

    async def keep_calling(system: System, query: dict[str, Any], is_over: asyncio.Event) -> None:
        while not is_over.is_set():
            # All shards of whichever layout answers.
            response = await system.retrieve(query, min_shards=3)
            assert_full(response, response.shards_total)
            assert_exact(response, models[response.checkpoint_version], query)
            seen.add(response.shards_total)

    async def check() -> None:
        async with running(world, models, layouts=(2, 3)) as system:
            is_over = asyncio.Event()
            callers = [asyncio.create_task(keep_calling(system, query, is_over)) for query in queries]
            for _ in range(3):
                for num_shards, version in ((3, 1), (2, 1), (3, 2), (2, 1)):
                    world.deploy(live=version, standby=3 - version, live_num_shards=num_shards)
                    seen.clear()
                    await until(lambda: asyncio.sleep(0, set(seen)), lambda totals, n=num_shards: n in totals)
            is_over.set()
            await asyncio.gather(*callers)

    asyncio.run(check())


def test_a_layout_that_is_not_known_here_does_not_answer(world: World, models: dict[int, ToyModel]) -> None:
    async def check() -> None:
        async with running(world, models) as system:
            world.deploy(live=2, standby=1, live_num_shards=5)
            failed = query_service_pb2.TOWER_STATE_FAILED
            status = await until(system.status, lambda status: status.towers[1].state == failed)
            assert status.towers[1].reason == "there is no layout of 5 shards here; add it to TWOTOWER_SHARDS"
            assert not status.towers[1].is_corrupt
            response = await system.retrieve(QUERY)
            assert_full(response)
            assert_exact(response, models[1], QUERY)

    asyncio.run(check())


def test_the_filter_reaches_the_shards_as_it_is(world: World, models: dict[int, ToyModel]) -> None:
    value = feature_pb2.FeatureValue(string_value="drama")
    condition = filter_pb2.Filter(equals=filter_pb2.Equals(attribute="genres", value=value))

    async def check() -> None:
        async with running(world, models) as system:
            await system.retrieve(QUERY, filter=condition)
            assert [shard.last_request.filter for shard in system.shards] == [condition] * 2
            await system.batch_retrieve([QUERY], filter=condition)
            assert [shard.last_request.filter for shard in system.shards] == [condition] * 2
            await system.retrieve(QUERY)
            assert not any(shard.last_request.HasField("filter") for shard in system.shards)

    asyncio.run(check())
