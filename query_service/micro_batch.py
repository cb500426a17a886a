"""Requests that ask alike, answered together: the busier the service, the more of them.

Deliberately does not know what is asked nor how it is answered.
"""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from query_service.deadline import Deadline
from query_service.traffic import Latencies
from towers.errors import DeadlineError

_WINDOW = 2.0
"""Times that a batch usually takes: the longest that a request waits for others."""
_SMOOTHING = 0.1
"""Weight of the newest observation."""
_PATIENCE_STEP = 1.1
"""Requests whose times differ by more are not answered together: the part of a deadline that is kept for merging is
larger, so that where a shard stalls the least patient member too gets what the others found."""
_SHORTEST_S = 1e-3
_WAITING_SHARE = 0.02
"""The same, of the request's own time."""

_Asked = TypeVar("_Asked")
_Answered = TypeVar("_Answered")


@dataclass
class BatchCounts:
    """What became of the requests so far."""

    num_batches: int = 0
    num_requests: int = 0
    largest: int = 0
    """Requests of the largest batch."""
    waits: Latencies = field(default_factory=Latencies)
    """From a request's arrival to the start of its batch."""


@dataclass(eq=False)
class _Member(Generic[_Asked, _Answered]):
    asked: _Asked
    deadline: Deadline
    answered: asyncio.Future[_Answered | Exception]
    arrived_s: float


class _Kind(Generic[_Asked, _Answered]):
    """Requests that ask alike, and the batches of them that are in flight; forgotten when there are none."""

    def __init__(self) -> None:
        self.num_present = 0
        """Requests that wait or are in flight."""
        self.usually_present = 0.0
        """That a request finds."""
        self.usual_s = 0.0
        """Of a batch."""
        self.waiting: list[_Member[_Asked, _Answered]] = []
        self.timer: asyncio.TimerHandle | None = None


class MicroBatches(Generic[_Asked, _Answered]):
    """Answers requests together.

    1. A request that finds no other of its kind is answered at once.
    2. Others wait until as many are together as a request usually finds here, for no longer than two batches usually
       take, nor than a fiftieth of their own time.
    3. A batch has the deadline of its most patient member; every member gives up at its own.
    4. What one member is refused for does not touch the others.
    5. A member that is cancelled leaves; a batch that all have left is cancelled.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[_Asked], Deadline], Awaitable[Sequence[_Answered | Exception]]],
        max_size: int,
    ) -> None:
        """Nothing waits yet.

        Args:
            answer: Answers requests that ask alike, each with an answer or the reason why it gets none; raises what
                all of them fail for.
            max_size: Requests of one batch; 1: each is answered by itself.
        """
        self._answer = answer
        self._max_size = max_size
        self._kinds: dict[Hashable, _Kind[_Asked, _Answered]] = {}
        self._batches: set[asyncio.Task[None]] = set()
        self.counts = BatchCounts()

    async def ask(self, kind: Hashable, asked: _Asked, deadline: Deadline) -> _Answered:
        """Has a request answered, with others of its kind where it must wait anyway.

        Args:
            kind: Requests of equal kinds ask alike; those of very different deadlines do not go together either.
            asked: The request.
            deadline: When it gives up.

        Raises:
            DeadlineError: the deadline passed.
        """
        remaining_s = max(deadline.remaining_s(), _SHORTEST_S)
        kind = (kind, int(math.log(remaining_s / _SHORTEST_S, _PATIENCE_STEP)))
        alike = self._kinds.setdefault(kind, _Kind())
        alike.usually_present += _SMOOTHING * (alike.num_present - alike.usually_present)
        is_alone = not alike.num_present
        alike.num_present += 1
        try:
            if is_alone or self._max_size == 1:
                # With nothing to wait for there is no need of a task either.
                with self._counted(alike, [time.monotonic()]):
                    [answered] = await self._answer([asked], deadline)
            else:
                answered = await self._with_others(alike, asked, deadline)
        finally:
            alike.num_present -= 1
            if not alike.num_present:
                self._kinds.pop(kind, None)
        if isinstance(answered, Exception):
            raise answered
        return answered

    async def close(self) -> None:
        """Drops what is under way."""
        for batch in self._batches:
            batch.cancel()
        await asyncio.gather(*self._batches, return_exceptions=True)

    async def _with_others(
        self, alike: _Kind[_Asked, _Answered], asked: _Asked, deadline: Deadline
    ) -> _Answered | Exception:
        loop, remaining_s = asyncio.get_running_loop(), deadline.remaining_s()
        member: _Member[_Asked, _Answered] = _Member(asked, deadline, loop.create_future(), time.monotonic())
        alike.waiting.append(member)
        if len(alike.waiting) >= min(alike.usually_present, self._max_size):
            self._start(alike)
        elif alike.timer is None:
            patience_s = min(_WINDOW * alike.usual_s, _WAITING_SHARE * remaining_s)
            alike.timer = loop.call_later(patience_s, self._start, alike)
        try:
            async with asyncio.timeout(remaining_s):
                return await member.answered
        except TimeoutError:
            raise DeadlineError("the deadline passed before the shards had answered") from None

    def _start(self, alike: _Kind[_Asked, _Answered]) -> None:
        """Answers those that wait, save who has left, together."""
        if alike.timer:
            alike.timer.cancel()
            alike.timer = None
        members = [member for member in alike.waiting if not member.answered.done()]
        alike.waiting = []
        if members:
            batch = asyncio.create_task(self._answer_together(alike, members))
            self._batches.add(batch)
            batch.add_done_callback(self._batches.discard)
            for member in members:
                member.answered.add_done_callback(lambda _: _cancel_if_left(batch, members))

    async def _answer_together(
        self, alike: _Kind[_Asked, _Answered], members: Sequence[_Member[_Asked, _Answered]]
    ) -> None:
        deadline = max((member.deadline for member in members), key=lambda deadline: deadline.at_s)
        outcomes: Sequence[_Answered | Exception]
        try:
            with self._counted(alike, [member.arrived_s for member in members]):
                outcomes = await self._answer([member.asked for member in members], deadline)
        except Exception as error:
            outcomes = [error] * len(members)
        for member, outcome in zip(members, outcomes, strict=True):
            if not member.answered.done():
                member.answered.set_result(outcome)

    @contextmanager
    def _counted(self, alike: _Kind[_Asked, _Answered], arrivals_s: Sequence[float]) -> Iterator[None]:
        """Counts a batch and learns how long it takes."""
        start_s = time.monotonic()
        self.counts.num_batches += 1
        self.counts.num_requests += len(arrivals_s)
        self.counts.largest = max(self.counts.largest, len(arrivals_s))
        for arrived_s in arrivals_s:
            self.counts.waits.add(start_s - arrived_s)
        yield
        seconds = time.monotonic() - start_s
        alike.usual_s += (_SMOOTHING if alike.usual_s else 1.0) * (seconds - alike.usual_s)


def _cancel_if_left(batch: asyncio.Task[None], members: Sequence[_Member[_Asked, _Answered]]) -> None:
    if all(member.answered.cancelled() for member in members):
        batch.cancel()
