"""The queries that come most often of late, as raw features: a bounded sample.

Deliberately does not know versions, nor what the queries are wanted for.
"""

import heapq
import random
from collections.abc import Sequence

import xxhash

from query_service.parse import RawFeatures

_SAMPLED_SHARE = 0.125
"""Of the batches, of which one query is counted for all: a count of every query would cost as much as a cache's hit."""
_MOST_CHARACTERS = 16_384
"""Of a query's features; larger ones are not kept."""
_AGEING = 0.9
"""Of all counts, when the rarer half is forgotten."""


class HotQueries:
    """Counts a sample of queries, and forgets the rarer half when it holds twice as many as are wanted."""

    def __init__(self, num_queries: int) -> None:
        """Nothing is counted yet.

        Args:
            num_queries: As many as are wanted; 0: nothing is kept.
        """
        self._num_queries = num_queries
        self._counts: dict[bytes, float] = {}
        self._features: dict[bytes, RawFeatures] = {}

    def notice(self, queries: Sequence[RawFeatures]) -> None:
        """Counts a batch of B queries, perhaps."""
        if self._num_queries and random.random() < _SAMPLED_SHARE:  # noqa: S311
            query = queries[int(random.random() * len(queries))]  # noqa: S311
            self._count(query, len(queries))

    def hottest(self) -> list[RawFeatures]:
        """The queries counted most, the first most often."""
        keys = heapq.nlargest(self._num_queries, self._counts, key=self._counts.__getitem__)
        return [self._features[key] for key in keys]

    def _count(self, query: RawFeatures, times: int) -> None:
        text = repr(sorted(query.items()))
        if len(text) > _MOST_CHARACTERS:
            return
        key = xxhash.xxh3_128_digest(text.encode("utf-8", "surrogatepass"))
        self._counts[key] = self._counts.get(key, 0.0) + times
        self._features.setdefault(key, query)
        if len(self._counts) > 2 * self._num_queries:
            kept = heapq.nlargest(self._num_queries, self._counts, key=self._counts.__getitem__)
            self._counts = {key: _AGEING * self._counts[key] for key in kept}
            self._features = {key: self._features[key] for key in kept}
