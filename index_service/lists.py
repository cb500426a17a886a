"""The lists of an IVF index whose rows are numbered list by list.

Deliberately does not know why rows may be returned or not, nor when a search through lists is the best one.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import faiss
import numpy as np
from numpy.typing import NDArray

from index_service.row_set import RowSet

_SPARE = 2
"""Lists are sorted for this many times the rows that are wanted, as lists hold uneven numbers of them."""
_NUM_SAMPLED = 32
"""Rows taken for queries, to see how far the rows of a list score above and below its centroid."""
_SAMPLED_SHARE = 1 / 3
"""Of the lists, the nearest: in those that are farther no hit is looked for."""
_LISTS_SAMPLED = 48
_STEPS = 256
"""Of a score of 1, in the table of what is seen there."""
_WIDEST = 2.0
"""Between the scores of unit vectors."""


@dataclass(frozen=True)
class Reach:
    """Where in L lists the rows of a set are."""

    counts: NDArray[np.int64]
    """`[L]` rows of the set in each list."""
    penalties: NDArray[np.float32]
    """`[L]` 0 for a list with rows of the set, minus infinity for one without."""
    num_filled: int
    """Lists with rows of the set."""
    num_rows: int


class Lists:
    """The L lists of one IVF index of N rows."""

    def __init__(self, ivf: Any, vectors: NDArray[np.float32]) -> None:
        """Takes an IVF index whose rows `number_by_list` has numbered, and its vectors `[N, D]`."""
        self._ivf = ivf
        self._vectors = vectors
        sizes = _sizes(ivf)
        self.starts = np.concatenate([[0], np.cumsum(sizes)])
        """`[L + 1]` the first row of each list, and N."""
        self._centroids = ivf.quantizer.reconstruct_n(0, ivf.nlist)  # [L, D]
        self._reaches: WeakKeyDictionary[RowSet, Reach] = WeakKeyDictionary()
        self.can_scan = type(ivf) in (faiss.IndexIVFScalarQuantizer, faiss.IndexIVFFlat)
        """Whether `scan` knows how to look at the lists."""
        self.is_quantised = type(ivf) is not faiss.IndexIVFFlat
        """Whether the scores of `scan` are not exact."""

    @property
    def size_bytes(self) -> int:
        """Memory of what is kept here."""
        return int(self.starts.nbytes + self._centroids.nbytes)

    def num_candidates(self, k: int) -> int:
        """How many hits of `scan` hold the k best, whose scores may lie closer together than they are exact."""
        return k + k // 4 + 20 if self.is_quantised else k

    def reach(self, allowed: RowSet) -> Reach:
        """Where the allowed rows are; made once for a set."""
        reach = self._reaches.get(allowed)
        if reach is None:
            counts = allowed.counts_between(self.starts)  # [L]
            reach = Reach(
                counts=counts,
                num_rows=allowed.count,
                penalties=np.where(counts > 0, np.float32(0), np.float32(-np.inf)),
                num_filled=int(np.count_nonzero(counts)),
            )
            self._reaches[allowed] = reach
        return reach

    def scores(self, embeddings: NDArray[np.float32], reach: Reach) -> NDArray[np.float32]:
        """`[B, L]` scores of the centroids for queries `[B, D]`; minus infinity for a list without allowed rows."""
        scores: NDArray[np.float32] = embeddings @ self._centroids.T + reach.penalties
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
        num_lists = len(reach.counts)
        num_best = min(reach.num_filled, 1 + _SPARE * reach.num_filled * num_rows // max(1, reach.num_rows))
        query = np.arange(len(scores))[:, None]  # [B, 1]
        best = np.argpartition(scores, num_lists - num_best, axis=1)[:, num_lists - num_best :]  # [B, P]
        # `take` with one number a place is several times faster here than an index of two.
        order = np.argsort(-scores.take(best + query * num_lists), axis=1) + query * num_best  # [B, P]
        best = best.take(order)  # [B, P]
        held = reach.counts[best]  # [B, P]
        is_wanted = np.cumsum(held, axis=1) - held < num_rows  # [B, P]
        best[~is_wanted] = -1
        return best[:, : int(is_wanted.sum(axis=1).max())]

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
        # Minus infinity, where fewer than k were found, has no difference from the score of an empty list.
        above = np.clip(np.maximum(thresholds, -_WIDEST)[:, None] - scores, -_WIDEST, _WIDEST)  # [B, L]
        expected: NDArray[np.float32] = self._shares_above[((above + _WIDEST) * _STEPS).astype(np.int32)]  # [B, L]
        expected *= reach.counts
        query, place = np.nonzero(visited >= 0)
        expected[query, visited[query, place]] = 0
        return expected

    @cached_property
    def _shares_above(self) -> NDArray[np.float32]:
        """By how far a score is above a centroid's, from -2 in steps: the share of the list's rows that exceed it."""
        random = np.random.default_rng(0)
        queries = self._vectors[random.integers(len(self._vectors), size=_NUM_SAMPLED)]  # [S, D]
        num_near = max(1, round(len(self._centroids) * _SAMPLED_SHARE))
        differences = []
        for query, scores in zip(queries, queries @ self._centroids.T, strict=True):
            near = np.argsort(-scores)[1 : num_near + 1]
            for number in random.choice(near, min(len(near), _LISTS_SAMPLED), replace=False):
                rows = self._vectors[self.starts[number] : self.starts[number + 1]]  # [R, D]
                differences.append(rows @ query - scores[number])
        sorted_differences = np.sort(np.concatenate([np.zeros(1), *differences]))
        steps = np.arange(int(2 * _WIDEST * _STEPS) + 1) / _STEPS - _WIDEST
        below = np.searchsorted(sorted_differences, steps) / len(sorted_differences)
        return (1 - below).astype(np.float32)

    def scan(
        self,
        embeddings: NDArray[np.float32],
        k: int,
        lists: NDArray[np.int64],
        list_scores: NDArray[np.float32],
        selector: Any,
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Finds the k best of the rows in some lists.

        Args:
            embeddings: `[B, D]`, contiguous.
            k: At least 1.
            lists: `[B, P]` lists for each query; -1 for none.
            list_scores: `[B, L]` the score of each list's centroid.
            selector: FAISS selector of the rows that may be returned.

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
            faiss.SearchParametersIVF(nprobe=num_lists, sel=selector),
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


def _sizes(ivf: Any) -> NDArray[np.int64]:
    return np.array([ivf.invlists.list_size(number) for number in range(ivf.nlist)], dtype=np.int64)


def _ids(ivf: Any, number: int) -> NDArray[np.int64]:
    """The rows of a list; a view."""
    size = ivf.invlists.list_size(number)
    if size == 0:
        return np.empty(0, dtype=np.int64)
    return faiss.rev_swig_ptr(ivf.invlists.get_ids(number), size)  # type: ignore[no-any-return]
