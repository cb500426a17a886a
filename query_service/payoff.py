"""Whether it pays to look embeddings up: what a query costs looked up, and what it costs computed.

Deliberately does not know where they are looked up.
"""

_SMOOTHING = 0.05
"""Weight of the newest batch."""
_FEWEST_BATCHES = 20
"""Of either kind, before anything is left out: the first take longer than those that follow."""
_PROBE_EVERY = 128
"""Batches without a lookup, or before the tower is measured, until there is one the other way."""


class Cost:
    """Seconds per query, of late: those of the last batches by those batches' queries."""

    def __init__(self) -> None:
        self.num_batches = 0
        self._seconds = 0.0
        self._num_queries = 0.0

    @property
    def seconds(self) -> float:
        """Of one query; 0 before the first."""
        return self._seconds / self._num_queries if self.num_batches else 0.0

    def add(self, seconds: float, num_queries: int) -> None:
        """Counts a batch."""
        self.num_batches += 1
        self._seconds += _SMOOTHING * (seconds - self._seconds)
        self._num_queries += _SMOOTHING * (num_queries - self._num_queries)


class Payoff:
    """Decides, batch by batch, whether to look up.

    1. Until both costs are known, it looks up.
    2. While a lookup costs more than it saves, it leaves lookups out, save one in 128, so that it notices a change.
    3. Where everything is found, the tower is not measured by itself: one batch in 128 skips the lookup until it is.
    """

    def __init__(self, tower: Cost, may_leave_out: bool) -> None:
        """Nothing is measured yet.

        Args:
            tower: What computing costs; others measure it.
            may_leave_out: Whether lookups are ever left out.
        """
        self.lookup = Cost()
        self.share_found = 1.0
        """Of the queries that are looked up; 1 where that is not known: a cost above the tower's pays at no share."""
        self._tower = tower
        self._may_leave_out = may_leave_out
        self._num_asked = 0

    @property
    def is_left_out(self) -> bool:
        """Whether lookups cost more than they save."""
        return (
            self._may_leave_out
            and min(self.lookup.num_batches, self._tower.num_batches) >= _FEWEST_BATCHES
            and self.lookup.seconds > self.share_found * self._tower.seconds
        )

    def wants_lookup(self) -> bool:
        """Whether the next batch is to be looked up."""
        self._num_asked += 1
        is_probe = self._num_asked % _PROBE_EVERY == 0
        if self.is_left_out:
            return is_probe
        is_unknown = self._may_leave_out and self._tower.num_batches < _FEWEST_BATCHES
        return not (is_probe and is_unknown)
