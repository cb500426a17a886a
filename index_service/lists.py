"""The lists of an IVF index whose rows are numbered list by list.

Deliberately does not know why rows may be returned or not, nor when a search through lists is the best one.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import faiss
import numpy as np
from numpy.typing import NDArray

from index_service.row_set import RowSet

_NUM_SAMPLED = 32
"""Rows taken for queries, to see how far the rows of a list score above and below its centroid."""
_LISTS_SAMPLED = 64
"""For each: half of them the nearest, half any of the others."""
_FEWEST_SAMPLED = 300
"""Rows of lists whose centroids score alike, to tell how rows score there."""
_BANDS = 16
"""Of a score of 1: centroids that score alike."""
_CENTROID_STEPS = 128
_SCORE_STEPS = 256
"""Of a score of 1, in the table of what is seen there."""
_CHANCE = 4.5
"""Standard deviations by which the rows of a set in one list may be off where the set has nothing to do with lists."""


@dataclass(frozen=True)
class Reach:
    """Where in L lists the rows of a set are."""

    counts: NDArray[np.int64]
    """`[L]` rows of the set in each list."""
    is_empty: NDArray[np.bool_] | None
    """`[L]` whether a list has no row of the set; None where each has some."""
    num_filled: int
    """Lists with rows of the set."""
    is_even: bool
    """Whether every list has its share of the set, but for chance."""
    selector: Any
    """FAISS's selector of the set."""


