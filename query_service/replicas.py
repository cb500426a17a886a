"""The replicas of a shard, and which of them is asked next. Moments are on the monotonic clock.

Deliberately does not know what they are asked, nor what time it is.
"""

from collections.abc import Hashable, Iterator, Sequence
from typing import Any

from query_service.budget import Budget
from query_service.pace import Pace

_FAILED_PAUSES_S = (0.5, 4.0)
"""The first and the longest."""
_SLOW_PAUSES_S = (1.0, 32.0)
_LACKING_PAUSE_S = 1.0
_HEDGES_PER_CALL = 0.05
_RETRIES_PER_CALL = 0.2
_LEAST_RETRIES = 10
"""With no calls before them: a lone failure is always tried again."""
_LATE = 2.0
"""Times a sibling's p95."""
_LATE_IN_A_ROW = 5
"""Answers after which a replica is slow; one that answers as others do is late that often once in millions."""


class _Rest:
    """Pauses that grow as long as their cause lasts; after each of them one request sees whether it does."""

    def __init__(self, first_s: float, longest_s: float) -> None:
        self.is_on = False
        """Whether the cause lasts, as far as is known."""
        self._first_s = first_s
        self._longest_s = longest_s
        self._pause_s = 0.0
        self._until_s = 0.0
        self._is_probed = False

    def begin(self, now_s: float) -> None:
        """The cause was seen; those that come together are one."""
        self.is_on = True
        if self._is_probed or now_s >= self._until_s:
            self._is_probed = False
            self._pause_s = min(max(self._first_s, 2 * self._pause_s), self._longest_s)
            self._until_s = now_s + self._pause_s

    def end(self) -> None:
        """The cause is gone."""
        if self.is_on:
            self.is_on, self._is_probed = False, False
            self._pause_s = self._until_s = 0.0

    def lasts(self, now_s: float) -> bool:
        """Whether others go first."""
        return now_s < self._until_s

    def probe(self, now_s: float) -> None:
        """A request is on its way: the next ones wait for what comes of it."""
        if self.is_on:
            self._is_probed = True
            self._until_s = now_s + self._pause_s


class Replica:
    """One replica, and what its last calls say of it."""

    def __init__(self, address: str, stub: Any) -> None:
        self.address = address
        self.stub = stub
        self.is_reachable = True
        """Whether its last call was answered, if only with the word that it lacks the version."""
        self.is_serving = True
        """Whether it says so itself; True where nobody asks."""
        self.num_overdue = 0
        """Calls under way that take longer than they usually do."""
        self.num_late = 0
        """Answers in a row that were late, or that another replica gave sooner although it was asked later."""
        self.slowness = _Rest(*_SLOW_PAUSES_S)
        self._failure = _Rest(*_FAILED_PAUSES_S)
        self._lacks_until_s: dict[int, float] = {}
        self._paces: dict[Hashable, Pace] = {}

    def answered(self) -> None:
        """It takes its turn again."""
        self.is_reachable = True
        self._failure.end()
        if self._lacks_until_s:
            self._lacks_until_s.clear()

    def lacks(self, version: int, now_s: float) -> None:
        """It does not hold a version; that says nothing of others."""
        self.is_reachable = True
        self._lacks_until_s[version] = now_s + _LACKING_PAUSE_S

    def failed(self, now_s: float) -> None:
        """Others go before it for a while, which grows from failure to failure."""
        self.is_reachable = False
        self._failure.begin(now_s)

    def probe(self, now_s: float) -> None:
        """It is asked: where it had failed, or was slow, the next requests wait for what comes of it."""
        self._failure.probe(now_s)
        self.slowness.probe(now_s)

    def pace(self, work: Hashable) -> Pace:
        """Of its answers to such work."""
        return self._paces.setdefault(work, Pace())

    def forget_paces(self) -> None:
        """Those that it had say nothing of it any more."""
        self._paces.clear()

    def standing(self, version: int, now_s: float) -> int:
        """0: it takes its turn; 1: it is slow; 2: it is not likely to answer."""
        if not self.is_serving or self._failure.lasts(now_s) or now_s < self._lacks_until_s.get(version, 0.0):
            return 2
        return 1 if self.slowness.lasts(now_s) else 0


