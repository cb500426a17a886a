"""How much of what exact search finds an approximate one finds, for a sample of queries.

Deliberately does not know which index is measured, nor what follows from the figure.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from index_service.ann import vectors_of

VALIDATION_QUERIES: Literal["validation queries"] = "validation queries"
ITEM_VECTORS: Literal["item vectors"] = "item vectors"
MAX_QUERIES = 2000
FEWEST_QUERIES = 30
"""Fewer validation queries say less than item vectors do."""
_MEASURED_RESULTS = 250_000
_FEWEST_MEASURED = 100
_SCORE_TOLERANCE = 1e-6


@dataclass(frozen=True)
class QuerySample:
    """Queries to measure with."""

    embeddings: NDArray[np.float32]
    """`[Q, D]` unit vectors."""
    own_rows: NDArray[np.int64] | None
    """`[Q]` the item that each query is, which is no hit of its own; None where queries are not items."""

    @property
    def measured_with(self) -> Literal["validation queries", "item vectors"]:
        """What the queries are."""
        return VALIDATION_QUERIES if self.own_rows is None else ITEM_VECTORS


def query_sample(vectors: NDArray[np.float32], validation_queries: NDArray[np.float32] | None) -> QuerySample:
    """Up to `MAX_QUERIES` validation queries; items where the checkpoint has none, or too few.

    Args:
        vectors: `[N, D]` the items.
        validation_queries: `[V, D]`
    """
    if validation_queries is not None and len(validation_queries) >= FEWEST_QUERIES:
        return QuerySample(validation_queries[_spread(len(validation_queries))], None)
    random = np.random.default_rng(0)
    rows = np.sort(random.choice(len(vectors), size=min(MAX_QUERIES, len(vectors)), replace=False))
    return QuerySample(vectors[rows], rows)


class Truth:
    """What exact search finds for a sample of queries, up to the largest k."""

    def __init__(self, exact: Any, queries: QuerySample, largest_k: int) -> None:
        """Searches exactly.

        Args:
            exact: `IndexFlatIP` of the N items.
            queries: The sample.
            largest_k: Recall can be told for up to this many items.
        """
        self.queries = queries
        self._vectors = vectors_of(exact)
        available = max(0, exact.ntotal - (0 if queries.own_rows is None else 1))
        self.largest_k = min(largest_k, available)
        self.rows: NDArray[np.int64] = np.empty((len(queries.embeddings), 0), dtype=np.int64)
        """`[Q, K]` best first."""
        self._scores = np.empty(self.rows.shape, dtype=np.float32)
        if self.rows.shape[0] and self.largest_k:
            scores, rows = exact.search(queries.embeddings, self.asked(self.largest_k))  # [Q, K + 1], [Q, K + 1]
            order = self._order_without_own(rows, self.largest_k)  # [Q, K]
            self.rows = np.take_along_axis(rows, order, axis=1)  # [Q, K]
            self._scores = np.take_along_axis(scores, order, axis=1)  # [Q, K]

    def asked(self, k: int) -> int:
        """How many results a search has to return so that k are left without the query's own item."""
        return k if self.queries.own_rows is None else k + 1

    def queries_for(self, k: int) -> NDArray[np.float32]:
        """`[Q, D]` the first queries: as many as measure recall@k well, fewer where each has many results."""
        return self.queries.embeddings[: max(_FEWEST_MEASURED, _MEASURED_RESULTS // k)]

    def recall(self, rows: NDArray[np.int64], k: int) -> tuple[float, float]:
        """Mean recall@k over the queries and the standard error of that mean.

        A hit counts when its exact score is among the k best, so that equal scores may come in any order.

        Args:
            rows: `[Q, asked(k)]` what a search for the first Q queries returned, row -1 where it found fewer.
            k: At least 1; what exceeds the number of items counts as that number.
        """
        k = min(k, self.largest_k)
        if k == 0 or len(rows) == 0:
            return 1.0, 0.0
        found = np.take_along_axis(rows, self._order_without_own(rows, k), axis=1)  # [Q, K]
        is_hit = np.zeros(found.shape, dtype=bool)
        is_right = np.zeros(len(self._vectors) + 1, dtype=bool)  # Row -1 is the last one, and never right.
        for number, right in enumerate(self.rows[: len(found), :k]):
            is_right[right] = True
            is_hit[number] = is_right[found[number]]
            is_right[right] = False
        kth_scores = self._scores[: len(found), k - 1]  # [Q]
        numbers, places = np.nonzero(~is_hit & (found >= 0))
        scores = np.einsum("md,md->m", self.queries.embeddings[numbers], self._vectors[found[numbers, places]])
        is_hit[numbers, places] = scores >= kth_scores[numbers] - _SCORE_TOLERANCE
        recalls = is_hit.mean(axis=1)  # [Q]
        return float(recalls.mean()), float(recalls.std(ddof=1) / np.sqrt(len(recalls))) if len(recalls) > 1 else 0.0

    def _order_without_own(self, rows: NDArray[np.int64], k: int) -> NDArray[np.int64]:
        """`[Q, K]` places of the first k results that are not the query's own item."""
        own = self.queries.own_rows
        if own is None:
            return np.broadcast_to(np.arange(k), (len(rows), k))
        return np.argsort(rows == own[: len(rows), None], axis=1, kind="stable")[:, :k]


def _spread(count: int) -> NDArray[np.int64]:
    """Up to `MAX_QUERIES` of so many, evenly spaced."""
    return np.linspace(0, count - 1, min(MAX_QUERIES, count)).astype(np.int64)