class Lists:
    """The L lists of one IVF index of N rows."""

    def __init__(self, ivf: Any, vectors: NDArray[np.float32]) -> None:
        """Takes an IVF index whose rows `number_by_list` has numbered, and its vectors `[N, D]`."""
        self._ivf = ivf
        self._vectors = vectors
        self._sizes = _sizes(ivf)  # [L]
        self._size_roots = np.sqrt(self._sizes)  # [L]
        self.starts = np.concatenate([[0], np.cumsum(self._sizes)])
        """`[L + 1]` the first row of each list, and N."""
        self._centroids = ivf.quantizer.reconstruct_n(0, ivf.nlist)  # [L, D]
        self._reaches: WeakKeyDictionary[RowSet, Reach] = WeakKeyDictionary()
        self.can_scan = type(ivf) in (faiss.IndexIVFScalarQuantizer, faiss.IndexIVFFlat)
        """Whether `scan` knows how to look at the lists."""
        self.is_quantised = type(ivf) is not faiss.IndexIVFFlat
        """Whether the scores of `scan` are not exact."""

    @property
    def num_lists(self) -> int:
        """L."""
        return len(self._sizes)

    @property
    def size_bytes(self) -> int:
        """Memory of what is kept here."""
        return int(self.starts.nbytes + self._sizes.nbytes + self._size_roots.nbytes + self._centroids.nbytes)

    def reach(self, allowed: RowSet) -> Reach:
        """Where the allowed rows are; made once for a set."""
        reach = self._reaches.get(allowed)
        if reach is None:
            counts = allowed.counts_between(self.starts)  # [L]
            share = allowed.count / max(1, allowed.num_rows)
            most_off = _CHANCE * math.sqrt(share * (1 - share)) * self._size_roots + 1  # [L]
            num_filled = int(np.count_nonzero(counts))
            reach = Reach(
                counts=counts,
                is_empty=None if num_filled == len(counts) else counts == 0,
                num_filled=num_filled,
                is_even=bool((np.abs(counts - share * self._sizes) <= most_off).all()),
                selector=faiss.IDSelectorBitmap(allowed.bitmap),
            )
            self._reaches[allowed] = reach
        return reach

    def scores(self, embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
        """`[B, L]` scores of the centroids for queries `[B, D]`."""
        scores: NDArray[np.float32] = embeddings @ self._centroids.T
        return scores

    def nearest(self, scores: NDArray[np.float32], reach: Reach, num_rows: int) -> NDArray[np.int64]:
        """The lists nearest to each query until they hold so many allowed rows together; those without any left out.

        Args:
            scores: `[B, L]` of the centroids.
            reach: Where the allowed rows are.
            num_rows: How many of them are wanted.

        Returns:
            `[B, P]` lists, -1 where fewer are enough.
        """
        distances = -scores  # [B, L]
        if reach.is_empty is not None:
            distances[:, reach.is_empty] = np.inf
        order = np.argsort(distances, axis=1)[:, : reach.num_filled]  # [B, F]
        held = reach.counts.take(order)  # [B, F]
        num_before = np.cumsum(held, axis=1) - held  # [B, F]
        num_wanted = np.count_nonzero(num_before < num_rows, axis=1)  # [B]
        most_wanted = int(num_wanted.max())
        best = order[:, :most_wanted]
        if len(best) > 1:  # For one query all of them are wanted.
            best[np.arange(most_wanted) >= num_wanted[:, None]] = -1
        return best

    def expected(
        self,
        scores: NDArray[np.float32],
        reach: Reach,
        visited: NDArray[np.int64],
        thresholds: NDArray[np.float32],
    ) -> NDArray[np.float32]:
        """How many allowed rows of each list are to be expected above a score.

        Args:
            scores: `[B, L]` of the centroids.
            reach: Where the allowed rows are.
            visited: `[B, P]` lists whose rows are known, for which 0 is returned; -1 for none.
            thresholds: `[B]` the score.

        Returns:
            `[B, L]`
        """
        # Minus infinity, where fewer than k were found, is the lowest step, above which everything is.
        steps = _steps(np.maximum(thresholds, -1), _SCORE_STEPS)  # [B]
        places = steps[:, None] * (2 * _CENTROID_STEPS + 1) + _steps(scores, _CENTROID_STEPS)  # [B, L]
        expected: NDArray[np.float32] = self._shares_above.take(places)  # [B, L]
        expected *= reach.counts
        query, place = np.nonzero(visited >= 0)
        expected[query, visited[query, place]] = 0
        return expected

    @cached_property
    def _shares_above(self) -> NDArray[np.float32]:
        """By a score and a centroid's score, both from -1 in steps: the share of the list's rows that score higher.

        Rows near a query spread less around their centroid than rows far from it, so each band of centroids' scores
        has its own distribution.
        """
        bands: list[list[NDArray[np.float32]]] = [[] for _ in range(2 * _BANDS + 1)]
        random = np.random.default_rng(0)
        queries = self._vectors[random.integers(len(self._vectors), size=_NUM_SAMPLED)]  # [S, D]
        for query, scores in zip(queries, self.scores(queries), strict=True):
            order = np.argsort(-scores)[1:]
            near, others = np.split(order, [_LISTS_SAMPLED // 2])
            chosen = random.choice(others, min(len(others), _LISTS_SAMPLED // 2), replace=False)
            for number in (*near, *chosen):
                rows = self._vectors[self.starts[number] : self.starts[number + 1]]  # [R, D]
                bands[_steps(scores[number], _BANDS)].append(rows @ query - scores[number])
        seen = [np.sort(np.concatenate([np.zeros(0, dtype=np.float32), *band])) for band in bands]
        usable = [number for number, band in enumerate(seen) if len(band) >= _FEWEST_SAMPLED]
        if not usable:
            seen, usable = [np.sort(np.concatenate([np.zeros(1, dtype=np.float32), *seen]))], [0]
        levels = np.arange(2 * _SCORE_STEPS + 1) / _SCORE_STEPS - 1
        shares = np.empty((len(levels), 2 * _CENTROID_STEPS + 1), dtype=np.float32)
        for column in range(shares.shape[1]):
            score = column / _CENTROID_STEPS - 1
            own = _steps(np.float32(score), _BANDS)
            differences = seen[min(usable, key=lambda number: abs(number - own))]
            shares[:, column] = 1 - np.searchsorted(differences, levels - score) / len(differences)
        shares[0] = 1
        return shares

    def scan_nearest(
        self, embeddings: NDArray[np.float32], k: int, num_lists: int, reach: Reach
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Finds the k best rows of a set in as many lists for every query, the nearest, whatever they hold.

        Args:
            embeddings: `[B, D]`, contiguous.
            k: At least 1.
            num_lists: At least 1.
            reach: Of the set.

        Returns:
            `[B, K]` scores, falling, and rows; row -1 where fewer were found.
        """
        parameters = faiss.SearchParametersIVF(nprobe=min(num_lists, self.num_lists), sel=reach.selector)
        return self._ivf.search(embeddings, k, params=parameters)  # type: ignore[no-any-return]

    def scan(
        self,
        embeddings: NDArray[np.float32],
        k: int,
        lists: NDArray[np.int64],
        list_scores: NDArray[np.float32],
        reach: Reach,
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Finds the k best rows of a set in some lists.

        Args:
            embeddings: `[B, D]`, contiguous.
            k: At least 1.
            lists: `[B, P]` lists for each query; -1 for none.
            list_scores: `[B, L]` the score of each list's centroid.
            reach: Of the set.

        Returns:
            `[B, K]` scores, falling, and rows; row -1 where fewer were found.
        """
        num_queries, num_lists = lists.shape
        scores = np.empty((num_queries, k), dtype=np.float32)
        rows = np.empty((num_queries, k), dtype=np.int64)
        lists = np.ascontiguousarray(lists)
        # What is taken for -1, none, is not looked at.
        similarities = list_scores.take(lists + np.arange(num_queries)[:, None] * list_scores.shape[1], mode="wrap")
        # FAISS's own wrapper for Python takes no parameters here.
        self._ivf.search_preassigned_c(
            num_queries,
            faiss.swig_ptr(embeddings),
            k,
            faiss.swig_ptr(lists),
            faiss.swig_ptr(similarities),
            faiss.swig_ptr(scores),
            faiss.swig_ptr(rows),
            False,
            faiss.SearchParametersIVF(nprobe=num_lists, sel=reach.selector),
        )
        return scores, rows


def number_by_list(ivf: Any) -> NDArray[np.int64]:
    """Gives the rows of an IVF index new numbers, list by list, in place.

    The rows near each other are then near in memory, and a list is a range of rows.

    Returns:
        `[N]` the old number of each new row: what belongs to the rows must be put in this order.
    """
    old = [_ids(ivf, number).copy() for number in range(ivf.nlist)]
    start = 0
    for number, ids in enumerate(old):
        _ids(ivf, number)[:] = np.arange(start, start + len(ids))
        start += len(ids)
    return np.concatenate(old)


def is_numbered_by_list(ivf: Any) -> bool:
    """Whether `number_by_list` gave the rows their numbers."""
    starts = np.concatenate([[0], np.cumsum(_sizes(ivf))])
    return all(
        (_ids(ivf, number) == np.arange(starts[number], starts[number + 1])).all() for number in range(ivf.nlist)
    )


def _steps(scores: Any, steps_of_1: int) -> Any:
    """Number of the step that each score is in, from -1 on; rounding may have taken scores a little beyond 1."""
    return ((np.clip(scores, -1, 1) + 1) * steps_of_1).astype(np.int64)


def _sizes(ivf: Any) -> NDArray[np.int64]:
    return np.array([ivf.invlists.list_size(number) for number in range(ivf.nlist)], dtype=np.int64)


def _ids(ivf: Any, number: int) -> NDArray[np.int64]:
    """The rows of a list; a view."""
    size = ivf.invlists.list_size(number)
    if size == 0:
        return np.empty(0, dtype=np.int64)
    return faiss.rev_swig_ptr(ivf.invlists.get_ids(number), size)  # type: ignore[no-any-return]
