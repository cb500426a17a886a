"""Queries of a stream that have no answer yet: asked again, in their order, where a stream breaks off.

Deliberately does not know gRPC, nor how the next query is come by.
"""

from collections import deque
from typing import Generic, TypeVar

MAX_UNANSWERED = 256
"""Queries taken from the caller whose answers have not come: some wait at the service, the others on their way."""
MAX_FAILURES = 8
"""In a row, without one answer in between: about seven seconds, in which a replica starts."""
ENDED_EARLY = "the service ended the stream before it had answered all queries"
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 2.0

_Request = TypeVar("_Request")


class Backlog(Generic[_Request]):
    """What was taken and not yet answered. Belongs to one stream; its owner locks it where threads share it."""

    def __init__(self) -> None:
        self.first = 0
        """Number of the oldest query without an answer, from the first of all."""
        self.is_complete = False
        """Whether all queries have been taken."""
        self._requests: deque[_Request] = deque()
        self._num_failures = 0

    @property
    def end(self) -> int:
        """Number of queries taken so far."""
        return self.first + len(self._requests)

    @property
    def has_room(self) -> bool:
        """Whether another query may be taken."""
        return len(self._requests) < MAX_UNANSWERED

    @property
    def is_done(self) -> bool:
        """Whether all queries have been taken and answered."""
        return self.is_complete and not self._requests

    def request(self, number: int) -> _Request:
        """A query that was taken and has no answer."""
        return self._requests[number - self.first]

    def take(self, request: _Request) -> None:
        """Adds the next query."""
        self._requests.append(request)

    def answered(self) -> None:
        """Forgets the oldest."""
        self._requests.popleft()
        self.first += 1
        self._num_failures = 0

    def pause_s(self) -> float | None:
        """Counts a failure: seconds until the next attempt, None when there have been too many."""
        self._num_failures += 1
        if self._num_failures >= MAX_FAILURES:
            return None
        return min(_FIRST_PAUSE_S * 2.0 ** (self._num_failures - 1), _LONGEST_PAUSE_S)
