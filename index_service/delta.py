"""What live updates put beside a built index: new items with their embeddings, and new attributes of built ones.

Deliberately does not know towers, nor where changes come from. Nothing here ever changes: an update makes a new part
out of an old one, so a view that a request holds stays as it is.
"""

from collections.abc import Collection, Sequence
from functools import cached_property, reduce
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from index_service.ann import AnnIndex, exact_index, vectors_of
from index_service.attributes import Attributes
from index_service.filters import Condition
from index_service.item_ids import ItemIds
from index_service.plan import EXACT, IndexPlan
from index_service.row_set import RowSet
from towers.catalogue_columns import ITEM_ID
from towers.placement import hashes_of

_EXACT_PLAN = IndexPlan(index_type=EXACT, settings=())
_LEAST_IN_LISTS = 10_000
"""Fewer items are scanned as fast as lists are chosen."""


class Segment:
    """N items with their embeddings and attributes."""

    def __init__(self, items: pa.Table, hashes: NDArray[np.uint64], ann: AnnIndex, filterable: Collection[str]) -> None:
        """Puts the parts together.

        Args:
            items: `item_id`, unique, and attributes.
            hashes: `[N]` of the ids.
            ann: Of the unit embeddings, row by row.
            filterable: The attributes that conditions may name.
        """
        self.items = items.combine_chunks()
        self.ids = ItemIds(items[ITEM_ID], hashes)
        self.ann = ann
        self.attributes = Attributes(self.items.drop_columns([ITEM_ID]), filterable)

    @classmethod
    def of(cls, items: pa.Table, embeddings: NDArray[np.float32], filterable: Collection[str]) -> "Segment":
        """Items and `[N, D]` their unit embeddings, to be scanned."""
        ann = AnnIndex(_EXACT_PLAN, None, exact_index(embeddings))
        return cls(items, hashes_of(items[ITEM_ID].to_pylist()), ann, filterable)

    @classmethod
    def empty(cls, dim: int, filterable: Collection[str]) -> "Segment":
        """No items."""
        return cls.of(pa.table({ITEM_ID: pa.array([], pa.string())}), np.empty((0, dim), dtype=np.float32), filterable)

    @property
    def num_items(self) -> int:
        """N."""
        return self.ann.num_items

    @property
    def size_bytes(self) -> int:
        """Memory of the items, their embeddings and the index."""
        return self.ann.size_bytes + self.ids.size_bytes + self.attributes.size_bytes

    def without(self, rows: NDArray[np.int64]) -> "Segment":
        """The same without some rows, to be scanned."""
        if len(rows) == 0:
            return self
        kept = np.setdiff1d(np.arange(self.num_items), rows, assume_unique=True)
        ann = AnnIndex(_EXACT_PLAN, None, exact_index(self.ann.vectors[kept]))
        return Segment(self.items.take(pa.array(kept)), self.ids.hashes[kept], ann, self.attributes.filterable)

    def joined(self, other: "Segment") -> "Segment":
        """These items, then those of another segment that has none of them, to be scanned."""
        if other.num_items == 0:
            return self
        ann = AnnIndex(_EXACT_PLAN, None, exact_index(np.concatenate((self.ann.vectors, other.ann.vectors))))
        items, hashes = _joined((self, other))
        return Segment(items, hashes, ann, self.attributes.filterable)


def sealed(like: AnnIndex, old: Segment, is_kept: RowSet, new: Segment) -> Segment:
    """Some items of one segment and all of another, behind the lists of a built index where it has lists.

    Args:
        like: The built index.
        old: What was sealed before, or nothing.
        is_kept: The rows of it that are kept.
        new: What comes to it.
    """
    lists = like.empty_like()
    rows = np.concatenate((is_kept.rows, np.arange(old.num_items, old.num_items + new.num_items)))
    if len(rows) < _LEAST_IN_LISTS:
        lists = None
    if lists is not None:
        numbers = np.concatenate([_list_numbers(lists, segment.ann) for segment in (old, new)])[rows]
        # The rows of a list are together, as in a built index.
        order = np.argsort(numbers, kind="stable")
        rows, numbers = rows[order], numbers[order]
    # FAISS gathers without holding the interpreter, NumPy would keep searches waiting.
    both = faiss.IndexFlatIP(like.dim)
    for segment in (old, new):
        both.add(segment.ann.vectors)
    exact = exact_index(both.reconstruct_batch(rows))
    items, hashes = _joined((old, new))
    if lists is None:
        ann = AnnIndex(_EXACT_PLAN, None, exact)
    else:
        # What each vector is nearest to is known: adding does not look for it again.
        new_rows = np.arange(len(rows))
        lists.add_core(len(rows), *map(faiss.swig_ptr, (vectors_of(exact), new_rows, numbers)))
        ann = AnnIndex(IndexPlan(index_type=f"IVF{lists.nlist},Flat", settings=like.settings), lists, exact)
        ann.lists  # noqa: B018  Made here rather than by the first search.
    return Segment(items.take(pa.array(rows)), hashes[rows], ann, new.attributes.filterable)


