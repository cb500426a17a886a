"""Who is let in: so many queries at once, the more important ones first; the others are refused before any work.

The bound follows from how long answers take. Deliberately does not know what is asked nor how it is answered.
"""

# The generic types of grpc exist for the type checker alone.
from __future__ import annotations

import asyncio
import math
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any

import grpc

from query_service.deadline import Deadline
from towers.errors import DeadlineError, InvalidInputError, OverloadedError
from towers.rpc import refusing

PRIORITY_KEY = "twotower-priority"
"""Of the metadata of a request."""
_INTERVAL_S = 0.1
"""The bound changes no faster."""
_MIN_SAMPLES = 5
"""Answers of an interval, below which it says nothing."""
_SHRINK = 0.8
_GROW = 1.1
_LOWEST_BOUND = 64
"""Shards that are slow for another reason than load are not made up for by refusing what they can answer."""
_SLOWNESS = 2.0
"""Times that a lone answer takes: where this is longer than the target, it is what may be expected."""
_SMOOTHING = 0.1
"""Weight of the newest observation."""
_ESTIMATE_S = 1.0
"""How long the fastest answer of an interval counts as what is possible."""
_LONGEST_PUSHBACK_S = 5.0


class Priority(Enum):
    """How much a request matters, by its name in the metadata."""

    CRITICAL = "critical"
    DEFAULT = "default"
    SHEDDABLE = "sheddable"


_SHARES = {Priority.CRITICAL: 1.0, Priority.DEFAULT: 0.9, Priority.SHEDDABLE: 0.5}
"""Of the bound, that all requests together may fill for one of this priority to be let in."""


def priority_of(metadata: Iterable[tuple[str, Any]] | None, otherwise: Priority = Priority.DEFAULT) -> Priority:
    """The priority that a request names, or the other one where it names none.

    Raises:
        InvalidInputError: there is no such priority.
    """
    for key, value in metadata or ():
        if key == PRIORITY_KEY:
            try:
                return Priority(value)
            except ValueError:
                names = ", ".join(priority.value for priority in Priority)
                raise InvalidInputError(f"metadata {PRIORITY_KEY}: {value!r} is none of {names}") from None
    return otherwise


@dataclass(slots=True)
class Visit:
    """A request that was let in."""

    start_s: float
    """On the monotonic clock."""
    num_queries: int
    is_alone: bool
    """Nothing else was inside when it came."""


