"""How many requests each version answered since the deployment record last changed, how many failed, and how fast.

Deliberately does not know what follows from it; the rollout controller does.
"""

import itertools
import math
from bisect import bisect_left
from dataclasses import dataclass, field

from query_service.versions import Place

_SHORTEST_S = 1e-5
_LONGEST_S = 1e3
_BUCKETS_PER_E_FOLD = 20
"""Each is 5 % wide."""
_NUM_BUCKETS = math.ceil(math.log(_LONGEST_S / _SHORTEST_S) * _BUCKETS_PER_E_FOLD)


class Latencies:
    """A histogram on a logarithmic scale from 10 µs to 1,000 s: a quantile is right within 3 %, at a fixed size."""

    def __init__(self) -> None:
        self._counts = [0] * _NUM_BUCKETS

    def add(self, seconds: float, times: int = 1) -> None:
        """Counts one, or as many as took equally long."""
        bucket = int(math.log(max(seconds, _SHORTEST_S) / _SHORTEST_S) * _BUCKETS_PER_E_FOLD)
        self._counts[min(bucket, _NUM_BUCKETS - 1)] += times

    def quantile_s(self, share: float) -> float:
        """The seconds that this share did not exceed; 0 before the first."""
        cumulated = list(itertools.accumulate(self._counts))
        if not cumulated[-1]:
            return 0.0
        bucket = bisect_left(cumulated, math.ceil(share * cumulated[-1]))
        return _SHORTEST_S * math.exp((bucket + 0.5) / _BUCKETS_PER_E_FOLD)


@dataclass
class Count:
    """Requests of one version."""

    num_requests: int = 0
    num_errors: int = 0
    """Those that failed for a reason that is not the caller's."""
    latencies: Latencies = field(default_factory=Latencies)


class Tally:
    """Counts under one deployment record."""

    def __init__(self, revision: int) -> None:
        self.revision = revision
        self.counts: dict[Place, Count] = {}
        """By where the requests were answered."""

    def num_errors(self, place: Place) -> int:
        """Errors counted there."""
        return self.counts[place].num_errors if place in self.counts else 0

    def count(self, place: Place, seconds: float, *, is_error: bool, num_requests: int = 1) -> None:
        """Counts a request, or several that were answered together."""
        count = self.counts.setdefault(place, Count())
        count.num_requests += num_requests
        count.num_errors += is_error * num_requests
        count.latencies.add(seconds, num_requests)


class Traffic:
    """The tally of the newest record. A request keeps the one that it began under."""

    def __init__(self) -> None:
        self._tally = Tally(0)

    def under(self, revision: int) -> Tally:
        """The tally of a record; begins a new one when the record has changed."""
        if self._tally.revision != revision:
            self._tally = Tally(revision)
        return self._tally
