"""Which way to search among the rows that are allowed: approximately, through some lists, or exactly.

Deliberately does not know why rows are allowed or not.

A search through an IVF index takes the lists nearest to the query, whatever they hold. Behind a filter most of that
may be forbidden, and a filter that correlates with the embedding can leave nothing. So lists count here by the allowed
rows in them, and the nearest are taken until enough of them are looked at. How many that is follows from what was
measured without a filter, the share that is allowed, and whether it is a region of the space or spread over it.
"""

import faiss
import numpy as np
from numpy.typing import NDArray

from index_service.ann import AnnIndex
from index_service.lists import Lists, Reach
from index_service.row_set import RowSet

_GROWTH = 0.4
"""The allowed rows to look at grow with this power of the allowed share: from 100,000 to a million items, and from half
of them to a thirtieth, recall was kept so, and by `_ROWS_PER_HIT` at the least."""
_ROWS_PER_HIT = 10
_MARGIN = 1.15
_MORE_OF_REGION = 1.2
"""A filter that is a region of the space needs up to so much again: most queries see it from outside, where the order
of the lists tells less."""
_CHOICE_IN_ROWS = 3_000
"""Choosing lists for a query takes about as long as scoring this many rows: 60 µs against 20 ns."""
_MOST = 0.06
"""From this share of allowed rows on FAISS scans whole lists, for all queries at once; below it that would mostly skip
forbidden rows, and allowed rows are fetched by number: at about this share both take the same time."""
_SPARSE = 1 / 3
"""Below this share an exact scan fetches rows by number; above it, it reads all and skips the others."""


def search_allowed(
    ann: AnnIndex, embeddings: NDArray[np.float32], k: int, allowed: RowSet
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Finds about the k best allowed rows of each query, and k whenever so many are allowed.

    Args:
        ann: The index, N rows.
        embeddings: `[B, D]`, contiguous.
        k: At least 1.
        allowed: Which of the N rows may be returned.

    Returns:
        `[B, K]` scores, falling, and rows, K at most k: the allowed rows where they are fewer.
    """
    k = min(k, allowed.count)
    if k == 0 or len(embeddings) == 0:
        return np.empty((len(embeddings), k), dtype=np.float32), np.empty((len(embeddings), k), dtype=np.int64)
    scores, rows = _planned(ann, embeddings, k, allowed)
    is_short = rows[:, -1] < 0  # [B]
    if is_short.any():
        # The lists that were looked at held too few, however wide the search.
        scores[is_short], rows[is_short] = _exact(ann, np.ascontiguousarray(embeddings[is_short]), k, allowed)
    return scores, rows


def _planned(
    ann: AnnIndex, embeddings: NDArray[np.float32], k: int, allowed: RowSet
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    num_forbidden = ann.num_items - allowed.count
    if num_forbidden == 0:
        return ann.search(embeddings, k)
    if ann.base is None:
        return _exact(ann, embeddings, k, allowed)
    if num_forbidden <= k:
        # The k best allowed rows are among the k + num_forbidden best of all.
        return ann.search(embeddings, k, k + num_forbidden, faiss.IDSelectorBitmap(allowed.bitmap))
    share = allowed.count / ann.num_items
    num_wanted = max(_ROWS_PER_HIT * k, _MARGIN * ann.num_scanned(k) * share**_GROWTH)
    if ann.lists is None or allowed.count <= num_wanted + _CHOICE_IN_ROWS:
        return _exact(ann, embeddings, k, allowed)
    reach = ann.lists.reach(allowed)
    num_wanted *= 1 + _MORE_OF_REGION * reach.concentration
    return _through_lists(ann, ann.lists, embeddings, k, allowed, reach, round(num_wanted))


def _through_lists(
    ann: AnnIndex,
    lists: Lists,
    embeddings: NDArray[np.float32],
    k: int,
    allowed: RowSet,
    reach: Reach,
    num_wanted: int,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    nearest, similarities = lists.nearest(embeddings, reach, num_wanted)  # [B, P]
    if lists.can_scan and allowed.count >= _MOST * ann.num_items:
        return lists.scan(embeddings, k, nearest, similarities, faiss.IDSelectorBitmap(allowed.bitmap))
    scores, rows = np.empty((len(embeddings), k), dtype=np.float32), np.empty((len(embeddings), k), dtype=np.int64)
    for i, some_or_none in enumerate(nearest):
        some = np.sort(some_or_none[some_or_none >= 0])
        candidates = allowed.rows_between(lists.starts[some], lists.starts[some + 1])
        scores[i : i + 1], rows[i : i + 1] = ann.search_exactly(embeddings[i : i + 1], k, candidates)
    return scores, rows


def _exact(
    ann: AnnIndex, embeddings: NDArray[np.float32], k: int, allowed: RowSet
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    if allowed.count < _SPARSE * ann.num_items:
        return ann.search_exactly(embeddings, k, allowed.rows)
    parameters = faiss.SearchParameters(sel=faiss.IDSelectorBitmap(allowed.bitmap))
    return ann.exact.search(embeddings, k, params=parameters)  # type: ignore[no-any-return]
