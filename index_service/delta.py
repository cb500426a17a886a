"""What live updates put beside a built index: new items with their embeddings, and new attributes of built ones.

Deliberately does not know towers, nor where changes come from. Nothing here ever changes: an update makes a new part
out of an old one, so a view that a request holds stays as it is.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from index_service.ann import AnnIndex, exact_index
from index_service.plan import EXACT, IndexPlan
from towers.catalogue import ITEM_ID
from towers.errors import InvalidInputError

_EXACT_PLAN = IndexPlan(index_type=EXACT, settings=())


class Segment:
    """N items with their embeddings and attributes."""

    def __init__(self, items: pa.Table, embeddings: NDArray[np.float32]) -> None:
        """Takes the items, `item_id` and attributes with unique ids, and `[N, D]` their unit embeddings."""
        self.items = items.combine_chunks()
        self.ann = AnnIndex(_EXACT_PLAN, None, exact_index(embeddings))
        ids = _one_chunk(self.items[ITEM_ID]).cast(pa.large_binary())
        self._ids: list[bytes] = ids.to_pylist()
        hashes = np.fromiter(map(xxhash.xxh3_64_intdigest, self._ids), dtype=np.uint64, count=len(self._ids))
        self._order = np.argsort(hashes)
        self._hashes = hashes[self._order]

    @property
    def embeddings(self) -> NDArray[np.float32]:
        """`[N, D]`"""
        return self.ann.vectors

    @classmethod
    def empty(cls, dim: int) -> "Segment":
        """No items."""
        return cls(pa.table({ITEM_ID: pa.array([], pa.string())}), np.empty((0, dim), dtype=np.float32))

    @property
    def num_items(self) -> int:
        """N."""
        return len(self._ids)

    @property
    def size_bytes(self) -> int:
        """Memory of the items and their embeddings."""
        return int(self.items.nbytes + self.ann.size_bytes + self._hashes.nbytes + self._order.nbytes)

    def without(self, rows: NDArray[np.int64]) -> "Segment":
        """The same without some rows."""
        if len(rows) == 0:
            return self
        is_kept = np.ones(self.num_items, dtype=bool)
        is_kept[rows] = False
        return Segment(self.items.filter(pa.array(is_kept)), self.embeddings[is_kept])

    def joined(self, other: "Segment") -> "Segment":
        """These items, then those of another segment that has none of them."""
        if other.num_items == 0:
            return self
        items = pa.concat_tables((self.items, other.items), promote_options="default")
        return Segment(items, np.concatenate((self.embeddings, other.embeddings)))

    def rows_of(self, item_ids: Iterable[str]) -> NDArray[np.int64]:
        """Rows of those ids that this segment holds, each once, rising."""
        if self.num_items == 0:
            return np.empty(0, dtype=np.int64)
        wanted = {item_id.encode() for item_id in item_ids}
        hashes = np.fromiter(map(xxhash.xxh3_64_intdigest, wanted), dtype=np.uint64, count=len(wanted))
        firsts = np.searchsorted(self._hashes, hashes)
        ends = np.searchsorted(self._hashes, hashes, side="right")
        # A hash names one row, or none, and more only where hashes collide.
        near = [
            self._order[first:end] for first, end in zip(firsts.tolist(), ends.tolist(), strict=True) if end > first
        ]
        return np.array(
            sorted(row for rows in near for row in rows.tolist() if self._ids[row] in wanted), dtype=np.int64
        )

    def utf8_ids(self, rows: NDArray[np.int64]) -> list[bytes]:
        """Ids of rows."""
        return [self._ids[row] for row in rows.tolist()]

    def search(
        self, embeddings: NDArray[np.float32], k: int, excluded_rows: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Finds the k best items exactly.

        Returns:
            `[B, K]` scores, falling, and rows; row -1 where there are fewer.
        """
        if len(excluded_rows) == 0:
            return self.ann.search_exactly(embeddings, k)
        is_allowed = np.ones(self.num_items, dtype=bool)
        is_allowed[excluded_rows] = False
        return self.ann.search_exactly(embeddings, k, np.flatnonzero(is_allowed))


class Patches:
    """New attributes of items whose embedding stays: P rows of a built index."""

    def __init__(self, rows: NDArray[np.int64], attributes: pa.Table) -> None:
        """Takes `[P]` rows, rising, and their attributes."""
        self.rows = rows
        self.attributes = attributes.combine_chunks()

    @classmethod
    def empty(cls) -> "Patches":
        """None."""
        return cls(np.empty(0, dtype=np.int64), pa.table({}))

    @property
    def names(self) -> tuple[str, ...]:
        """Attributes that patched items have."""
        return tuple(self.attributes.column_names)

    @property
    def size_bytes(self) -> int:
        """Memory of the attributes."""
        return int(self.attributes.nbytes + self.rows.nbytes)

    def replaced(self, rows: NDArray[np.int64], attributes: pa.Table) -> "Patches":
        """With the attributes of more rows, each at most once; what these rows had before is gone."""
        kept = self.without(rows)
        order = np.argsort(np.concatenate((kept.rows, rows)))
        table = pa.concat_tables((kept.attributes, attributes), promote_options="default")
        return Patches(np.concatenate((kept.rows, rows))[order], table.take(pa.array(order)))

    def without(self, rows: NDArray[np.int64]) -> "Patches":
        """The same without some rows."""
        is_kept = ~np.isin(self.rows, rows)
        return self if is_kept.all() else Patches(self.rows[is_kept], self.attributes.filter(pa.array(is_kept)))

    def apply(self, values: list[Any], name: str, rows: NDArray[np.int64]) -> list[Any]:
        """The values of an attribute of rows, with those of patched rows in their place."""
        if len(self.rows) == 0:
            return values
        places = np.minimum(np.searchsorted(self.rows, rows), len(self.rows) - 1)
        patched = np.flatnonzero(self.rows[places] == rows)
        if len(patched) == 0:
            return values
        known = name in self.attributes.column_names
        new = self.attributes[name].take(pa.array(places[patched])).to_pylist() if known else [None] * len(patched)
        for place, value in zip(patched.tolist(), new, strict=True):
            values[place] = value
        return values


def values_of(items: pa.Table, name: str, rows: NDArray[np.int64]) -> list[Any]:
    """One attribute of rows; None where an item has none, or the table no such column."""
    if name not in items.column_names:
        return [None] * len(rows)
    return items[name].take(pa.array(rows)).to_pylist()  # type: ignore[no-any-return]


def unknown_attribute(name: str, known: Sequence[str]) -> InvalidInputError:
    """What a request for an attribute that no item has gets."""
    return InvalidInputError(f"attribute_names: unknown attribute {name!r}; known: {sorted(known)}")


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    combined = column.combine_chunks()
    return combined if isinstance(combined, pa.Array) else pa.concat_arrays(combined.chunks)
