"""The replicas of a shard, and which of them is asked next. Moments are on the monotonic clock.

Deliberately does not know what they are asked, nor what time it is.
"""

from collections.abc import Sequence
from typing import Any

_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 4.0
_LACKING_PAUSE_S = 1.0
_ANY_VERSION = 0


class Replica:
    """One replica, and what its last calls say of it."""

    def __init__(self, address: str, stub: Any) -> None:
        self.address = address
        self.stub = stub
        self.is_reachable = True
        """Whether its last call was answered, if only with the word that it lacks the version."""
        self._pause_s = 0.0
        self._is_probed = False
        self._rests_until_s: dict[int, float] = {}

    def answered(self) -> None:
        """It takes its turn again."""
        self.is_reachable = True
        if self._rests_until_s:
            self._rests_until_s.clear()
            self._pause_s = 0.0
            self._is_probed = False

    def lacks(self, version: int, now_s: float) -> None:
        """It does not hold a version; that says nothing of others."""
        self.is_reachable = True
        self._rests_until_s[version] = now_s + _LACKING_PAUSE_S

    def failed(self, now_s: float) -> None:
        """Others go before it for a while, which grows from failure to failure; those that come together are one."""
        self.is_reachable = False
        if self._is_probed or now_s >= self._rests_until_s.get(_ANY_VERSION, 0.0):
            self._is_probed = False
            self._pause_s = min(max(_FIRST_PAUSE_S, 2 * self._pause_s), _LONGEST_PAUSE_S)
            self._rests_until_s[_ANY_VERSION] = now_s + self._pause_s

    def rests(self, version: int, now_s: float) -> bool:
        """Whether others go before it."""
        return any(now_s < self._rests_until_s.get(cause, 0.0) for cause in (_ANY_VERSION, version))

    def probe(self, now_s: float) -> None:
        """One that failed is tried by a single request: the next ones wait for what comes of it."""
        if not self.is_reachable:
            self._is_probed = True
            self._rests_until_s[_ANY_VERSION] = now_s + self._pause_s


class Shard:
    """The replicas of one shard, asked in turn; one that has just failed comes last."""

    def __init__(self, replicas: Sequence[Replica]) -> None:
        self.replicas = tuple(replicas)
        self._turn = 0

    def next_two(self, version: int, now_s: float) -> tuple[Replica, Replica | None]:
        """The replica to ask, and the one to ask should it fail; None when there is no other."""
        if len(self.replicas) == 1:
            return self.replicas[0], None
        self._turn = (self._turn + 1) % len(self.replicas)
        in_turn = (*self.replicas[self._turn :], *self.replicas[: self._turn])
        first, second, *_ = sorted(in_turn, key=lambda replica: replica.rests(version, now_s))
        first.probe(now_s)
        return first, second
