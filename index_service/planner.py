"""Which way to search among the rows that are allowed: approximately, through some lists, or exactly.

Deliberately does not know why rows are allowed or not.

A search through an IVF index takes the lists nearest to the query, whatever they hold. Behind a filter most of that
may be forbidden, and a filter that correlates with the embedding, or excludes what is nearest to the query, can leave
nothing. So lists count here by the allowed rows in them, and the nearest are taken until enough of them are looked at.
Where every list has its share of the allowed rows, but for chance, that is all. Where not, the k-th hit found says how
many better ones the other lists are likely to hold, and those that hold them are looked at as well.
"""

import math

import faiss
import numpy as np
from numpy.typing import NDArray

from index_service.ann import AnnIndex
from index_service.lists import Lists
from index_service.row_set import RowSet

_EVEN = 1.05
"""So many times what a search for k / share would look at: that was measured for few k, and not for this filter."""
_UNEVEN = 1.6
"""So many times more is looked at where the filter has to do with the embedding: the rows nearest to the query may lie
at the edge of what is allowed."""
_LEAST_MISSED = 0.01
_TOLERATED = 2.0
"""So many times what searches usually miss may be expected elsewhere before a second look is worth its time. With 5 a
search without the nearest 15,000 of 20,000 rows found 0.8 of what was left."""
_LEFT = 0.3
"""Of what is usually missed may be expected elsewhere after it."""
_MORE_RESCORED = 20
_CHOICE_IN_ROWS = 2_000
_CHOICE_PER_LIST = 1.5
"""Choosing lists for a query takes about as long as scoring so many rows, and so many more for each list: 60 µs for
600 lists and 200 for 4,000, against 28 ns."""
_MOST = 0.06
"""From this share of allowed rows on FAISS scans whole lists, for all queries at once; below it that would mostly skip
forbidden rows, and allowed rows are fetched by number: at about this share both take the same time."""
_MOST_FORBIDDEN = 0.05
_MORE = 8
"""Where so few are forbidden, a search for this part more than k leaves k allowed, unless the forbidden are near."""
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
    if num_forbidden <= _MOST_FORBIDDEN * ann.num_items:
        scores, rows, is_short = _without_forbidden(ann, embeddings, k, allowed)
        for i in np.flatnonzero(is_short):
            query = slice(i, i + 1)
            scores[query], rows[query] = _among_allowed(ann, embeddings[query], k, allowed)
        return scores, rows
    return _among_allowed(ann, embeddings, k, allowed)


