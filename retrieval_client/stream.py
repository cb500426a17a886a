"""A stream of queries for threads: lazily taken, answered in order, gone on with where a stream breaks off.

Deliberately does not know what is asked.
"""

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

import grpc
from retrieval.query.v1 import query_service_pb2

from retrieval_client.answers import Retrieval, outcome_of
from retrieval_client.backlog import ENDED_EARLY, Backlog
from retrieval_client.errors import RetrievalError, error_of, is_worth_another_stream

_Request = query_service_pb2.StreamRetrieveRequest


class _Call(Protocol):
    def __iter__(self) -> Iterator[query_service_pb2.StreamRetrieveResponse]: ...
    def cancel(self) -> Any: ...


class Stream:
    """Answers to queries that come from an iterator, which gRPC's own thread reads."""

    def __init__(self, start: Callable[[Iterator[_Request]], _Call], requests: Iterator[_Request]) -> None:
        """Nothing is asked yet.

        Args:
            start: Starts a call with the requests it is to send.
            requests: All of them.
        """
        self._start = start
        self._source = requests
        self._backlog: Backlog[_Request] = Backlog()
        self._changed = threading.Condition()
        self._taking = threading.Lock()
        self._source_error: Exception | None = None
        self._attempt = 0

    def outcomes(self) -> Iterator[Retrieval | RetrievalError]:
        """One for each query, in order; ends the call when it is left early."""
        try:
            while not self._backlog.is_done:
                yield from self._of_one_call()
        finally:
            self._abandon()
        if self._source_error is not None:
            raise self._source_error

    def _of_one_call(self) -> Iterator[Retrieval | RetrievalError]:
        self._abandon()
        call = self._start(self._requests(self._attempt, self._backlog.first))
        try:
            for response in call:
                with self._changed:
                    self._backlog.answered()
                    self._changed.notify_all()
                yield outcome_of(response)
            if not self._backlog.is_done:
                raise error_of(grpc.StatusCode.INTERNAL, ENDED_EARLY)
        except grpc.RpcError as error:
            pause_s = self._backlog.pause_s() if is_worth_another_stream(error.code()) else None
            if pause_s is None:
                raise error_of(error.code(), error.details()) from error
            time.sleep(pause_s)
        finally:
            call.cancel()

    def _abandon(self) -> None:
        """Ends the requests of the call before."""
        with self._changed:
            self._attempt += 1
            self._changed.notify_all()

    def _requests(self, attempt: int, number: int) -> Iterator[_Request]:
        while True:
            with self._changed:
                self._changed.wait_for(partial(self._is_ready, attempt, number))
            self._take_until(number)
            with self._changed:
                if attempt != self._attempt or number >= self._backlog.end:
                    return
                request = self._backlog.request(number)
            yield request
            number += 1

    def _is_ready(self, attempt: int, number: int) -> bool:
        is_taken = number < self._backlog.end
        return attempt != self._attempt or is_taken or self._backlog.is_complete or self._backlog.has_room

    def _take_until(self, number: int) -> None:
        """Takes the query of this number, unless it is taken or there is none.

        A query that cannot be sent ends the stream after those before it.
        """
        # Not the other lock: answers come while the caller thinks about the next query.
        with self._taking:
            if number < self._backlog.end or self._backlog.is_complete:
                return
            request = None
            try:
                request = next(self._source, None)
            except Exception as error:
                self._source_error = error
            with self._changed:
                if request is None:
                    self._backlog.is_complete = True
                else:
                    self._backlog.take(request)
