"""Some shards asked at once, each through one of its replicas and, where that fails or is late, through one other.

Deliberately does not know what is asked, nor how an answer is read.
"""

import asyncio
import time
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import grpc

from query_service.deadline import Deadline
from query_service.replicas import Replica, Shard
from towers.errors import InvalidInputError

_FIRST_TRY_SHARE = 0.5
"""Of the time for a shard, where another replica is there for the rest of it."""
_TELLING = (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.RESOURCE_EXHAUSTED)
"""Statuses whose message comes from the shard and says what to do."""
_HEALED_ELSEWHERE = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.FAILED_PRECONDITION,
    # A replica that drains ends its last calls with this.
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
)
"""Statuses of one replica that say nothing of the others."""


@dataclass
class TryCounts:
    """Calls to shards so far."""

    num_calls: int = 0
    """First tries."""
    num_hedges: int = 0
    """Sent to another replica because the first one was late."""
    num_hedges_won: int = 0
    """Those that answered first."""
    num_hedges_refused: int = 0
    """Times that one was due and would have been too many."""
    num_retries: int = 0
    """Sent to another replica because the first one failed."""
    num_retries_refused: int = 0
    """Those that would have been too many."""


@dataclass(frozen=True)
class Reply:
    """A shard's answer, as it came."""

    shard: int
    replica: Replica
    response: Any


@dataclass(frozen=True)
class Failure:
    """Why a shard did not answer."""

    shard: int
    status: grpc.StatusCode
    reason: str


@dataclass(eq=False)
class _Asked:
    """A shard that has not answered yet."""

    number: int
    shard: Shard
    request: Any
    tries: list["_Try"] = field(default_factory=list)
    """Under way."""
    num_tries: int = 0
    failures: list[Failure] = field(default_factory=list)
    timer: asyncio.TimerHandle | None = None


@dataclass(eq=False)
class _Try:
    """One call to one replica."""

    asked: _Asked
    replica: Replica
    call: Any
    started_s: float
    is_hedge: bool
    is_overdue: bool = False


