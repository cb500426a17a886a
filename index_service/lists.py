"""The lists of an IVF index whose rows are numbered list by list.

Deliberately does not know why rows may be returned or not, nor when a search through lists is the best one.
"""

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import faiss
import numpy as np
from numpy.typing import NDArray

from index_service.row_set import RowSet

_SPARE = 2
"""Lists are sorted for this many times the rows that are wanted, as lists hold uneven numbers of them."""
_TINY = 1e-9


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
    concentration: float
    """0: each list has the same share of the set; 1: each list is wholly in it or out, so the set is a region."""


class Lists:
    """The L lists of one IVF index of N rows."""

    def __init__(self, ivf: Any) -> None:
        """Takes an IVF index whose rows `number_by_list` has numbered."""
        self._ivf = ivf
        self._sizes = _sizes(ivf)
        self.starts = np.concatenate([[0], np.cumsum(self._sizes)])
        """`[L + 1]` the first row of each list, and N."""
        self._per_row = 1 / np.maximum(self._sizes, 1)  # [L]
        self._centroids = ivf.quantizer.reconstruct_n(0, ivf.nlist)  # [L, D]
        self._reaches: WeakKeyDictionary[RowSet, Reach] = WeakKeyDictionary()
        self.can_scan = type(ivf) in (faiss.IndexIVFScalarQuantizer, faiss.IndexIVFFlat)
        """Whether `scan` knows how to look at the lists."""

    @property
    def size_bytes(self) -> int:
        """Memory of what is kept here."""
        return int(self.starts.nbytes + self._sizes.nbytes + self._per_row.nbytes + self._centroids.nbytes)

    def reach(self, allowed: RowSet) -> "Reach":
        """Where the allowed rows are; made once for a set."""
        reach = self._reaches.get(allowed)
        if reach is None:
            counts = allowed.counts_between(self.starts)  # [L]
            share = allowed.count / self.starts[-1]
            differences = counts * self._per_row - share  # [L]
            variance = float(differences * differences @ self._sizes) / self.starts[-1]
            reach = Reach(
                counts=counts,
                num_rows=allowed.count,
                penalties=np.where(counts > 0, np.float32(0), np.float32(-np.inf)),
                num_filled=int(np.count_nonzero(counts)),
                concentration=min(1.0, variance / max(share * (1 - share), _TINY)),
            )
            self._reaches[allowed] = reach
        return reach

    def nearest(
        self, embeddings: NDArray[np.float32], reach: "Reach", num_rows: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The lists nearest to each query until they hold so many allowed rows together; those without any left out.

        Args:
            embeddings: `[B, D]`
            reach: Where the allowed rows are.
            num_rows: How many of them are wanted.

        Returns:
            `[B, P]` lists, -1 where fewer are enough, and the score of each list's centroid.
        """
        num_lists = len(reach.counts)
        num_best = min(reach.num_filled, 1 + _SPARE * reach.num_filled * num_rows // max(1, reach.num_rows))
        scores = embeddings @ self._centroids.T + reach.penalties  # [B, L]
        query = np.arange(len(embeddings))[:, None]  # [B, 1]
        best = np.argpartition(scores, num_lists - num_best, axis=1)[:, num_lists - num_best :]  # [B, P]
        # `take` with one number a place is several times faster here than an index of two.
        similarities = scores.take(best + query * num_lists)  # [B, P]
        order = np.argsort(-similarities, axis=1) + query * num_best  # [B, P]
        best, similarities = best.take(order), similarities.take(order)  # [B, P], [B, P]
        held = reach.counts[best]  # [B, P]
        is_wanted = np.cumsum(held, axis=1) - held < num_rows  # [B, P]
        num_needed = int(is_wanted.sum(axis=1).max())
        best[~is_wanted] = -1
        return best[:, :num_needed], similarities[:, :num_needed]

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
