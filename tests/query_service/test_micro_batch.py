"""Requests that ask alike are answered together, and each as if it were alone."""

import asyncio
from collections.abc import Sequence
from typing import Any

import grpc
import pytest
from query_system import PATIENCE_S, System, World, assert_exact, query_of, running, status_code, until
from retrieval.query.v1 import query_service_pb2
from test_retrieve import with_taste
from toy_checkpoint import ToyModel, toy_model

from query_service.deadline import Deadline
from query_service.micro_batch import MicroBatches
from towers.checkpoint import CheckpointStore
from towers.errors import DeadlineError, NotReadyError

LONG_S = 600.0
USERS = [{"user_id": str(user), "history": [str(user), str(user + 1)]} for user in range(1, 31)]


class Answerer:
    """Answers batches when it is told to."""

    def __init__(self) -> None:
        self.batches: list[Sequence[str]] = []
        self.deadlines: list[Deadline] = []
        self.may_end = asyncio.Event()
        self.num_cancelled = 0
        self.failure: Exception | None = None

    async def answer(self, asked: Sequence[str], deadline: Deadline) -> list[str | Exception]:
        self.batches.append(asked)
        self.deadlines.append(deadline)
        try:
            await self.may_end.wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        if self.failure:
            raise self.failure
        return [NotReadyError(text) if text == "bad" else text.upper() for text in asked]


async def asking(
    batches: MicroBatches[str, str], texts: Sequence[str], deadline: Deadline, kind: str = ""
) -> list[asyncio.Task[str]]:
    """Asks one after another, in this order."""
    tasks = [asyncio.create_task(batches.ask(kind, text, deadline)) for text in texts]
    # Once for the requests, once for the batches that they began.
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return tasks


def test_a_request_that_is_alone_waits_for_nobody() -> None:
    async def check() -> None:
        answerer = Answerer()
        answerer.may_end.set()
        batches = MicroBatches(answerer.answer, 64)
        for text in "abc":
            assert await batches.ask("", text, Deadline.after(LONG_S)) == text.upper()
        assert answerer.batches == [["a"], ["b"], ["c"]]
        assert (batches.counts.num_batches, batches.counts.num_requests, batches.counts.largest) == (3, 3, 1)
        assert batches.counts.waits.quantile_s(1.0) < 1e-4

    asyncio.run(check())


def test_the_more_are_here_the_more_go_together() -> None:
    async def check() -> None:
        answerer = Answerer()
        batches = MicroBatches(answerer.answer, 64)
        tasks = await asking(batches, [str(number) for number in range(100)], Deadline.after(LONG_S))
        sizes = [len(batch) for batch in answerer.batches]
        assert sizes[0] == 1
        assert sizes == sorted(sizes)
        assert sizes[-1] > 8
        # The rest waits in vain for as many, and goes after its part of the time.
        answerer.may_end.set()
        assert await asyncio.gather(*tasks) == [str(number) for number in range(100)]
        assert sorted(text for batch in answerer.batches for text in batch) == sorted(map(str, range(100)))
        assert batches.counts.largest == max(map(len, answerer.batches))

    asyncio.run(check())


def test_other_kinds_and_other_deadlines_do_not_go_together() -> None:
    async def check() -> None:
        answerer = Answerer()
        batches = MicroBatches(answerer.answer, 64)
        tasks = [
            task
            for kind, timeout_s in (("a", 20.0), ("b", 20.0), ("a", 30.0), ("b", 30.0))
            for task in await asking(batches, ["one"], Deadline.after(timeout_s), kind)
        ]
        assert answerer.batches == [["one"]] * 4
        answerer.may_end.set()
        await asyncio.gather(*tasks)

    asyncio.run(check())


def test_no_batch_is_larger_than_allowed() -> None:
    async def check() -> None:
        answerer = Answerer()
        batches = MicroBatches(answerer.answer, 4)
        tasks = await asking(batches, [str(number) for number in range(100)], Deadline.after(LONG_S))
        assert max(map(len, answerer.batches)) == 4
        answerer.may_end.set()
        await asyncio.gather(*tasks)

    asyncio.run(check())