class Asking:
    """One question to some shards.

    1. Where a replica fails in a way that another can heal, one other is asked, within the budget of second tries.
    2. Where it has not answered after the p95 of recent answers, one other is asked beside it, within the budget of
       hedges; the first good answer counts, and the other call is cancelled.
    3. No shard is asked more than twice; a single replica is asked once.
    4. There are no tasks but those of the calls. What is under way ends with `close`.
    """

    def __init__(self, method: str, version: int, work: Hashable, end: Deadline, counts: TryCounts) -> None:
        """Nobody is asked yet.

        Args:
            method: Of the index service.
            version: The checkpoint version that the question is about.
            work: What takes about the same time is equal.
            end: When all answers must be there.
            counts: Counts the calls.
        """
        self._method = method
        self._version = version
        self._work = work
        self._end_s = end.at_s
        self._counts = counts
        self._open: set[_Asked] = set()
        self._ended: asyncio.Queue[_Try] = asyncio.Queue()

    @property
    def num_open(self) -> int:
        """Shards that have neither answered nor failed."""
        return len(self._open)

    def ask(self, number: int, shard: Shard, request: Any) -> None:
        """Asks a shard; nothing is waited for."""
        asked = _Asked(number, shard, request)
        self._open.add(asked)
        self._counts.num_calls += 1
        now_s = time.monotonic()
        replica, timeout_s = shard.first(self._version, now_s), self._end_s - now_s
        if len(shard.replicas) == 1:
            self._try(asked, replica, timeout_s, now_s)
            return
        timeout_s *= _FIRST_TRY_SHARE
        self._try(asked, replica, timeout_s, now_s)
        patience_s = shard.patience_s(self._work, self._version, now_s)
        # Later than that a hedge would come no sooner than a second try, and have less time than it usually takes.
        if patience_s is not None and patience_s < timeout_s:
            self._wait(asked, patience_s)

    async def next(self) -> Reply | Failure:
        """What comes of the shard that answers, or fails, next; one must be open.

        Raises:
            InvalidInputError: a shard refuses what the caller asked for.
        """
        while True:
            ended = await self._ended.get()
            # Else it has lost.
            if ended in ended.asked.tries:
                outcome = await self._outcome(ended)
                if outcome is not None:
                    self._open.discard(ended.asked)
                    return outcome

    def close(self) -> None:
        """Cancels what is under way."""
        for asked in self._open:
            if asked.timer:
                asked.timer.cancel()
            for each in tuple(asked.tries):
                self._leave(each)
                each.call.cancel()
        self._open.clear()

    def _try(self, asked: _Asked, replica: Replica, timeout_s: float, now_s: float, *, is_hedge: bool = False) -> None:
        call = getattr(replica.stub, self._method)(asked.request, timeout=timeout_s)
        each = _Try(asked, replica, call, now_s, is_hedge)
        asked.tries.append(each)
        asked.num_tries += 1
        call.add_done_callback(lambda _: self._ended.put_nowait(each))

    def _wait(self, asked: _Asked, patience_s: float) -> None:
        loop = asyncio.get_running_loop()
        asked.timer = loop.call_later(patience_s, self._hedge, asked, patience_s)

    def _hedge(self, asked: _Asked, patience_s: float) -> None:
        """The first replica is late."""
        [first] = asked.tries
        if first.call.done():
            return
        if not first.is_overdue:
            first.is_overdue = True
            first.replica.num_overdue += 1
        now_s = time.monotonic()
        spare = asked.shard.spare(first.replica, self._version, now_s)
        if spare is None:
            return
        if asked.shard.hedges.take(now_s):
            self._counts.num_hedges += 1
            self._try(asked, spare, self._end_s - now_s, now_s, is_hedge=True)
        else:
            self._counts.num_hedges_refused += 1
            # It asks again: calls that are very late are to have the hedges that those just late did not need.
            self._wait(asked, 2 * patience_s)

    async def _outcome(self, ended: _Try) -> Reply | Failure | None:
        """What comes of the shard; None when another replica may still answer."""
        asked, replica = ended.asked, ended.replica
        self._leave(ended)
        if asked.timer:
            asked.timer.cancel()
        try:
            response = await ended.call
        except grpc.aio.AioRpcError as error:
            asked.failures.append(self._failure(asked, replica, error))
            return None if asked.tries or self._retry(asked, replica) else _failure_of(asked)
        replica.answered()
        if len(asked.shard.replicas) > 1:
            now_s = time.monotonic()
            asked.shard.took(replica, self._work, now_s - ended.started_s, self._version, now_s)
            self._counts.num_hedges_won += ended.is_hedge
            for loser in tuple(asked.tries):
                self._leave(loser)
                loser.call.cancel()
                # A hedge that loses was asked later.
                if not loser.is_hedge:
                    asked.shard.lost(loser.replica, self._work, now_s - loser.started_s, now_s)
        return Reply(asked.number, replica, response)

    def _retry(self, asked: _Asked, failed: Replica) -> bool:
        """Asks another replica, where that makes sense and is not too much."""
        now_s = time.monotonic()
        other = asked.shard.other(failed, self._version, now_s)
        if (
            other is None
            or asked.num_tries > 1
            or asked.failures[-1].status not in _HEALED_ELSEWHERE
            or now_s >= self._end_s
        ):
            return False
        if not asked.shard.retries.take(now_s):
            self._counts.num_retries_refused += 1
            return False
        self._counts.num_retries += 1
        self._try(asked, other, self._end_s - now_s, now_s)
        return True

    def _failure(self, asked: _Asked, replica: Replica, error: grpc.aio.AioRpcError) -> Failure:
        status = error.code()
        if status is grpc.StatusCode.INVALID_ARGUMENT:
            raise InvalidInputError(error.details()) from error
        if status is grpc.StatusCode.FAILED_PRECONDITION:
            replica.lacks(self._version, time.monotonic())
        else:
            replica.failed(time.monotonic())
        detail = f": {error.details()}" if status in _TELLING else ""
        return Failure(asked.number, status, f"{name(asked.number, replica)}: {status.name}{detail}")

    @staticmethod
    def _leave(ended: _Try) -> None:
        """It is under way no longer."""
        ended.asked.tries.remove(ended)
        ended.replica.num_overdue -= ended.is_overdue


def name(number: int, replica: Replica) -> str:
    """A replica of a shard, in words."""
    return f"shard {number} ({replica.address})"


def _failure_of(asked: _Asked) -> Failure:
    """All that failed, as one."""
    *_, last = asked.failures
    # That a replica lacks the version makes the caller look at the record, whatever is wrong with the other.
    lacking = grpc.StatusCode.FAILED_PRECONDITION
    status = lacking if any(failure.status is lacking for failure in asked.failures) else last.status
    return Failure(asked.number, status, ", then ".join(failure.reason for failure in asked.failures))