class Patches:
    """New attributes of items whose embedding stays: P rows of a built index."""

    def __init__(self, rows: NDArray[np.int64], items: pa.Table, filterable: Collection[str]) -> None:
        """Takes `[P]` rows, each once, and their `item_id` and attributes."""
        order = np.argsort(rows)
        self.rows = rows[order]
        self.items = items.take(pa.array(order)).combine_chunks()
        self.attributes = Attributes(self.items.drop_columns([ITEM_ID]), filterable)

    @property
    def size_bytes(self) -> int:
        """Memory of the attributes."""
        return self.attributes.size_bytes + self.rows.nbytes

    def under(self, newer: "Patches") -> "Patches":
        """One of both; where they have the same row, the newer."""
        kept = np.flatnonzero(~np.isin(self.rows, newer.rows))
        items = pa.concat_tables((self.items.take(pa.array(kept)), newer.items), promote_options="default")
        return Patches(np.concatenate((self.rows[kept], newer.rows)), items, newer.attributes.filterable)

    def patched(self, matching: RowSet, condition: Condition) -> RowSet:
        """The rows that meet a condition, given those that meet it by the attributes that they had before."""
        unpatched = matching - RowSet.of_rows(self.rows, matching.num_rows)
        return unpatched | RowSet.of_rows(self.rows[self.attributes.matching(condition).rows], matching.num_rows)

    def patch(self, values: list[Any], name: str, rows: NDArray[np.int64]) -> None:
        """Puts new values of an attribute in place of those that some rows had before."""
        places = np.minimum(np.searchsorted(self.rows, rows), len(self.rows) - 1)
        patched = np.flatnonzero(self.rows[places] == rows)
        for place, value in zip(patched.tolist(), values_of(self.attributes, name, places[patched]), strict=True):
            values[place] = value


class PatchStack:
    """Patches of one index, the newest on top. Levels at least double downwards, so there are few of them."""

    def __init__(self, levels: Sequence[Patches] = ()) -> None:
        self.levels = tuple(levels)

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        """All rows with new attributes, rising."""
        return np.unique(np.concatenate([np.empty(0, dtype=np.int64), *(level.rows for level in self.levels)]))

    def merged(self, alive: RowSet) -> Patches:
        """One for all, without rows that are not alive."""
        nothing = Patches(np.empty(0, dtype=np.int64), pa.table({ITEM_ID: pa.array([], pa.string())}), ())
        merged = reduce(Patches.under, self.levels, nothing)
        kept = alive.contains(merged.rows)
        return Patches(merged.rows[kept], merged.items.filter(pa.array(kept)), merged.attributes.filterable)

    def on_top(self, patches: Patches) -> "PatchStack":
        """With newer patches."""
        levels = list(self.levels)
        while levels and len(levels[-1].rows) < 2 * len(patches.rows):
            patches = levels.pop().under(patches)
        return PatchStack((*levels, patches))


def values_of(attributes: Attributes, name: str, rows: NDArray[np.int64]) -> list[Any]:
    """One attribute of rows; None where an item has none, or none of the items has."""
    return attributes.values(name, rows) if name in attributes.names else [None] * len(rows)


def _joined(segments: Sequence[Segment]) -> tuple[pa.Table, NDArray[np.uint64]]:
    items = pa.concat_tables([segment.items for segment in segments], promote_options="default")
    return items, np.concatenate([segment.ids.hashes for segment in segments])


def _list_numbers(lists: Any, ann: AnnIndex) -> NDArray[np.int64]:
    """`[N]` the list that each vector belongs to."""
    if ann.lists is not None:
        return np.repeat(np.arange(lists.nlist), np.diff(ann.lists.starts))
    if ann.num_items == 0:
        return np.empty(0, dtype=np.int64)
    numbers: NDArray[np.int64] = lists.quantizer.search(ann.vectors, 1)[1][:, 0]
    return numbers