def test_a_batch_has_the_deadline_of_its_most_patient_member_and_each_gives_up_at_its_own() -> None:
    async def check() -> None:
        answerer = Answerer()
        batches = MicroBatches(answerer.answer, 64)
        # Within a tenth of each other: they go together.
        short, long = Deadline.after(0.960), Deadline.after(0.995)
        first = await asking(batches, ["first"], long)
        impatient, patient = await asking(batches, ["impatient"], short) + await asking(batches, ["patient"], long)
        with pytest.raises(DeadlineError):
            await impatient
        assert not patient.done()
        assert answerer.batches == [["first"], ["impatient"], ["patient"]] or answerer.deadlines[1] == long
        answerer.may_end.set()
        assert await patient == "PATIENT"
        await asyncio.gather(*first)

    asyncio.run(check())


def test_a_failure_is_its_members_own_and_what_fails_all_fails_all() -> None:
    async def check() -> None:
        answerer = Answerer()
        batches = MicroBatches(answerer.answer, 64)
        texts = ["good", "bad"] * 20
        tasks = await asking(batches, texts, Deadline.after(LONG_S))
        answerer.may_end.set()
        for text, outcome in zip(texts, await asyncio.gather(*tasks, return_exceptions=True), strict=True):
            assert isinstance(outcome, NotReadyError) if text == "bad" else outcome == "GOOD"
        answerer.failure = NotReadyError("told to")
        tasks = await asking(batches, texts, Deadline.after(LONG_S))
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert {str(outcome) for outcome in outcomes} == {"told to"}

    asyncio.run(check())


def test_who_is_cancelled_leaves_and_a_batch_that_all_have_left_ends() -> None:
    async def check() -> None:
        answerer = Answerer()
        batches = MicroBatches(answerer.answer, 64)
        tasks = await asking(batches, [str(number) for number in range(60)], Deadline.after(LONG_S))
        num_started = len(answerer.batches)
        last = answerer.batches[-1]
        assert len(last) > 1
        for task in tasks:
            if task is not tasks[int(last[0])]:
                task.cancel()
        await until(lambda: asyncio.sleep(0, answerer.num_cancelled), lambda count: count == num_started - 1)
        answerer.may_end.set()
        assert await tasks[int(last[0])] == last[0]
        await batches.close()
        # Those that were still waiting were never asked for.
        assert len(answerer.batches) == num_started
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(check())


def slow_down(system: System) -> None:
    """Has the shards take so long that requests find each other, however fast the machine."""
    for shard in system.shards:
        shard.delay_s = 0.005


def test_answers_under_load_are_exact_and_share_searches(world: World, models: dict[int, ToyModel]) -> None:
    async def check() -> None:
        async with running(world, models) as system:
            slow_down(system)
            calls_before = system.shards[0].num_calls
            for _ in range(5):
                kinds = [{"k": 10}, {"k": 3}, {"excluded_item_ids": ["7"]}, {"attribute_names": ["title"]}]
                asked = [(features, fields) for features in USERS for fields in kinds]
                answers = await asyncio.gather(*(system.retrieve(features, **fields) for features, fields in asked))
                for (features, fields), response in zip(asked, answers, strict=True):
                    ids = [item for item in models[1].item_ids if item not in fields.get("excluded_item_ids", ())]
                    assert_exact(response, models[1], features, fields.get("k", 10), ids)
                    assert [column.name for column in response.attributes] == fields.get("attribute_names", [])
                    assert response.checkpoint_version == 1
            status = await system.status()
            counts = status.micro_batches
            assert counts.num_requests == 600
            assert counts.num_batches == system.shards[0].num_calls - calls_before < 600
            assert counts.largest > 1
            assert counts.wait_p99_s >= counts.wait_p50_s > 0
            [traffic] = status.traffic
            assert (traffic.num_requests, traffic.num_errors) == (600, 0)

    asyncio.run(check())