class Admission:
    """Lets requests in.

    1. Queries inside are never more than the bound, which never exceeds what the setting allows.
    2. Where even the least slow answer of a tenth of a second took longer than the target, requests queue: the bound
       shrinks. Where none did and somebody was refused, it grows. That the fastest tells a queue that stands from a
       burst is from CoDel (Nichols and Jacobson, "Controlling Queue Delay", 2012); steps that multiply, from TCP.
    3. A priority may fill its share of the bound. A batch counts as its queries, but fits where nothing else is inside.
    4. What the fastest recent answer would be too late for is refused too. The estimate is forgotten after a second,
       so that a wrong one heals.
    5. The queries of streams wait for room instead, the more important ones first: a stream that is not read from
       holds its caller back.
    """

    def __init__(self, max_in_flight: int, target_s: float) -> None:
        """Nobody is inside yet.

        Args:
            max_in_flight: The most that the bound may be, in queries.
            target_s: What an answer may take before requests are refused for it; twice as long as a lone one takes,
                where that is more.
        """
        self._max_in_flight = max_in_flight
        self._target_s = target_s
        self._bound = float(max_in_flight)
        self._waiting: dict[Priority, deque[asyncio.Future[None]]] = {priority: deque() for priority in Priority}
        self._alone_s: dict[int, float] = {}
        """By bits of the number of queries: a batch takes longer than a query, the more so the larger it is."""
        self._interval_start_s = time.monotonic()
        self._fastest_s = math.inf
        self._least_slow = math.inf
        """Times what an answer to so many queries may take."""
        self._num_answered = 0
        self._num_refused = 0
        self._load = 1.0
        self._estimate_s = 0.0
        self._estimate_end_s = 0.0
        self.in_flight = 0
        """Queries inside."""
        self.num_rejected = dict.fromkeys(Priority, 0)
        """Requests that found no room, by priority."""
        self.num_hopeless = 0
        """Requests that had too little time left."""

    @property
    def bound(self) -> int:
        """Most queries inside, for now."""
        return int(self._bound)

    @property
    def num_queued(self) -> int:
        """Queries of streams that wait for room."""
        return sum(map(len, self._waiting.values()))

    def has_room(self, priority: Priority, num_queries: int = 1) -> bool:
        """Whether a request would be let in now."""
        share = max(1, int(_SHARES[priority] * self._bound))
        return self.in_flight + min(num_queries, share) <= share

    @contextmanager
    def admitted(self, priority: Priority, num_queries: int, deadline: Deadline) -> Iterator[Visit]:
        """A request is inside while the block runs.

        Raises:
            OverloadedError: there is no room.
            DeadlineError: it would be too late.
        """
        self.require_time(deadline)
        if not self.has_room(priority, num_queries):
            raise self.rejection(priority, deadline.remaining_s())
        visit = Visit(time.monotonic(), num_queries, not self.in_flight)
        num_queries = min(num_queries, self.bound)
        self.in_flight += num_queries
        try:
            yield visit
        except (DeadlineError, asyncio.CancelledError):
            # Where all are late there are no answers to learn from.
            if time.monotonic() - visit.start_s > self._expected_s(visit):
                self._judge(visit)
            raise
        finally:
            self._leave(num_queries)

    @asynccontextmanager
    async def admitted_in_turn(self, priority: Priority) -> AsyncIterator[None]:
        """A query of a stream waits for room, in the order of arrival, and is inside while the block runs."""
        waiting = self._waiting[priority]
        if waiting or not self.has_room(priority):
            turn = asyncio.get_running_loop().create_future()
            waiting.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if not turn.cancelled():
                    self._leave(1)
                elif turn in waiting:
                    waiting.remove(turn)
                raise
        else:
            self.in_flight += 1
        try:
            yield
        finally:
            self._leave(1)

    def learn(self, visit: Visit) -> None:
        """Learns from how long a request took to be answered in full, just now.

        Not from others: where a shard stalls, how long an answer takes follows from its deadline, not from the load.
        """
        seconds = time.monotonic() - visit.start_s
        if visit.is_alone:
            size = visit.num_queries.bit_length()
            alone_s = self._alone_s.get(size, seconds)
            self._alone_s[size] = alone_s + _SMOOTHING * (seconds - alone_s)
        if visit.num_queries == 1:
            # A batch says nothing of how fast a query may be.
            self._fastest_s = min(self._fastest_s, seconds)
        self._judge(visit)

    def _expected_s(self, visit: Visit) -> float:
        """What an answer to so many queries may take."""
        return max(self._target_s, _SLOWNESS * self._alone_s.get(visit.num_queries.bit_length(), 0.0))

    def _judge(self, visit: Visit) -> None:
        """Moves the bound when an interval is over."""
        now_s = time.monotonic()
        self._least_slow = min(self._least_slow, (now_s - visit.start_s) / self._expected_s(visit))
        self._num_answered += 1
        if now_s < self._interval_start_s + _INTERVAL_S or self._num_answered < _MIN_SAMPLES:
            return
        if self._least_slow > 1:
            self._bound = max(min(_LOWEST_BOUND, self._max_in_flight), _SHRINK * min(self._bound, 2 * self.in_flight))
        elif self._num_refused:
            self._bound = min(self._max_in_flight, _GROW * self._bound)
        self._load = 1 + self._num_refused / self._num_answered
        if self._fastest_s < math.inf:
            self._estimate_s, self._estimate_end_s = self._fastest_s, now_s + _ESTIMATE_S
        self._interval_start_s, self._fastest_s, self._least_slow = now_s, math.inf, math.inf
        self._num_answered = self._num_refused = 0

    def require_time(self, deadline: Deadline) -> None:
        """Refuses what would be too late.

        Raises:
            DeadlineError: it has passed, or no answer has been as fast lately.
        """
        deadline.require_time()
        remaining_s = deadline.remaining_s()
        if remaining_s < self._estimate_s and time.monotonic() < self._estimate_end_s:
            self.num_hopeless += 1
            raise DeadlineError(
                f"{1000 * remaining_s:.0f} ms are left, and the fastest answer takes {1000 * self._estimate_s:.0f} ms "
                "now; give the call more time"
            )

    def rejection(self, priority: Priority, remaining_s: float) -> OverloadedError:
        """Counts a request that finds no room, and says when it may come again.

        What may be shed does not come again, nor does what would be too late then.
        """
        self.num_rejected[priority] += 1
        self._num_refused += 1
        # Spread, or all of them come at once.
        pause_s = min(_LONGEST_PUSHBACK_S, self._target_s * self._load) * random.uniform(0.5, 1.5)  # noqa: S311
        comes_again = priority is not Priority.SHEDDABLE and pause_s < remaining_s
        return OverloadedError(
            f"{self.in_flight} queries are being answered, as many as {priority.value} requests may find here",
            pushback_ms=int(1000 * pause_s) if comes_again else -1,
        )

    def _leave(self, num_queries: int) -> None:
        self.in_flight -= num_queries
        for priority, waiting in self._waiting.items():
            while waiting and self.has_room(priority):
                turn = waiting.popleft()
                if not turn.cancelled():
                    # It is inside from here on, or the next to leave would give its place away again.
                    self.in_flight += 1
                    turn.set_result(None)


class AdmissionInterceptor(grpc.aio.ServerInterceptor):
    """Refuses, before the message is read, what would find no room for a single query."""

    def __init__(self, admission: Admission, service_name: str, methods: Iterable[str]) -> None:
        """Guards some methods of a service.

        Args:
            admission: Says whether there is room.
            service_name: Full name of the service.
            methods: Names of the methods; all others pass.
        """
        self._admission = admission
        self._guarded = frozenset(f"/{service_name}/{method}" for method in methods)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Passes a call on, or refuses it."""
        if handler_call_details.method in self._guarded:
            try:
                priority = priority_of(handler_call_details.invocation_metadata)
            except InvalidInputError as caught:
                error = caught
                return refusing(lambda _: error)
            if not self._admission.has_room(priority):
                return refusing(lambda remaining_s: self._admission.rejection(priority, remaining_s))
        return await continuation(handler_call_details)
