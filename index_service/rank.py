"""Where one item stands among the items of a shard: by exact scores of all of them, whatever the index would find.

Deliberately does not know gRPC, nor the other shards: it ranks the score of an item of theirs as well.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import faiss
import numpy as np
from numpy.typing import NDArray

from index_service.filters import Condition
from index_service.live import LiveView


@dataclass(frozen=True)
class Standing:
    """Of an item for B queries; ranked for the first."""

    scores: NDArray[np.float32] | None
    """`[B]` its exact scores; None where the shard does not hold it."""
    meets_condition: bool
    quarantine_reason: str | None
    """Why it could not be embedded; None where it was, or is not there at all."""
    num_better: int
    """Of the items that count: those of a higher score, or of the same score and a lower id."""
    num_counted: int
    """The item itself included where it counts."""


def standing(
    view: LiveView,
    embeddings: NDArray[np.float32],
    item_id: str,
    condition: Condition | None,
    excluded_item_ids: Sequence[str],
    score: float | None = None,
) -> Standing:
    """Ranks an item, or the score of one that another shard holds.

    Args:
        view: What is searched.
        embeddings: `[B, D]`, row i is the unit embedding of query i.
        item_id: The item.
        condition: What items must meet to count; None: nothing.
        excluded_item_ids: Items that do not count; unknown ids are ignored.
        score: The item's score for the first query, where another shard holds it.

    Raises:
        InvalidInputError: as of `LiveView.search`.
    """
    view.base.require_queries(embeddings)
    embeddings = np.ascontiguousarray(embeddings, dtype=np.float32)
    parts = view.allowed(condition, excluded_item_ids)
    num_counted = sum(counted.count for _, counted in parts)
    scores, meets_condition = None, False
    met = view.allowed(condition, ()) if excluded_item_ids else parts
    for (part, alive), (_, meeting) in zip(view.allowed(None, ()), met, strict=True):
        rows = part.ids.rows_of([item_id])
        rows = rows[alive.contains(rows)]
        if len(rows):
            labels = np.repeat(rows[None], len(embeddings), axis=0)  # [B, 1]
            scores = part.ann.rescored(embeddings, 1, labels)[0][:, 0]  # [B]
            meets_condition = bool(meeting.contains(rows)[0])
            score = float(scores[0])
    num_better = 0
    for part, counted in parts:
        if score is not None and counted.count:
            better, tied = _at_least(part.ann.exact, embeddings[:1], score, counted.bitmap)
            ids = part.ids.utf8(tied)
            # The order of UTF-8 bytes is that of the strings.
            num_better += len(better) + sum(other < item_id.encode() for other in ids)
    quarantined = {**view.base.manifest.quarantined, **view.quarantined}
    reason = quarantined.get(item_id) if scores is None else None
    return Standing(scores, meets_condition, reason, num_better, num_counted)


def _at_least(
    exact: faiss.IndexFlatIP, query: NDArray[np.float32], score: float, bitmap: NDArray[np.uint8]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of a higher score than this, and rows of the same score, among those that are set in the bitmap."""
    selector = faiss.IDSelectorBitmap(bitmap)
    below = float(np.nextafter(np.float32(score), np.float32(-np.inf)))
    _, scores, rows = exact.range_search(query, below, params=faiss.SearchParameters(sel=selector))
    return rows[scores > np.float32(score)], rows[scores == np.float32(score)]
