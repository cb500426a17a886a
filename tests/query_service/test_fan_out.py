"""Shards that are dead, slow, wrong or behind: what a caller sees."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
from query_system import System, World, assert_exact, query_of, running, status_code, until
from retrieval.index.v1 import index_service_pb2
from retrieval.query.v1 import query_service_pb2
from toy_checkpoint import ToyModel

QUERY = {"user_id": "1", "history": ["3", "4"]}
LONG_S = 600.0
"""Longer than any test."""


def test_a_dead_shard_is_missing_from_the_answer_and_comes_back(world: World, models: dict[int, ToyModel]) -> None:
    async def check() -> None:
        async with running(world, models) as system:
            assert (await system.retrieve(QUERY)).shards_answered == 2
            await system.shards[1].stop()
            response = await system.retrieve(QUERY)
            assert (response.shards_answered, response.shards_total) == (1, 2)
            assert list(response.degraded_reasons) == [f"shard 1 ({system.shards[1].address}): UNAVAILABLE"]
            assert_exact(response, models[1], QUERY, item_ids=system.shards[0].item_ids)
            assert [shard.reachable for shard in (await system.status()).shards] == [True, False]

            await system.shards[1].start()
            response = await until(lambda: system.retrieve(QUERY), lambda answer: answer.shards_answered == 2)
            assert_exact(response, models[1], QUERY)
            assert not response.degraded_reasons
            assert [shard.reachable for shard in (await system.status()).shards] == [True, True]

    asyncio.run(check())


@pytest.mark.parametrize("min_shards", [0, 1, 2])
def test_fewer_shards_than_asked_for_is_unavailable(world: World, models: dict[int, ToyModel], min_shards: int) -> None:
    async def check() -> None:
        async with running(world, models) as system:
            await system.shards[0].stop()
            single = system.retrieve(QUERY, min_shards=min_shards)
            batch = system.batch_retrieve([QUERY] * 3, min_shards=min_shards)
            if min_shards < 2:
                assert (await single).shards_answered == 1
                assert {result.shards_answered for result in (await batch).results} == {1}
            else:
                for call in (single, batch):
                    code, message = await status_code(call)
                    assert code is grpc.StatusCode.UNAVAILABLE
                    assert "2 are needed: " in message
                    assert f"shard 0 ({system.shards[0].address}): UNAVAILABLE" in message

    asyncio.run(check())


def test_with_all_shards_dead_it_is_unavailable_without_waiting(world: World, models: dict[int, ToyModel]) -> None:
    async def check() -> None:
        async with running(world, models) as system:
            for shard in system.shards:
                await shard.stop()
            code, message = await status_code(system.retrieve(QUERY, timeout=LONG_S))
            assert code is grpc.StatusCode.UNAVAILABLE
            assert message.startswith("0 of 2 shards answered and 1 are needed: shard 0 ")

    asyncio.run(check())


def test_when_too_few_can_still_answer_the_slow_ones_are_not_waited_for(
    world: World, models: dict[int, ToyModel]
) -> None:
    async def check() -> None:
        async with running(world, models) as system:
            waiting, failing = system.shards
            waiting.delay_s = LONG_S
            failing.delay_s, failing.failure = 0.2, grpc.StatusCode.UNAVAILABLE
            code, message = await status_code(system.retrieve(QUERY, min_shards=2, timeout=LONG_S))
            assert code is grpc.StatusCode.UNAVAILABLE
            assert message.startswith("0 of 2 shards answered and 2 are needed: shard 1 ")
            # A call that is cancelled before it arrives is never seen.
            await until(lambda: count(waiting.num_calls - waiting.num_cancelled), lambda left: left == 0)

    asyncio.run(check())


def test_a_slow_shard_is_left_out_within_the_callers_deadline(world: World, models: dict[int, ToyModel]) -> None:
    async def check() -> None:
        async with running(world, models) as system:
            system.shards[1].delay_s = LONG_S
            # That there is an answer at all says that it came before the deadline.
            response = await system.retrieve(QUERY, timeout=4.0)
            assert (response.shards_answered, response.shards_total) == (1, 2)
            assert list(response.degraded_reasons) == [f"shard 1 ({system.shards[1].address}): DEADLINE_EXCEEDED"]
            assert_exact(response, models[1], QUERY, item_ids=system.shards[0].item_ids)
            await until(lambda: count(system.shards[1].num_cancelled), lambda cancelled: cancelled == 1)

    asyncio.run(check())


def test_without_a_deadline_the_default_one_holds(world: World, models: dict[int, ToyModel]) -> None:
    async def check() -> None:
        async with running(world, models, default_timeout_s=0.2) as system:
            for shard in system.shards:
                shard.delay_s = LONG_S
            request = query_service_pb2.RetrieveRequest(query=query_of(QUERY), k=5)
            code, message = await status_code(system.stub.Retrieve(request))
            assert code is grpc.StatusCode.DEADLINE_EXCEEDED
            assert message.startswith("0 of 2 shards answered and 1 are needed: shard 0 ")

    asyncio.run(check())


def test_a_deadline_that_has_passed_harms_no_later_call(world: World, models: dict[int, ToyModel]) -> None:
    async def check() -> None:
        async with running(world, models) as system:
            for timeout in (0, -1):
                code, _ = await status_code(system.retrieve(QUERY, timeout=timeout))
                assert code is grpc.StatusCode.DEADLINE_EXCEEDED
            assert (await system.retrieve(QUERY)).shards_answered == 2

    asyncio.run(check())


def test_a_caller_who_goes_away_takes_the_searches_along(world: World, models: dict[int, ToyModel]) -> None:
    async def check() -> None:
        async with running(world, models, max_micro_batch=1) as system:
            for shard in system.shards:
                shard.delay_s = LONG_S
            request = query_service_pb2.RetrieveRequest(query=query_of(QUERY), k=5)
            calls = [system.stub.Retrieve(request, timeout=LONG_S) for _ in range(20)]
            for shard in system.shards:
                await until(lambda shard=shard: count(shard.num_calls), lambda calls: calls == 20)
            num_tasks = len(asyncio.all_tasks())
            for call in calls:
                call.cancel()
            for shard in system.shards:
                await until(lambda shard=shard: count(shard.num_cancelled), lambda cancelled: cancelled == 20)
            await until(lambda: count(len(asyncio.all_tasks())), lambda tasks: tasks <= num_tasks - 60)

    asyncio.run(check())


@pytest.mark.parametrize(
    "status",
    [
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
    ],
)
def test_a_shard_that_fails_is_named_with_its_status(
    world: World, models: dict[int, ToyModel], status: grpc.StatusCode
) -> None:
    async def check() -> None:
        async with running(world, models) as system:
            system.shards[0].failure = status
            response = await system.retrieve(QUERY)
            assert (response.shards_answered, response.shards_total) == (1, 2)
            assert response.degraded_reasons[0].startswith(f"shard 0 ({system.shards[0].address}): {status.name}")
            assert_exact(response, models[1], QUERY, item_ids=system.shards[1].item_ids)

    asyncio.run(check())


def test_an_answer_at_another_version_is_refused(
    world: World, models: dict[int, ToyModel], caplog: pytest.LogCaptureFixture
) -> None:
    def mix(response: index_service_pb2.SearchResponse) -> None:
        response.checkpoint_version = 2

    async def check() -> None:
        async with running(world, models) as system:
            system.shards[1].spoil = mix
            code, message = await status_code(system.retrieve(QUERY))
            assert code is grpc.StatusCode.INTERNAL
            assert "version" not in message, "a bug's detail stays in the log"
            assert "answered at version 2, asked for 1" in caplog.text

    asyncio.run(check())


def _nan_score(response: index_service_pb2.SearchResponse) -> None:
    response.scores = np.float32(np.nan).tobytes() + response.scores[4:]


def _short_scores(response: index_service_pb2.SearchResponse) -> None:
    response.scores = response.scores[:-4]


def _half_a_score(response: index_service_pb2.SearchResponse) -> None:
    response.scores = response.scores[:-1]


def _too_many_hits(response: index_service_pb2.SearchResponse) -> None:
    response.hit_counts = np.array([1000], "<u4").tobytes()


def _other_batch(response: index_service_pb2.SearchResponse) -> None:
    response.hit_counts += np.array([0], "<u4").tobytes()


def _no_text(response: index_service_pb2.SearchResponse) -> None:
    response.item_ids = b"\xff" + response.item_ids[1:]


def _long_ids(response: index_service_pb2.SearchResponse) -> None:
    response.item_ids += b"1"


def _torn_character(response: index_service_pb2.SearchResponse) -> None:
    sizes = np.frombuffer(response.item_id_sizes, "<u4").copy()
    sizes[:2] = (1, sizes[:2].sum() - 1)
    response.item_ids = "é".encode() + response.item_ids[2:]
    response.item_id_sizes = sizes.tobytes()


def _attribute_lost(response: index_service_pb2.SearchResponse) -> None:
    del response.attributes[0]


def _attribute_short(response: index_service_pb2.SearchResponse) -> None:
    del response.attributes[0].values[-1]


@pytest.mark.parametrize(
    "spoil",
    [
        _nan_score,
        _short_scores,
        _half_a_score,
        _too_many_hits,
        _other_batch,
        _no_text,
        _long_ids,
        _torn_character,
        _attribute_lost,
        _attribute_short,
    ],
)
def test_a_broken_answer_is_not_used(
    world: World,
    models: dict[int, ToyModel],
    spoil: Callable[[index_service_pb2.SearchResponse], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def check() -> None:
        async with running(world, models) as system:
            system.shards[0].spoil = spoil
            response = await system.retrieve(QUERY, attribute_names=["title"])
            assert (response.shards_answered, response.shards_total) == (1, 2)
            reason = f"shard 0 ({system.shards[0].address}): its answer is broken: "
            assert response.degraded_reasons[0].startswith(reason)
            assert "is not used" in caplog.text
            assert_exact(response, models[1], QUERY, item_ids=system.shards[1].item_ids)

    asyncio.run(check())


def test_shards_in_the_wrong_order_are_not_searched(world: World, models: dict[int, ToyModel]) -> None:
    async def check() -> None:
        async with running(world, models, shard_order=(1, 0)) as system:
            code, message = await status_code(system.retrieve(QUERY))
            assert code is grpc.StatusCode.UNAVAILABLE
            assert "FAILED_PRECONDITION: this is shard 1 of 2" in message

    asyncio.run(check())


def test_shards_ahead_of_this_replica_make_it_look_at_the_record(world: World, models: dict[int, ToyModel]) -> None:
    async def check() -> None:
        # It would not look for itself before the test ends.
        async with running(world, models, poll_interval_s=LONG_S) as system:
            await both_loaded(system)
            world.deploy(live=2, standby=1)
            for shard in system.shards:
                del shard.models[1]
            response = await system.retrieve(QUERY)
            assert response.checkpoint_version == 2
            assert (response.shards_answered, list(response.degraded_reasons)) == (2, [])
            assert_exact(response, models[2], QUERY)
            assert [shard.num_calls for shard in system.shards] == [2, 2], "redone once"

    asyncio.run(check())


def test_one_shard_ahead_redoes_the_whole_request(world: World, models: dict[int, ToyModel]) -> None:
    async def check() -> None:
        async with running(world, models, poll_interval_s=LONG_S) as system:
            await both_loaded(system)
            world.deploy(live=2, standby=1)
            del system.shards[1].models[1]
            response = await system.batch_retrieve([QUERY, {}])
            for result, features in zip(response.results, [QUERY, {}], strict=True):
                assert (result.checkpoint_version, result.shards_answered) == (2, 2)
                assert_exact(result, models[2], features)

    asyncio.run(check())


def test_a_version_that_no_record_replaces_counts_as_no_answer(world: World, models: dict[int, ToyModel]) -> None:
    async def check() -> None:
        async with running(world, models) as system:
            await both_loaded(system)
            del system.shards[1].models[1]
            response = await system.retrieve(QUERY)
            assert (response.checkpoint_version, response.shards_answered, response.shards_total) == (1, 1, 2)
            reason = f"shard 1 ({system.shards[1].address}): FAILED_PRECONDITION: checkpoint_version 1 is not loaded"
            assert list(response.degraded_reasons) == [reason]
            assert_exact(response, models[1], QUERY, item_ids=system.shards[0].item_ids)
            del system.shards[0].models[1]
            assert (await status_code(system.retrieve(QUERY)))[0] is grpc.StatusCode.UNAVAILABLE

    asyncio.run(check())


def test_a_request_is_redone_once_only(world: World, models: dict[int, ToyModel]) -> None:
    async def check() -> None:
        async with running(world, models, poll_interval_s=LONG_S) as system:
            await both_loaded(system)
            world.deploy(live=2, standby=1)
            # The record changes back while the request is redone.
            system.shards[0].models.clear()

            def change_back() -> None:
                if system.shards[0].num_calls == 2:
                    world.deploy(live=1, standby=2)

            system.shards[0].before_search = change_back
            response = await system.retrieve(QUERY)
            assert (response.checkpoint_version, response.shards_answered) == (2, 1)
            assert [shard.num_calls for shard in system.shards] == [2, 2]

    asyncio.run(check())


def test_every_answer_during_swaps_is_exact_at_the_version_it_reports(
    world: World, models: dict[int, ToyModel]
) -> None:
    queries: list[dict[str, Any]] = [{"user_id": str(user), "history": [str(user)]} for user in range(1, 11)]
    expected = {
        version: {str(query): model.nearest(query, model.item_ids, 10) for query in queries}
        for version, model in models.items()
    }
    num_by_version = {1: 0, 2: 0}

    async def keep_calling(system: System, seed: int, end_s: float) -> None:
        turn = seed
        while time.monotonic() < end_s:
            turn += 1
            if turn % 7 == 0:
                chosen = [queries[(turn + i) % len(queries)] for i in range(5)]
                results = list((await system.batch_retrieve(chosen)).results)
                assert len({result.checkpoint_version for result in results}) == 1
            else:
                chosen = [queries[turn % len(queries)]]
                results = [await system.retrieve(chosen[0])]
            for query, result in zip(chosen, results, strict=True):
                num_by_version[result.checkpoint_version] += 1
                _, scores = expected[result.checkpoint_version][str(query)]
                assert result.shards_answered == 2
                assert np.abs(np.array(result.scores) - scores).max() <= 1e-5
                assert_exact(result, models[result.checkpoint_version], query)

    async def keep_swapping(system: System, end_s: float) -> None:
        live, standby = 1, 2
        while time.monotonic() < end_s:
            await asyncio.sleep(0.3)
            live, standby = standby, live
            world.deploy(live=live, standby=standby)
            # Shards follow the record as well, some sooner than this replica and some later; each drops the version
            # that stands by, and takes it back.
            system.shards[0].models.pop(standby, None)
            await asyncio.sleep(0.05)
            await system.until_live(live)
            system.shards[0].models[standby] = models[standby]

    async def check() -> None:
        async with running(world, models, poll_interval_s=0.1) as system:
            await both_loaded(system)
            end_s = time.monotonic() + 4.0
            await asyncio.gather(
                keep_swapping(system, end_s), *(keep_calling(system, seed, end_s) for seed in range(4))
            )
        assert min(num_by_version.values()) > 10

    asyncio.run(check())


async def both_loaded(system: System) -> None:
    available = query_service_pb2.TOWER_STATE_AVAILABLE
    await until(system.status, lambda status: [tower.state for tower in status.towers] == [available] * 2)


async def count(value: int) -> int:
    await asyncio.sleep(0)
    return value
