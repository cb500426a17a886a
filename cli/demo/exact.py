"""The oracle: exact search over a version's own exported towers, in float64, to judge served answers by.

Deliberately knows nothing of FAISS or of the services.
"""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from towers.catalogue_columns import ITEM_ID
from towers.checkpoint import CheckpointStore
from towers.features import RawValue
from towers.tower import Tower

TOLERANCE = 1e-5
"""Largest difference between a served score and the exact inner product (an unquantised index)."""


class ExactSearch:
    """Exact scores of fixed queries against all items, at one checkpoint version."""

    def __init__(
        self,
        checkpoints: CheckpointStore,
        version: int,
        items: pa.Table,
        queries: Sequence[Mapping[str, RawValue]],
    ) -> None:
        """Embeds Q queries and N items with the version's towers.

        Args:
            checkpoints: Where the version is published.
            version: The checkpoint version.
            items: The catalogue, `[N]` rows.
            queries: Raw features of Q queries; features that the version does not know are left out.
        """
        item_tower = Tower(checkpoints.load(version, "item"))
        query_tower = Tower(checkpoints.load(version, "query"))
        columns = {feature.name: items[feature.column].to_pylist() for feature in item_tower.encoder.features}
        known = {feature.name for feature in query_tower.encoder.features}
        rows = [{name: value for name, value in query.items() if name in known} for query in queries]
        item_embeddings = item_tower.embed(item_tower.encoder.encode(columns, items.num_rows)).astype(np.float64)
        query_embeddings = query_tower.embed_rows(rows).astype(np.float64)
        self._scores: NDArray[np.float64] = query_embeddings @ item_embeddings.T  # [Q, N]
        self._known_best: dict[tuple[int, int], NDArray[np.float64]] = {}
        self._column_of = {item_id: column for column, item_id in enumerate(items[ITEM_ID].to_pylist())}

    def fault(
        self,
        query: int,
        item_ids: Sequence[str],
        scores: Sequence[float],
        k: int,
        excluded_item_ids: Collection[str] = (),
    ) -> str:
        """Judges one full answer.

        Args:
            query: Position of the query.
            item_ids: Items as served, best first.
            scores: Their scores as served.
            k: How many were asked for.
            excluded_item_ids: Items that must not be served.

        Returns:
            What is wrong, in words; empty when the answer equals exact search within `TOLERANCE`.
        """
        excluded = {self._column_of[item_id] for item_id in excluded_item_ids if item_id in self._column_of}
        expected_count = min(k, len(self._column_of) - len(excluded))
        if len(item_ids) != expected_count or len(scores) != expected_count:
            return f"{len(item_ids)} items instead of {expected_count}"
        if len(set(item_ids)) != len(item_ids):
            return "an item twice"
        if unknown := [item_id for item_id in item_ids if item_id not in self._column_of]:
            return f"item {unknown[0]!r} is not in the catalogue"
        columns = [self._column_of[item_id] for item_id in item_ids]
        if excluded.intersection(columns):
            return "an excluded item"
        served = np.asarray(scores, dtype=np.float64)
        if not np.isfinite(served).all() or (np.diff(served) > 0).any():
            return "scores that rise or are not finite"
        exact = self._scores[query]
        difference = float(np.abs(exact[columns] - served).max(initial=0.0))
        if difference > TOLERANCE:
            return f"a score that differs from the exact one by {difference:.1e}"
        best = self._best(query, expected_count, excluded)
        difference = float(np.abs(best - served).max(initial=0.0))
        if difference > TOLERANCE:
            return f"a better item is missing: scores differ from the best ones by {difference:.1e}"
        return ""

    def _best(self, query: int, count: int, excluded: Collection[int]) -> NDArray[np.float64]:
        """The best scores of a query, best first; those without exclusions are kept for the next answer."""
        if excluded:
            return np.sort(np.delete(self._scores[query], list(excluded)))[::-1][:count]
        if (query, count) not in self._known_best:
            self._known_best[query, count] = np.sort(self._scores[query])[::-1][:count]
        return self._known_best[query, count]
