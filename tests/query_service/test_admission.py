"""Who is let in: by priority, by what answers take, at the door and in streams; and what the clients make of it."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import grpc
import pytest
from query_system import PATIENCE_S, System, World, assert_exact, query_of, running, status_code, until
from retrieval.query.v1 import query_service_pb2
from toy_checkpoint import ToyModel

from query_service import admission
from query_service.admission import PRIORITY_KEY, Admission, Priority, Visit, priority_of
from query_service.deadline import Deadline
from retrieval_client import AsyncRetrievalClient, OverloadedError, Retrieval, RetrievalClient
from towers.errors import DeadlineError, InvalidInputError
from towers.errors import OverloadedError as Refusal

LONG = Deadline.after(1e6)
FEATURES: dict[str, Any] = {"user_id": "1", "history": ["3", "4", "5"]}


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(admission, "time", clock)
    return clock


@contextmanager
def inside(door: Admission, priority: Priority, count: int) -> Iterator[None]:
    with ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(door.admitted(priority, 1, LONG))
        yield


def refusal_of(door: Admission, priority: Priority, deadline: Deadline = LONG, num_queries: int = 1) -> Refusal:
    with pytest.raises(Refusal) as caught, door.admitted(priority, num_queries, deadline):
        pass
    return caught.value


def learn(
    door: Admission, clock: Clock, seconds: float, count: int, num_queries: int = 1, is_alone: bool = False
) -> None:
    """As many answers, each of which took so long, one after another."""
    for _ in range(count):
        visit = Visit(clock.now_s, num_queries, is_alone)
        clock.now_s += seconds
        door.learn(visit)


def test_each_priority_fills_its_share_and_what_is_refused_is_counted() -> None:
    door = Admission(max_in_flight=10, target_s=0.1)
    with inside(door, Priority.SHEDDABLE, 5):
        assert refusal_of(door, Priority.SHEDDABLE).pushback_ms == -1
        with inside(door, Priority.DEFAULT, 4):
            assert 0 < (refusal_of(door, Priority.DEFAULT).pushback_ms or 0) <= 5000
            # It would come again too late.
            assert refusal_of(door, Priority.DEFAULT, Deadline.after(0.01)).pushback_ms == -1
            with inside(door, Priority.CRITICAL, 1):
                assert "10 queries" in str(refusal_of(door, Priority.CRITICAL))
    assert door.in_flight == 0
    assert door.num_rejected == {Priority.SHEDDABLE: 1, Priority.DEFAULT: 2, Priority.CRITICAL: 1}


def test_a_batch_counts_as_its_queries_but_fits_where_nothing_else_is_inside() -> None:
    door = Admission(max_in_flight=10, target_s=0.1)
    with door.admitted(Priority.DEFAULT, 50, LONG):
        assert door.in_flight == 10
        refusal_of(door, Priority.CRITICAL)
    with inside(door, Priority.DEFAULT, 1):
        refusal_of(door, Priority.DEFAULT, num_queries=9)
        with door.admitted(Priority.DEFAULT, 8, LONG):
            assert door.in_flight == 9
    assert door.in_flight == 0


def test_the_bound_shrinks_while_every_answer_is_late_and_grows_when_somebody_is_refused(clock: Clock) -> None:
    door = Admission(max_in_flight=1000, target_s=0.1)
    with inside(door, Priority.CRITICAL, 400):
        learn(door, clock, 0.2, 5)
        assert door.bound == 640
        for _ in range(20):
            learn(door, clock, 0.2, 5)
        assert door.bound == 64
        # One answer of an interval that is fast: a burst, no queue that stands.
        learn(door, clock, 0.01, 1)
        learn(door, clock, 0.2, 5)
        assert door.bound == 64
        for _ in range(40):
            door.rejection(Priority.DEFAULT, remaining_s=1.0)
            learn(door, clock, 0.03, 5)
        assert door.bound == 1000
    bound = door.bound
    learn(door, clock, 0.03, 50)
    assert door.bound == bound


def test_a_service_that_is_slow_by_nature_is_not_taken_for_a_busy_one(clock: Clock) -> None:
    door = Admission(max_in_flight=100, target_s=0.1)
    learn(door, clock, 0.3, 50, is_alone=True)
    assert door.bound == 100


def test_callers_who_gave_up_late_teach_that_too(clock: Clock) -> None:
    door = Admission(max_in_flight=1000, target_s=0.1)

    def give_up(seconds: float, error: type[BaseException]) -> None:
        with suppress(error), door.admitted(Priority.DEFAULT, 1, LONG):
            clock.now_s += seconds
            raise error

    with inside(door, Priority.CRITICAL, 400):
        for _ in range(20):
            give_up(0.05, asyncio.CancelledError)
            give_up(0.3, InvalidInputError)
        assert door.bound == 1000
        for _ in range(3):
            give_up(0.3, asyncio.CancelledError)
            give_up(0.3, DeadlineError)
        assert door.bound == 641


def test_a_batch_may_take_twice_what_one_of_its_size_takes_alone(clock: Clock) -> None:
    door = Admission(max_in_flight=1000, target_s=0.1)
    learn(door, clock, 0.03, 5, is_alone=True)
    learn(door, clock, 0.3, 5, num_queries=64, is_alone=True)
    with inside(door, Priority.CRITICAL, 400):
        learn(door, clock, 0.5, 20, num_queries=64)
        assert door.bound == 1000
        # No single query was answered in the meantime, so nothing is known of how fast one may be.
        clock.now_s += 2
        door.require_time(_on(clock, Deadline(clock.now_s + 0.001)))
        learn(door, clock, 0.7, 5, num_queries=64)
        assert door.bound == 640
        learn(door, clock, 0.7, 5, num_queries=2)
        assert door.bound == 512


def test_what_would_be_too_late_is_refused_until_the_estimate_is_forgotten(clock: Clock) -> None:
    door = Admission(max_in_flight=100, target_s=0.5)
    learn(door, clock, 0.2, 5)
    short = Deadline(clock.now_s + 0.1)
    # The deadline's own clock goes on: it is far behind this one.
    with pytest.raises(DeadlineError, match="the fastest answer takes 200 ms"):
        door.require_time(_on(clock, short))
    assert door.num_hopeless == 1
    door.require_time(_on(clock, Deadline(clock.now_s + 0.3)))
    clock.now_s += 2
    door.require_time(_on(clock, Deadline(clock.now_s + 0.1)))


def _on(clock: Clock, deadline: Deadline) -> Deadline:
    """The same time left, on the clock that deadlines use."""
    return Deadline.after(deadline.at_s - clock.now_s)


def test_queries_of_streams_wait_the_important_ones_first_and_hand_their_place_on() -> None:
    async def check() -> None:
        door = Admission(max_in_flight=2, target_s=0.1)
        order: list[str] = []

        async def wait(name: str, priority: Priority) -> None:
            async with door.admitted_in_turn(priority):
                order.append(name)
                await asyncio.sleep(0)

        with inside(door, Priority.CRITICAL, 2):
            waiting = {
                name: asyncio.create_task(wait(name, priority))
                for name, priority in (
                    ("shed", Priority.SHEDDABLE),
                    ("gone", Priority.CRITICAL),
                    ("first", Priority.CRITICAL),
                    ("second", Priority.CRITICAL),
                )
            }
            await asyncio.sleep(0)
            assert (door.num_queued, order) == (4, [])
            waiting["gone"].cancel()
        await asyncio.gather(*waiting.values(), return_exceptions=True)
        assert order == ["first", "second", "shed"]
        assert (door.num_queued, door.in_flight) == (0, 0)

    asyncio.run(check())


def test_a_place_given_to_one_who_was_cancelled_is_not_lost() -> None:
    async def check() -> None:
        door = Admission(max_in_flight=1, target_s=0.1)

        async def wait() -> None:
            async with door.admitted_in_turn(Priority.CRITICAL):
                pass

        with inside(door, Priority.CRITICAL, 1):
            task = asyncio.create_task(wait())
            await asyncio.sleep(0)
        # It has its place, but has not run yet.
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert (door.num_queued, door.in_flight) == (0, 0)

    asyncio.run(check())


def test_priorities_are_read_from_the_metadata() -> None:
    assert priority_of(None) is Priority.DEFAULT
    assert priority_of([("other", "x")], otherwise=Priority.SHEDDABLE) is Priority.SHEDDABLE
    assert priority_of([(PRIORITY_KEY, "critical")]) is Priority.CRITICAL
    with pytest.raises(InvalidInputError, match="metadata twotower-priority: 'vital' is none of critical, default"):
        priority_of([(PRIORITY_KEY, "vital")])


async def fill(system: System, count: int) -> list[asyncio.Task[Any]]:
    """So many calls that stay inside."""
    for shard in system.shards:
        shard.delay_s = 10 * PATIENCE_S
    blockers = [asyncio.create_task(system.retrieve(FEATURES, timeout=10 * PATIENCE_S)) for _ in range(count)]
    await until(system.status, lambda status: status.admission.in_flight == count)
    return blockers


async def release(system: System, blockers: list[asyncio.Task[Any]]) -> None:
    for shard in system.shards:
        shard.delay_s = 0.0
    for blocker in blockers:
        blocker.cancel()
    await asyncio.gather(*blockers, return_exceptions=True)
    await until(system.status, lambda status: status.admission.in_flight == 0)


def rejected(status: Any) -> dict[str, int]:
    return {entry.priority: entry.num_requests for entry in status.admission.rejected}


def test_a_full_service_refuses_at_the_door_and_answers_the_critical(world: World, models: dict[int, ToyModel]) -> None:
    async def check() -> None:
        async with running(world, models, max_in_flight=4) as system:
            blockers = await fill(system, 3)
            request = query_service_pb2.RetrieveRequest(query=query_of(FEATURES), k=5)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await system.stub.Retrieve(request, timeout=PATIENCE_S)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "as many as default requests may find" in (caught.value.details() or "")
            [(key, pause_ms)] = caught.value.trailing_metadata() or ()
            assert (key, 0 < int(pause_ms) < 5000) == ("grpc-retry-pushback-ms", True)
            batch = query_service_pb2.BatchRetrieveRequest(queries=[query_of(FEATURES)] * 2, k=5)
            assert (await status_code(system.stub.BatchRetrieve(batch)))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
            unknown = system.stub.Retrieve(request, metadata=((PRIORITY_KEY, "vital"),))
            code, details = await status_code(unknown)
            assert (code, "twotower-priority" in details) == (grpc.StatusCode.INVALID_ARGUMENT, True)
            for shard in system.shards:
                shard.delay_s = 0.0
            critical = await system.stub.Retrieve(
                request, timeout=PATIENCE_S, metadata=((PRIORITY_KEY, Priority.CRITICAL.value),)
            )
            assert_exact(critical, models[1], FEATURES, 5)
            assert rejected(await system.status()) == {"critical": 0, "default": 2, "sheddable": 0}
            await release(system, blockers)
            assert_exact(await system.retrieve(FEATURES), models[1], FEATURES)

    asyncio.run(check())


def test_a_stream_waits_for_room_and_takes_no_more_than_its_share(world: World, models: dict[int, ToyModel]) -> None:
    async def requests() -> AsyncIterator[query_service_pb2.StreamRetrieveRequest]:
        for _ in range(20):
            retrieve = query_service_pb2.RetrieveRequest(query=query_of(FEATURES), k=5)
            yield query_service_pb2.StreamRetrieveRequest(retrieve=retrieve)

    async def check() -> None:
        async with running(world, models, max_in_flight=2) as system:
            blockers = await fill(system, 1)
            stream = system.stub.StreamRetrieve(requests(), timeout=PATIENCE_S)
            answers = asyncio.create_task(_all(stream))
            await until(system.status, lambda status: status.admission.queued == 20)
            await release(system, blockers)
            for answer in await answers:
                assert_exact(answer.retrieved, models[1], FEATURES, 5)
            assert rejected(await system.status()) == {"critical": 0, "default": 0, "sheddable": 0}

    async def _all(stream: Any) -> list[Any]:
        return [answer async for answer in stream]

    asyncio.run(check())


def test_clients_come_again_when_they_are_told_and_what_may_be_shed_does_not(
    world: World, models: dict[int, ToyModel]
) -> None:
    async def check() -> None:
        async with running(world, models, max_in_flight=1, target_latency_s=0.5) as system:
            blockers = await fill(system, 1)
            async with (
                AsyncRetrievalClient(system.address, timeout_s=PATIENCE_S) as plain,
                AsyncRetrievalClient(system.address, timeout_s=PATIENCE_S, priority="sheddable") as modest,
            ):
                with pytest.raises(OverloadedError):
                    await modest.retrieve(FEATURES, 5)
                assert rejected(await system.status())["sheddable"] == 1
                blocking = RetrievalClient(system.address, timeout_s=PATIENCE_S, priority="sheddable")
                with blocking, pytest.raises(OverloadedError):
                    await asyncio.to_thread(blocking.retrieve, FEATURES, 5)
                assert rejected(await system.status())["sheddable"] == 2
                again = asyncio.create_task(plain.retrieve(FEATURES, 5))
                await until(system.status, lambda status: rejected(status)["default"] == 1)
                await release(system, blockers)
                assert isinstance(await again, Retrieval)
                assert rejected(await system.status())["default"] == 1

    asyncio.run(check())


def test_clients_refuse_a_priority_that_there_is_not() -> None:
    with pytest.raises(ValueError, match="priority = 'vital': give one of critical, default, sheddable, or None"):
        RetrievalClient("127.0.0.1:1", priority="vital")  # type: ignore[arg-type]


def test_a_shard_that_stalls_is_not_taken_for_overload(world: World, models: dict[int, ToyModel]) -> None:
    async def check() -> None:
        async with running(world, models, target_latency_s=0.01) as system:
            system.shards[0].delay_s = 10 * PATIENCE_S
            for _ in range(2):
                answers = await asyncio.gather(*(system.retrieve(FEATURES, timeout=1.0) for _ in range(8)))
                assert all(answer.degraded_reasons for answer in answers)
            assert (await system.status()).admission.limit == 1024

    asyncio.run(check())
