"""Streams of both clients against a real gRPC server: order, errors, replicas that go, pace, leaving early."""

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import grpc
import pytest
from retrieval.query.v1 import query_service_pb2
from scripted_service import ScriptedService, empty

from retrieval_client import (
    AsyncRetrievalClient,
    InvalidRequestError,
    Retrieval,
    RetrievalClient,
    RetrievalError,
    StreamedQuery,
    UnavailableError,
)
from retrieval_client.backlog import MAX_FAILURES, MAX_UNANSWERED

PATIENCE_S = 30.0
Answered = list[Retrieval | RetrievalError]


def stream_sync(address: str, queries: Any, count: int | None, **fields: Any) -> Answered:
    with RetrievalClient(address) as client:
        outcomes = client.stream_retrieve(queries, **fields)
        answered = list(itertools.islice(outcomes, count))
        outcomes.close()  # type: ignore[attr-defined]
        return answered


def stream_async(address: str, queries: Any, count: int | None, **fields: Any) -> Answered:
    async def ask() -> Answered:
        async with AsyncRetrievalClient(address) as client:
            answered: Answered = []
            outcomes = client.stream_retrieve(queries, **fields)
            async for outcome in outcomes:
                answered.append(outcome)
                if len(answered) == count:
                    break
            await outcomes.aclose()  # type: ignore[attr-defined]
            return answered

    return asyncio.run(ask())


@pytest.fixture(params=[stream_sync, stream_async], ids=["sync", "async"])
def stream(request: pytest.FixtureRequest) -> Callable[..., Answered]:
    function: Callable[..., Answered] = request.param
    return function


