"""How long the latest answers to comparable work took.

Deliberately does not know who answered.
"""

from collections import deque

_WINDOW = 128
_FEWEST = 32
"""Answers before anything is said of them."""
_RENEWED_EVERY = 16


class Pace:
    """What nearly all answers of a window stayed below."""

    def __init__(self) -> None:
        self.p95_s: float | None = None
        """None before there were enough answers."""
        self._latest: deque[float] = deque(maxlen=_WINDOW)
        self._num_new = 0

    def add(self, seconds: float) -> None:
        """Counts an answer."""
        self._latest.append(seconds)
        self._num_new += 1
        if self._num_new >= _RENEWED_EVERY and len(self._latest) >= _FEWEST:
            self._num_new = 0
            in_order = sorted(self._latest)
            self.p95_s = in_order[int(0.95 * len(in_order))]
