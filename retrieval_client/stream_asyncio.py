"""A stream of queries for asyncio: lazily taken, answered in order, gone on with where a stream breaks off.

Deliberately does not know what is asked.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

import grpc
from retrieval.query.v1 import query_service_pb2

from retrieval_client.answers import Retrieval, outcome_of
from retrieval_client.backlog import ENDED_EARLY, Backlog
from retrieval_client.errors import RetrievalError, error_of, is_worth_another_stream

_BROKEN_OFF = "Internal error from Core"
"""What grpc.aio says, with INTERNAL, where a stream ends while a query is being written, whatever its status."""

_Request = query_service_pb2.StreamRetrieveRequest


class _Call(Protocol):
    def __aiter__(self) -> AsyncIterator[query_service_pb2.StreamRetrieveResponse]: ...
    def cancel(self) -> Any: ...


class AsyncStream:
    """Answers to queries that come from an iterator, which a task of its own reads."""

    def __init__(self, start: Callable[[AsyncIterator[_Request]], _Call], requests: AsyncIterator[_Request]) -> None:
        """Nothing is asked yet.

        Args:
            start: Starts a call with the requests it is to send.
            requests: All of them.
        """
        self._start = start
        self._source = requests
        self._backlog: Backlog[_Request] = Backlog()
        self._changed = asyncio.Condition()

    async def outcomes(self) -> AsyncIterator[Retrieval | RetrievalError]:
        """One for each query, in order; ends the call when it is left early."""
        taking = asyncio.create_task(self._take_all())
        try:
            while not self._backlog.is_done:
                async for outcome in self._of_one_call():
                    yield outcome
            await taking
        finally:
            taking.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await taking

    async def _of_one_call(self) -> AsyncIterator[Retrieval | RetrievalError]:
        call = self._start(self._requests(self._backlog.first))
        try:
            async for response in call:
                async with self._changed:
                    self._backlog.answered()
                    self._changed.notify_all()
                yield outcome_of(response)
            if not self._backlog.is_done:
                raise error_of(grpc.StatusCode.INTERNAL, ENDED_EARLY)
        except grpc.aio.AioRpcError as error:
            is_broken_off = error.code() is grpc.StatusCode.INTERNAL and error.details() == _BROKEN_OFF
            code = grpc.StatusCode.UNAVAILABLE if is_broken_off else error.code()
            pause_s = self._backlog.pause_s() if is_worth_another_stream(code) else None
            if pause_s is None:
                raise error_of(code, error.details()) from error
            await asyncio.sleep(pause_s)
        finally:
            call.cancel()

    async def _requests(self, number: int) -> AsyncIterator[_Request]:
        backlog = self._backlog
        while True:
            async with self._changed:
                await self._changed.wait_for(partial(self._is_known, number))
                if number >= backlog.end:
                    return
                request = backlog.request(number)
            yield request
            number += 1

    def _is_known(self, number: int) -> bool:
        return number < self._backlog.end or self._backlog.is_complete

    async def _take_all(self) -> None:
        """A query that cannot be sent ends the stream after those before it."""
        try:
            async for request in self._source:
                async with self._changed:
                    await self._changed.wait_for(lambda: self._backlog.has_room)
                    self._backlog.take(request)
                    self._changed.notify_all()
        finally:
            self._backlog.is_complete = True
            async with self._changed:
                self._changed.notify_all()
