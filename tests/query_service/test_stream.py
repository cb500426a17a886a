"""Streams of queries: order, errors of one query, back-pressure, promotion, cancelling and draining in the middle."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import grpc
import pytest
from query_system import PATIENCE_S, System, World, assert_exact, query_of, running, status_code, until
from retrieval.query.v1 import query_service_pb2, query_service_pb2_grpc
from toy_checkpoint import ToyModel

from query_service.serve import serving
from query_service.settings import QuerySettings
from query_service.stream import answer_stream
from retrieval_client import AsyncRetrievalClient, Retrieval
from towers.errors import NotReadyError

ROOM = 8


def request_of(number: int, **fields: Any) -> query_service_pb2.StreamRetrieveRequest:
    retrieve = query_service_pb2.RetrieveRequest(query=query_of(features_of(number)), **{"k": 5, **fields})
    return query_service_pb2.StreamRetrieveRequest(retrieve=retrieve)


def features_of(number: int) -> dict[str, Any]:
    return {"user_id": str(number % 7 + 1), "history": [str(number % 40 + 1)]}


async def requests(count: int) -> AsyncIterator[query_service_pb2.StreamRetrieveRequest]:
    for number in range(count):
        yield request_of(number)


def test_each_query_is_answered_in_order_with_its_own_k_and_exclusions(
    world: World, models: dict[int, ToyModel]
) -> None:
    async def ask() -> AsyncIterator[query_service_pb2.StreamRetrieveRequest]:
        for number in range(100):
            yield request_of(number, k=number % 4 + 1, excluded_item_ids=[str(number % 40 + 1)])

    async def check() -> None:
        async with running(world, models, max_stream_queries=ROOM) as system:
            answers = [answer async for answer in system.stub.StreamRetrieve(ask(), timeout=PATIENCE_S)]
            assert [answer.index for answer in answers] == list(range(100))
            for number, answer in enumerate(answers):
                allowed = [item for item in models[1].item_ids if item != str(number % 40 + 1)]
                assert_exact(answer.retrieved, models[1], features_of(number), number % 4 + 1, allowed)
                assert answer.retrieved.checkpoint_version == 1

    asyncio.run(check())


def test_a_query_that_fails_fails_alone(world: World, models: dict[int, ToyModel]) -> None:
    async def ask() -> AsyncIterator[query_service_pb2.StreamRetrieveRequest]:
        yield request_of(0)
        yield request_of(1, k=0)
        yield query_service_pb2.StreamRetrieveRequest()
        unknown = query_service_pb2.RetrieveRequest(query=query_of({"age": 3.0}), k=1)
        yield query_service_pb2.StreamRetrieveRequest(retrieve=unknown)
        yield request_of(4)

    async def check() -> None:
        async with running(world, models) as system:
            answers = [answer async for answer in system.stub.StreamRetrieve(ask(), timeout=PATIENCE_S)]
            assert [answer.WhichOneof("outcome") for answer in answers] == [
                *("retrieved", "error", "error", "error", "retrieved")
            ]
            invalid = grpc.StatusCode.INVALID_ARGUMENT.value[0]
            assert [answer.error.code for answer in answers[1:4]] == [invalid] * 3
            assert "k must be from 1" in answers[1].error.message
            assert "retrieve is not set" in answers[2].error.message
            assert "'age'" in answers[3].error.message
            assert_exact(answers[4].retrieved, models[1], features_of(4), 5)

    asyncio.run(check())


def test_a_shard_that_is_gone_fails_queries_and_not_the_stream(world: World, models: dict[int, ToyModel]) -> None:
    async def check() -> None:
        async with running(world, models, layouts=(1,), default_timeout_s=0.3) as system:
            [shard] = system.shards
            call = system.stub.StreamRetrieve(timeout=PATIENCE_S)
            shard.delay_s = PATIENCE_S
            await call.write(request_of(0))
            late = await call.read()
            assert late.error.code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0], "of one query, not of the stream"
            shard.delay_s = 0.0
            await call.write(request_of(1))
            assert_exact((await call.read()).retrieved, models[1], features_of(1), 5)
            await call.done_writing()
            assert await call.read() is grpc.aio.EOF

    asyncio.run(check())


def test_versions_change_in_the_middle_and_every_answer_says_which(world: World, models: dict[int, ToyModel]) -> None:
    async def check() -> None:
        async with running(world, models) as system:
            call = system.stub.StreamRetrieve(timeout=PATIENCE_S)
            versions = []
            while not versions or versions[-1] == 1:
                await call.write(request_of(len(versions)))
                answer = (await call.read()).retrieved
                assert_exact(answer, models[answer.checkpoint_version], features_of(len(versions)), 5)
                versions.append(answer.checkpoint_version)
                if len(versions) == 5:
                    world.deploy(live=2, standby=1)
            assert versions[:5] == [1] * 5
            assert versions[-1] == 2
            await call.done_writing()
            assert await call.read() is grpc.aio.EOF

    asyncio.run(check())


def test_a_stream_that_is_cancelled_leaves_nothing_behind(world: World, models: dict[int, ToyModel]) -> None:
    async def check() -> None:
        async with running(world, models, max_stream_queries=ROOM, default_timeout_s=PATIENCE_S) as system:
            for shard in system.shards:
                shard.delay_s = PATIENCE_S
            before = len(asyncio.all_tasks())
            call = system.stub.StreamRetrieve(requests(3), timeout=PATIENCE_S)
            await until(_calls_of(system), lambda num_calls: num_calls >= 2)
            call.cancel()
            await until(_num_tasks, lambda num_tasks: num_tasks <= before)
            assert sum(shard.num_cancelled for shard in system.shards) == sum(s.num_calls for s in system.shards)

    asyncio.run(check())


def test_a_stream_ends_with_the_drain_after_what_it_has_read(world: World, models: dict[int, ToyModel]) -> None:
    async def ask(address: str, has_begun: asyncio.Event) -> tuple[list[int], tuple[grpc.StatusCode, str]]:
        async with grpc.aio.insecure_channel(address) as channel:
            call = query_service_pb2_grpc.QueryServiceStub(channel).StreamRetrieve(timeout=PATIENCE_S)
            for number in range(3):
                await call.write(request_of(number))
            indexes = [(await call.read()).index for _ in range(3)]
            has_begun.set()
            # The caller never ends the stream.
            return indexes, await status_code(call.read())

    async def check() -> None:
        async with running(world, models, grace_s=PATIENCE_S) as system:
            has_begun = asyncio.Event()
            caller = asyncio.create_task(ask(system.address, has_begun))
            await has_begun.wait()
        # The process has drained.
        indexes, (status, message) = await caller
        assert indexes == [0, 1, 2]
        assert status is grpc.StatusCode.UNAVAILABLE
        assert message == "this replica is draining; ask the queries that have no answer again, elsewhere"

    asyncio.run(check())


def test_a_replica_without_a_version_ends_the_stream(empty_world: World) -> None:
    async def check() -> None:
        async with running(empty_world, {}) as system:
            call = system.stub.StreamRetrieve(timeout=PATIENCE_S)
            await call.write(request_of(0))
            status, message = await status_code(call.read())
            assert status is grpc.StatusCode.UNAVAILABLE
            assert "no checkpoint version is loaded yet" in message

    asyncio.run(check())


def test_a_client_loses_no_answer_when_the_service_restarts(world: World, models: dict[int, ToyModel]) -> None:
    count = 300

    async def ask(client: AsyncRetrievalClient, answered: list[Any]) -> None:
        queries = (features_of(number) for number in range(count))
        async for outcome in client.stream_retrieve(queries, 3):
            answered.append(outcome)  # noqa: PERF401  Each is seen when it comes.

    async def check() -> None:
        async with running(world, models) as system:
            addresses = [[shard.address] for shard in system.shards]
            settings = {"store": world.store.url, "shards": [addresses], "redis_url": "", "drain_s": 0.0}
            answered: list[Any] = []
            async with AsyncExitStack() as stack:
                first = await stack.enter_async_context(AsyncExitStack())
                port = await first.enter_async_context(serving(QuerySettings(address="127.0.0.1:0", **settings)))
                client = await stack.enter_async_context(AsyncRetrievalClient(f"127.0.0.1:{port}"))
                await until(client.get_status, lambda status: status.live_version == 1)
                for shard in system.shards:
                    shard.delay_s = 0.05
                asking = asyncio.create_task(ask(client, answered))
                await until(_number_of(answered), lambda number: number > 0)
                await first.aclose()
                assert len(answered) < count
                for shard in system.shards:
                    shard.delay_s = 0.0
                again = QuerySettings(address=f"127.0.0.1:{port}", **settings)
                await stack.enter_async_context(serving(again))
                await asking
            for number, outcome in enumerate(answered):
                assert isinstance(outcome, Retrieval), outcome
                item_ids, _ = models[1].nearest(features_of(number), models[1].item_ids, 3)
                assert [item.item_id for item in outcome.items] == item_ids
            assert len(answered) == count

    asyncio.run(check())


def test_no_more_is_read_than_there_is_room_for() -> None:
    async def check() -> None:
        num_read = 0
        may_write = asyncio.Semaphore(0)
        written: list[int] = []

        async def queries() -> AsyncIterator[int]:
            nonlocal num_read
            for number in range(20):
                num_read += 1
                yield number

        async def answer(position: int, query: int) -> int:
            # The later ones are ready first.
            await asyncio.sleep(0.001 * (20 - query))
            assert position == query
            return query

        async def write(value: int) -> None:
            await may_write.acquire()
            written.append(value)

        stream = asyncio.create_task(answer_stream(queries(), answer, write, 4, asyncio.Event()))
        await asyncio.sleep(0.05)
        assert num_read == 4, "whoever takes no answer is asked for no query"
        may_write.release()
        await asyncio.sleep(0.05)
        assert (num_read, written) == (5, [0])
        for _ in range(19):
            may_write.release()
        await stream
        assert (num_read, written) == (20, list(range(20)))

    asyncio.run(check())


def test_a_drain_answers_what_was_read_and_a_failing_stream_fails() -> None:
    async def check() -> None:
        written: list[int] = []
        draining = asyncio.Event()

        async def queries() -> AsyncIterator[int]:
            yield 0
            yield 1
            await asyncio.Event().wait()

        async def answer(position: int, query: int) -> int:
            await asyncio.sleep(0.01)
            return query

        async def write(value: int) -> None:
            written.append(value)

        stream = asyncio.create_task(answer_stream(queries(), answer, write, 4, draining))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        draining.set()
        with pytest.raises(NotReadyError, match="draining"):
            await stream
        assert written == [0, 1]

        async def broken() -> AsyncIterator[int]:
            yield 2
            raise ConnectionError("gone")

        with pytest.raises(ConnectionError):
            await answer_stream(broken(), answer, write, 4, asyncio.Event())
        assert written == [0, 1, 2]

    asyncio.run(check())


def _calls_of(system: System) -> Any:
    async def num_calls() -> int:
        return sum(shard.num_calls for shard in system.shards)

    return num_calls


def _number_of(answered: list[Any]) -> Any:
    async def number() -> int:
        return len(answered)

    return number


async def _num_tasks() -> int:
    return len(asyncio.all_tasks())
