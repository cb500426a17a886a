"""Replicas that are late, slow or failing: who is asked beside them, how often, and what it costs."""

import asyncio
from typing import Any

import grpc
from query_system import PATIENCE_S, System, World, assert_exact, running, until
from toy_checkpoint import ToyModel

from query_service.budget import Budget
from query_service.pace import Pace
from query_service.replicas import Replica, Shard

FEATURES: dict[str, Any] = {"user_id": "1", "history": ["3", "4", "5"]}
NUM_WARM = 80
"""So that each of two replicas has answered often enough to be known."""


async def warm(system: System) -> None:
    for _ in range(NUM_WARM):
        await system.retrieve(FEATURES)


def test_one_that_is_late_has_another_asked_beside_it_and_is_cancelled(
    world: World, models: dict[int, ToyModel]
) -> None:
    async def check() -> None:
        async with running(world, models, replicas=2) as system:
            await warm(system)
            late = system.shards[0]
            late.delay_s = 10 * PATIENCE_S
            for _ in range(2):
                response = await system.retrieve(FEATURES)
                assert_exact(response, models[1], FEATURES)
                assert not response.degraded_reasons
            counts = (await system.status()).fan_out
            assert counts.num_hedges_won >= 1
            assert counts.num_retries == 0
            # Of two shards' calls.
            assert counts.num_hedges <= 0.05 * counts.num_calls
            await until(system.status, lambda _: late.num_cancelled >= 1)

    asyncio.run(check())


def test_none_is_asked_beside_it_where_that_is_switched_off(world: World, models: dict[int, ToyModel]) -> None:
    async def check() -> None:
        async with running(world, models, replicas=2, hedge=False) as system:
            await warm(system)
            system.shards[0].delay_s = 0.2
            for _ in range(2):
                assert_exact(await system.retrieve(FEATURES), models[1], FEATURES)
            assert (await system.status()).fan_out.num_hedges == 0

    asyncio.run(check())


def test_a_failure_is_healed_by_another_replica_and_counted(world: World, models: dict[int, ToyModel]) -> None:
    async def check() -> None:
        async with running(world, models, replicas=2) as system:
            system.shards[0].failure = grpc.StatusCode.UNAVAILABLE
            for _ in range(4):
                response = await system.retrieve(FEATURES)
                assert_exact(response, models[1], FEATURES)
                assert not response.degraded_reasons
            status = await system.status()
            assert status.fan_out.num_retries >= 1
            assert [shard.reachable for shard in status.shards].count(False) == 1

    asyncio.run(check())


def test_a_slow_replica_stands_back_until_it_is_fast_again() -> None:
    slow, fast = Replica("slow", None), Replica("fast", None)
    shard = Shard([slow, fast])
    for replica in (slow, fast):
        for _ in range(64):
            shard.took(replica, "work", 0.01, version=1, now_s=0.5)
    for _ in range(4):
        shard.took(slow, "work", 0.2, version=1, now_s=0.5)
    shard.took(slow, "work", 0.01, version=1, now_s=0.5)
    for _ in range(4):
        shard.took(slow, "work", 0.2, version=1, now_s=0.5)
    assert not slow.slowness.is_on
    # Another one answered before it: as good as late.
    shard.lost(slow, "work", 0.012, now_s=0.5)
    assert shard.patience_s("work", 1, 1.0) == 0.01
    assert slow.slowness.is_on
    assert {shard.first(1, 0.7) for _ in range(8)} == {fast}
    # Nobody is asked beside the fast one: the other would take longer.
    assert shard.spare(fast, 1, 0.7) is None
    assert shard.other(fast, 1, 0.7) is slow
    # After a pause one request tries it.
    assert [shard.first(1, 40.0) for _ in range(8)].count(slow) == 1
    shard.took(slow, "work", 0.01, version=1, now_s=40.1)
    assert [shard.first(1, 40.2) for _ in range(8)].count(slow) == 4


def test_of_two_slow_replicas_one_keeps_its_turn() -> None:
    first, second = Replica("first", None), Replica("second", None)
    shard = Shard([first, second])
    for number in range(64):
        shard.took(first, "work", 0.01 * (1 + number % 2), version=1, now_s=0.01 * number)
        shard.took(second, "work", 0.01 * (1 + number % 2), version=1, now_s=0.01 * number)
    assert not first.slowness.is_on
    assert not second.slowness.is_on


def test_a_budget_is_a_share_of_recent_calls() -> None:
    budget = Budget(share=0.05)
    assert not budget.take(0.0)
    for _ in range(100):
        budget.count(0.0)
    assert [budget.take(0.0) for _ in range(6)] == [True] * 5 + [False]
    # Forgotten together, so that the share holds over any length of time.
    assert not budget.take(10.0)
    for _ in range(40):
        budget.count(10.0)
    assert [budget.take(10.0) for _ in range(3)] == [True, True, False]


def test_a_budget_with_a_floor_lets_a_lone_failure_be_tried_again() -> None:
    budget = Budget(share=0.2, floor=2)
    assert [budget.take(0.0) for _ in range(3)] == [True, True, False]
    assert budget.take(100.0)


def test_a_pace_is_that_of_the_latest_answers() -> None:
    pace = Pace()
    for _ in range(31):
        pace.add(1.0)
    assert pace.p95_s is None
    for number in range(200):
        pace.add(0.01 * (number % 100))
    assert pace.p95_s is not None
    assert 0.9 <= pace.p95_s < 1.0