class Shard:
    """The replicas of one shard, asked in turn.

    1. One that is not likely to answer comes last; before it one that is slow, and before that one with more calls
       overdue than others.
    2. A replica is slow when several answers in a row take much longer than nearly all of a sibling's to such work;
       not more than half of the replicas are.
    3. Single replicas are just asked: nothing is counted and nothing measured.
    """

    def __init__(self, replicas: Sequence[Replica], *, is_timed: bool = True) -> None:
        """Nothing is known yet.

        Args:
            replicas: One or more.
            is_timed: Whether it matters how long they take.
        """
        self.replicas = tuple(replicas)
        self.hedges = Budget(_HEDGES_PER_CALL)
        self.retries = Budget(_RETRIES_PER_CALL, _LEAST_RETRIES)
        self._is_timed = is_timed and len(self.replicas) > 1
        self._turn = 0

    def first(self, version: int, now_s: float) -> Replica:
        """The replica to ask."""
        if len(self.replicas) == 1:
            return self.replicas[0]
        self._turn = (self._turn + 1) % len(self.replicas)
        self.hedges.count(now_s)
        self.retries.count(now_s)
        first = min(self._in_turn(), key=lambda replica: (replica.standing(version, now_s), replica.num_overdue))
        first.probe(now_s)
        return first

    def other(self, than: Replica, version: int, now_s: float) -> Replica | None:
        """The replica to ask where one has failed; None when there is no other."""
        others = [replica for replica in self._in_turn() if replica is not than]
        return min(others, key=lambda replica: replica.standing(version, now_s), default=None)

    def spare(self, than: Replica, version: int, now_s: float) -> Replica | None:
        """The replica to ask beside one that is late; None when no other takes its turn."""
        other = self.other(than, version, now_s)
        return other if other and not other.standing(version, now_s) else None

    def patience_s(self, work: Hashable, version: int, now_s: float) -> float | None:
        """Seconds after which an answer is late: the p95 of the best replica. None when nothing is known."""
        return self._best_p95_s(self.replicas, work, version, now_s) if self._is_timed else None

    def took(self, replica: Replica, work: Hashable, seconds: float, version: int, now_s: float) -> None:
        """A replica answered after so long."""
        if not self._is_timed:
            return
        siblings = [sibling for sibling in self.replicas if sibling is not replica]
        usual_s = self._best_p95_s(siblings, work, version, now_s)
        is_late = usual_s is not None and seconds > _LATE * usual_s
        if not replica.slowness.is_on:
            replica.pace(work).add(seconds)
        self._judge(replica, is_late, now_s)

    def lost(self, replica: Replica, work: Hashable, seconds: float, now_s: float) -> None:
        """A replica had not answered after so long, when another one had that was asked later."""
        if not replica.slowness.is_on:
            replica.pace(work).add(seconds)
        self._judge(replica, True, now_s)

    def _judge(self, replica: Replica, is_late: bool, now_s: float) -> None:
        replica.num_late = replica.num_late + 1 if is_late else 0
        if replica.slowness.is_on:
            if is_late:
                replica.slowness.begin(now_s)
            else:
                replica.slowness.end()
                replica.forget_paces()
            return
        num_slow = sum(sibling.slowness.is_on for sibling in self.replicas)
        if replica.num_late >= _LATE_IN_A_ROW and 2 * (num_slow + 1) <= len(self.replicas):
            replica.slowness.begin(now_s)

    def _in_turn(self) -> Iterator[Replica]:
        yield from self.replicas[self._turn :]
        yield from self.replicas[: self._turn]

    @staticmethod
    def _best_p95_s(replicas: Sequence[Replica], work: Hashable, version: int, now_s: float) -> float | None:
        known = (
            p95_s
            for replica in replicas
            if not replica.standing(version, now_s) and (p95_s := replica.pace(work).p95_s) is not None
        )
        return min(known, default=None)