def _without_forbidden(
    ann: AnnIndex, embeddings: NDArray[np.float32], k: int, allowed: RowSet
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.bool_]]:
    """Searches as if all were allowed, for a few more than k, and says `[B]` where fewer than k of them are."""
    scores, rows = ann.search(embeddings, k + k // _MORE + 2, k)
    is_allowed = allowed.contains(rows) & (rows >= 0)
    # The places of the allowed rows, in their order, and then of the others.
    places = np.argsort(~is_allowed, axis=1, kind="stable")[:, :k] + np.arange(len(rows))[:, None] * rows.shape[1]
    return scores.take(places), rows.take(places), is_allowed.sum(axis=1) < k


def _among_allowed(
    ann: AnnIndex, embeddings: NDArray[np.float32], k: int, allowed: RowSet
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    # The k best of a share of the rows lie as far away as the k / share best of all.
    share = allowed.count / ann.num_items
    num_wanted = max(k, math.ceil(share * ann.num_scanned(k / share)))
    if ann.lists is None:
        return _exact(ann, embeddings, k, allowed)
    if allowed.count <= num_wanted + _CHOICE_IN_ROWS + _CHOICE_PER_LIST * ann.lists.num_lists:
        return _exact(ann, embeddings, k, allowed)
    return _through_lists(ann, ann.lists, embeddings, k, allowed, num_wanted)


def _through_lists(
    ann: AnnIndex, lists: Lists, embeddings: NDArray[np.float32], k: int, allowed: RowSet, num_wanted: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    reach = lists.reach(allowed)
    is_scanned = lists.can_scan and allowed.count >= _MOST * ann.num_items
    num_rescored = ann.num_rescored(k) if lists.is_quantised else k
    num_wanted = math.ceil((_EVEN if reach.is_even else _UNEVEN) * num_wanted)
    if is_scanned and reach.is_even:
        # As many lists for every query, as they hold as many allowed rows; FAISS then chooses them as well.
        num_lists = math.ceil(num_wanted / allowed.count * lists.num_lists)
        scores, rows = lists.scan_nearest(embeddings, num_rescored, num_lists, reach)
        return ann.rescored(embeddings, k, rows) if num_rescored > k else (scores, rows)
    list_scores = lists.scores(embeddings)  # [B, L]
    nearest = lists.nearest(list_scores, reach, num_wanted)  # [B, P]
    if is_scanned:
        if lists.is_quantised:
            # What is left at the edge of a region may lie closer together than codes tell apart.
            num_rescored = max(num_rescored, k + k // 4 + _MORE_RESCORED)
        scores, rows = lists.scan(embeddings, num_rescored, nearest, list_scores, reach)
        if num_rescored > k:
            scores, rows = ann.rescored(embeddings, k, rows)
    else:
        scores, rows = _exact_in_lists(ann, lists, embeddings, k, allowed, nearest)
    if reach.is_even:
        return scores, rows
    expected = lists.expected(list_scores, reach, nearest, scores[:, -1])  # [B, L]
    usual = k * max(_LEAST_MISSED, ann.usually_missed)
    for i in np.flatnonzero(expected.sum(axis=1) > _TOLERATED * usual):
        query = slice(i, i + 1)
        order = np.argsort(expected[i])
        further = order[np.cumsum(expected[i][order]) > _LEFT * usual]  # [F]
        # Where this is needed scores lie so close together that a quantised index would confuse them.
        found = _exact_in_lists(ann, lists, embeddings[query], k, allowed, further[None])
        known = ann.rescored(embeddings[query], k, rows[query]) if is_scanned else (scores[query], rows[query])
        scores[query], rows[query] = _best_of(known, found)
    return scores, rows


def _best_of(
    first: tuple[NDArray[np.float32], NDArray[np.int64]], second: tuple[NDArray[np.float32], NDArray[np.int64]]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The `[1, K]` best of two results of K hits of one query, which may have hits in common."""
    rows, places = np.unique(np.concatenate((first[1], second[1]), axis=1), return_index=True)  # [U], at most 2 K
    scores = np.concatenate((first[0], second[0]), axis=1).take(places)  # [U]
    best = np.argsort(-scores)[None, : first[0].shape[1]]
    return scores.take(best), rows.take(best)


def _exact_in_lists(
    ann: AnnIndex, lists: Lists, embeddings: NDArray[np.float32], k: int, allowed: RowSet, chosen: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The best allowed rows in the lists chosen for each query: `[B, P]`, -1 for none."""
    scores, rows = np.empty((len(embeddings), k), dtype=np.float32), np.empty((len(embeddings), k), dtype=np.int64)
    for i, some_or_none in enumerate(chosen):
        query = slice(i, i + 1)
        some = np.sort(some_or_none[some_or_none >= 0])
        candidates = allowed.rows_between(lists.starts[some], lists.starts[some + 1])
        if len(candidates) < _SPARSE * ann.num_items:
            scores[query], rows[query] = ann.search_exactly(embeddings[query], k, candidates)
        else:
            scores[query], rows[query] = _exact(ann, embeddings[query], k, allowed)
    return scores, rows


def _exact(
    ann: AnnIndex, embeddings: NDArray[np.float32], k: int, allowed: RowSet
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    if allowed.count < _SPARSE * ann.num_items:
        return ann.search_exactly(embeddings, k, allowed.rows)
    parameters = faiss.SearchParameters(sel=faiss.IDSelectorBitmap(allowed.bitmap))
    return ann.exact.search(embeddings, k, params=parameters)  # type: ignore[no-any-return]
