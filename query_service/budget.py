"""A bound on extra calls: a share of the recent ones, and a few more.

Deliberately does not know what is called, nor what time it is.
"""

import math

_MEMORY_S = 10.0
"""Calls are forgotten at this rate; so are the extra ones, which is why the share holds over any length of time."""


class Budget:
    """Extra calls that may be made. Moments are on the monotonic clock, and never go back."""

    def __init__(self, share: float, floor: float = 0.0) -> None:
        """All of it is there.

        Args:
            share: Extra calls for each call.
            floor: Extra calls that may be made without any; it comes back at a tenth a second.
        """
        self._share = share
        self._floor = floor
        self._calls = 0.0
        self._extra = 0.0
        self._seen_s = 0.0

    def count(self, now_s: float) -> None:
        """A call was made."""
        self._forget(now_s)
        self._calls += 1.0

    def take(self, now_s: float) -> bool:
        """Whether one extra call may be made; then it counts as made."""
        self._forget(now_s)
        if self._extra + 1.0 > self._share * self._calls + self._floor:
            return False
        self._extra += 1.0
        return True

    def _forget(self, now_s: float) -> None:
        kept = math.exp((self._seen_s - now_s) / _MEMORY_S)
        self._calls *= kept
        self._extra *= kept
        self._seen_s = now_s
