"""The lists of an IVF index whose rows are numbered list by list.

Deliberately does not know which rows may be returned, nor when a search through lists is the best one.
"""

from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

_SPARE = 2
"""Lists are sorted for this many times the rows that are wanted, as lists hold uneven numbers of them."""


class Lists:
    """The L lists of one IVF index of N rows."""

    def __init__(self, ivf: Any) -> None:
        """Takes an IVF index whose rows `number_by_list` has numbered."""
        self._ivf = ivf
        self.starts = np.concatenate([[0], np.cumsum(_sizes(ivf))])
        """`[L + 1]` the first row of each list, and N."""
        self._centroids = ivf.quantizer.reconstruct_n(0, ivf.nlist)  # [L, D]
        self.can_scan = type(ivf) in (faiss.IndexIVFScalarQuantizer, faiss.IndexIVFFlat)
        """Whether `scan` knows how to look at the lists."""

    @property
    def size_bytes(self) -> int:
        """Memory of what is kept here."""
        return int(self.starts.nbytes + self._centroids.nbytes)

    def nearest(
        self, embeddings: NDArray[np.float32], counts: NDArray[np.int32], num_rows: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The lists nearest to each query until they hold so many rows together, those without any left out.

        Args:
            embeddings: `[B, D]`
            counts: `[L]` rows that count in each list.
            num_rows: How many of them are wanted.

        Returns:
            `[B, P]` lists, -1 where fewer are enough, and the score of each list's centroid.
        """
        num_lists = len(counts)
        num_filled = int(np.count_nonzero(counts))
        num_candidates = min(num_filled, 1 + _SPARE * num_filled * num_rows // max(1, int(counts.sum())))
        scores = embeddings @ self._centroids.T  # [B, L]
        scores[:, counts == 0] = -np.inf
        first = np.arange(len(embeddings))[:, None] * num_lists  # [B, 1]
        best = np.argpartition(scores, num_lists - num_candidates, axis=1)[:, num_lists - num_candidates :]  # [B, P]
        order = np.argsort(-scores.take(best + first), axis=1)  # [B, P]
        best = best.take(order + np.arange(len(embeddings))[:, None] * num_candidates)  # [B, P]
        held = counts[best]  # [B, P]
        is_enough_before = np.cumsum(held, axis=1) - held >= num_rows  # [B, P]
        similarities = scores.take(best + first)  # [B, P]
        best[is_enough_before] = -1
        return best[:, ~is_enough_before.all(axis=0)], similarities[:, ~is_enough_before.all(axis=0)]

    def scan(
        self,
        embeddings: NDArray[np.float32],
        k: int,
        lists: NDArray[np.int64],
        similarities: NDArray[np.float32],
        selector: Any,
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Finds the k best of the rows in some lists.

        Args:
            embeddings: `[B, D]`, contiguous.
            k: At least 1.
            lists: `[B, P]` lists for each query; -1 for none.
            similarities: `[B, P]` the score of each list's centroid.
            selector: FAISS selector of the rows that may be returned.

        Returns:
            `[B, K]` scores, falling, and rows; row -1 where fewer were found.
        """
        num_queries, num_lists = lists.shape
        scores = np.empty((num_queries, k), dtype=np.float32)
        rows = np.empty((num_queries, k), dtype=np.int64)
        lists, similarities = np.ascontiguousarray(lists), np.ascontiguousarray(similarities)
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
