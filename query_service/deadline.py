"""A request's deadline, on the monotonic clock.

Deliberately does not know where the deadline came from.
"""

import time
from dataclasses import dataclass

from towers.errors import DeadlineError


@dataclass(frozen=True)
class Deadline:
    """A moment by which the answer must be there; a wall clock that jumps does not move it."""

    at_s: float

    @classmethod
    def after(cls, timeout_s: float) -> "Deadline":
        """The moment so many seconds from now."""
        return cls(time.monotonic() + timeout_s)

    def remaining_s(self) -> float:
        """Seconds left; negative when it has passed."""
        return self.at_s - time.monotonic()

    def share(self, share: float) -> "Deadline":
        """An earlier one, after a share of the time that is left."""
        return Deadline.after(share * self.remaining_s())

    def require_time(self) -> None:
        """Ends the work when nobody waits for it any more.

        Raises:
            DeadlineError: the deadline has passed.
        """
        if self.remaining_s() <= 0:
            raise DeadlineError("the deadline passed before the shards were asked; give the call more time")