def test_one_bad_query_fails_alone(empty_world: World) -> None:
    model = toy_model(dim=2)
    CheckpointStore(empty_world.store).publish(with_taste(model.draft()))
    empty_world.deploy(live=1)
    right, unknown, infinite = {"taste": [0.5, 0.5]}, {"colour": "red"}, {"taste": [3e38, 1.0]}

    async def fate(system: System, features: dict[str, Any]) -> str:
        try:
            return f"{len((await system.retrieve(features)).item_ids)} items"
        except grpc.aio.AioRpcError as error:
            return f"{error.code().name}: {error.details()}"

    async def check() -> None:
        async with running(empty_world, {1: model}) as system:
            slow_down(system)
            for _ in range(5):
                fates = await asyncio.gather(
                    *(fate(system, features) for _ in range(20) for features in (right, unknown, infinite))
                )
                assert set(fates[0::3]) == {"10 items"}
                assert {text.partition(";")[0] for text in fates[1::3]} == {
                    "INVALID_ARGUMENT: unknown feature 'colour'"
                }
                assert {text.partition(";")[0] for text in fates[2::3]} == {
                    "INVALID_ARGUMENT: version 1 gives it no finite embedding"
                }
            assert (await system.status()).micro_batches.largest > 1

    asyncio.run(check())


def test_members_of_a_batch_are_the_canarys_or_not_each_by_itself(world: World, models: dict[int, ToyModel]) -> None:
    world.deploy(live=1, standby=2, canary_share=0.5)

    async def check() -> None:
        async with running(world, models) as system:
            await until(system.status, lambda status: [tower.state for tower in status.towers] == [2, 2])
            alone = [await system.retrieve(features) for features in USERS]
            assert {response.checkpoint_version for response in alone} == {1, 2}
            together = await asyncio.gather(*(system.retrieve(features) for features in USERS))
            for features, before, response in zip(USERS, alone, together, strict=True):
                assert response.checkpoint_version == before.checkpoint_version
                assert_exact(response, models[response.checkpoint_version], features)
            traffic = (await system.status()).traffic
            assert sum(count.num_requests for count in traffic) == 2 * len(USERS)

    asyncio.run(check())


def test_a_shard_that_stalls_costs_all_members_of_a_batch_the_same(world: World, models: dict[int, ToyModel]) -> None:
    async def check() -> None:
        async with running(world, models) as system:
            await asyncio.gather(*(system.retrieve(features) for features in USERS))
            system.shards[1].delay_s = LONG_S
            answers = await asyncio.gather(*(system.retrieve(features, timeout=2.0) for features in USERS))
            for features, response in zip(USERS, answers, strict=True):
                assert (response.shards_answered, response.shards_total) == (1, 2)
                assert len(response.degraded_reasons) == 1
                assert_exact(response, models[1], features, 10, system.shards[0].item_ids)
            code, _ = await status_code(system.retrieve(USERS[0], timeout=0.5, min_shards=2))
            assert code is grpc.StatusCode.DEADLINE_EXCEEDED

    asyncio.run(check())


def test_a_swap_under_load_never_mixes(world: World, models: dict[int, ToyModel]) -> None:
    async def check() -> None:
        async with running(world, models) as system:
            done = asyncio.Event()
            seen: set[int] = set()

            async def keep_calling(features: dict[str, Any]) -> None:
                while not done.is_set():
                    response = await system.retrieve(features)
                    seen.add(response.checkpoint_version)
                    assert_exact(response, models[response.checkpoint_version], features)

            callers = [asyncio.create_task(keep_calling(features)) for features in USERS[:8]]
            for live in (2, 1, 2):
                world.deploy(live=live, standby=3 - live)
                await system.until_live(live)
                await asyncio.sleep(0.05)
            done.set()
            await asyncio.gather(*callers)
            assert seen == {1, 2}

    asyncio.run(check())


def test_calls_that_go_away_under_load_leave_nothing(world: World, models: dict[int, ToyModel]) -> None:
    async def check() -> None:
        async with running(world, models) as system:
            for shard in system.shards:
                shard.delay_s = LONG_S
            num_tasks = len(asyncio.all_tasks())
            request = query_service_pb2.RetrieveRequest(query=query_of(USERS[0]), k=5)
            calls = [system.stub.Retrieve(request, timeout=PATIENCE_S) for _ in range(100)]
            await until(
                lambda: asyncio.sleep(0, [shard.num_calls for shard in system.shards]), lambda calls: min(calls) > 1
            )
            for call in calls:
                call.cancel()
            for shard in system.shards:
                await until(
                    lambda shard=shard: asyncio.sleep(0, shard), lambda shard: shard.num_cancelled == shard.num_calls
                )
            await until(lambda: asyncio.sleep(0, len(asyncio.all_tasks())), lambda tasks: tasks <= num_tasks)

    asyncio.run(check())