def answer_to(index: int, request: Any) -> Any:
    """An item named like the query's user."""
    user_id = request.retrieve.query.features["user_id"].string_value
    retrieved = query_service_pb2.RetrieveResponse(item_ids=[user_id], scores=[1.0], checkpoint_version=index // 2 + 1)
    return query_service_pb2.StreamRetrieveResponse(index=index, retrieved=retrieved)


def users(count: int) -> list[dict[str, Any]]:
    return [{"user_id": str(number)} for number in range(count)]


def ids_of(answered: Answered) -> list[str]:
    return [answer.items[0].item_id for answer in answered if isinstance(answer, Retrieval)]


def test_answers_come_in_order_and_a_query_fails_alone(stream: Callable[..., Answered]) -> None:
    seen = []

    def script(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        for index, request in enumerate(requests):
            seen.append(request.retrieve)
            if index == 1:
                error = query_service_pb2.QueryError(code=3, message="unknown feature 'age'")
                yield query_service_pb2.StreamRetrieveResponse(index=1, error=error)
            else:
                yield answer_to(index, request)

    with ScriptedService(empty) as service:
        service.stream_script = script
        queries = [{"user_id": "0"}, StreamedQuery({"age": 3}, ["7"]), {"user_id": "2"}]
        answered = stream(service.address, queries, None, k=4, excluded_item_ids=["1"], attribute_names=["title"])
    assert ids_of(answered) == ["0", "2"]
    assert isinstance(answered[1], InvalidRequestError)
    assert answered[1].message == "unknown feature 'age'"
    assert [list(request.excluded_item_ids) for request in seen] == [["1"], ["1", "7"], ["1"]]
    assert {(request.k, *request.attribute_names) for request in seen} == {(4, "title")}
    assert [answer.checkpoint_version for answer in answered if isinstance(answer, Retrieval)] == [1, 2]


def test_an_empty_list_has_no_answers(stream: Callable[..., Answered]) -> None:
    with ScriptedService(empty) as service:
        assert stream(service.address, [], None) == []


def test_a_stream_goes_on_where_it_broke_off(stream: Callable[..., Answered], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retrieval_client.backlog._FIRST_PAUSE_S", 0.001)
    seen: list[list[str]] = []

    def script(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        seen.append([])
        for index, request in enumerate(requests):
            seen[-1].append(request.retrieve.query.features["user_id"].string_value)
            if index == 3:
                context.abort(grpc.StatusCode.UNAVAILABLE, "draining")
            yield answer_to(index, request)

    with ScriptedService(empty) as service:
        service.stream_script = script
        assert ids_of(stream(service.address, iter(users(10)), None)) == [str(number) for number in range(10)]
    assert [call[0] for call in seen] == ["0", "3", "6", "9"]


def test_a_service_that_never_answers_is_given_up(
    stream: Callable[..., Answered], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retrieval_client.backlog._FIRST_PAUSE_S", 0.001)
    num_calls = 0

    def script(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        nonlocal num_calls
        num_calls += 1
        next(requests)
        context.abort(grpc.StatusCode.UNAVAILABLE, "no shard")
        yield

    with ScriptedService(empty) as service:
        service.stream_script = script
        with pytest.raises(UnavailableError):
            stream(service.address, users(2), None)
    assert num_calls >= MAX_FAILURES


@pytest.mark.parametrize("status", [grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OK])
def test_a_stream_that_ends_otherwise_fails(stream: Callable[..., Answered], status: grpc.StatusCode) -> None:
    def script(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        first = next(requests)
        if status is grpc.StatusCode.OK:
            yield answer_to(0, first)
        if status is not grpc.StatusCode.OK:
            context.abort(status, "what is wrong")

    with ScriptedService(empty) as service:
        service.stream_script = script
        with pytest.raises(RetrievalError, match=r"what is wrong|ended the stream before"):
            stream(service.address, users(1) if status is not grpc.StatusCode.OK else users(3), None)


def test_queries_are_taken_no_faster_than_answers_come(stream: Callable[..., Answered]) -> None:
    taken = 0
    is_cancelled = threading.Event()

    def endless() -> Iterator[dict[str, Any]]:
        nonlocal taken
        while True:
            taken += 1
            yield {"user_id": str(taken)}

    def script(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        context.add_callback(is_cancelled.set)
        for index, request in enumerate(itertools.islice(requests, 5)):
            yield answer_to(index, request)
        is_cancelled.wait(PATIENCE_S)

    with ScriptedService(empty) as service:
        service.stream_script = script
        assert ids_of(stream(service.address, endless(), 5)) == ["1", "2", "3", "4", "5"]
        assert is_cancelled.wait(PATIENCE_S), "leaving early ends the call"
    assert taken <= 5 + MAX_UNANSWERED + 1


def test_what_cannot_be_sent_is_said_after_the_answers_before_it(stream: Callable[..., Answered]) -> None:
    def script(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        for index, request in enumerate(requests):
            seen.append(index)
            yield answer_to(index, request)

    seen: list[int] = []
    with ScriptedService(empty) as service:
        service.stream_script = script
        with pytest.raises(TypeError, match="query 3: feature 'age'"):
            stream(service.address, [*users(3), {"age": object()}, *users(1)], None)
    assert seen == [0, 1, 2]


def test_queries_may_depend_on_answers() -> None:
    """Answers come while the next query is not there yet, from the same thread or from a task."""

    def script(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        for index, request in enumerate(requests):
            yield answer_to(index, request)

    def chain(has_answer: threading.Semaphore) -> Iterator[dict[str, Any]]:
        for number in range(5):
            yield {"user_id": str(number)}
            assert has_answer.acquire(timeout=PATIENCE_S)

    async def async_chain(has_answer: asyncio.Semaphore) -> AsyncIterator[dict[str, Any]]:
        for number in range(5):
            yield {"user_id": str(number)}
            await has_answer.acquire()

    async def ask() -> int:
        has_answer = asyncio.Semaphore(0)
        async with AsyncRetrievalClient(service.address) as client:
            count = 0
            async for _ in client.stream_retrieve(async_chain(has_answer)):
                count += 1
                has_answer.release()
            return count

    with ScriptedService(empty) as service:
        service.stream_script = script
        has_answer = threading.Semaphore(0)
        with RetrievalClient(service.address) as client:
            count = 0
            for _ in client.stream_retrieve(chain(has_answer)):
                count += 1
                has_answer.release()
            assert count == 5
        assert asyncio.run(ask()) == 5
