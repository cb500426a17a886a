"""The ids of the rows of an index: packed for answers, and found by their hash.

Deliberately does not know what the rows hold.
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from index_service.row_set import distinct, joined_ranges
from towers.placement import hashes_of


class WantedIds:
    """Ids that are looked for, perhaps in several indexes: hashed once."""

    def __init__(self, item_ids: Sequence[str]) -> None:
        self._item_ids = item_ids

    @cached_property
    def utf8(self) -> pa.Array:
        """`[W]`"""
        return pa.array(self._item_ids, pa.large_string()).cast(pa.large_binary())

    @cached_property
    def sorted_hashes(self) -> NDArray[np.uint64]:
        """`[W]`, rising: neighbours are looked for in neighbouring memory."""
        return self._hashes[self.order]

    @cached_property
    def order(self) -> NDArray[np.int64]:
        """`[W]` which id each of the sorted hashes belongs to."""
        return np.argsort(self._hashes)

    @cached_property
    def _hashes(self) -> NDArray[np.uint64]:
        return hashes_of(self._item_ids)


class ItemIds:
    """Unique ids of N rows. Never change."""

    def __init__(self, ids: pa.ChunkedArray, hashes: NDArray[np.uint64]) -> None:
        """Takes `[N]` strings and `[N]` their hashes, see `hashes_of`."""
        self.hashes = hashes
        self._by_hash = np.argsort(hashes, kind="stable").astype(np.int32)  # [N]
        self._sorted_hashes = hashes[self._by_hash]  # [N], rising
        # Plain buffers and not one object an item: a load must not hold the interpreter from the searches beside it.
        self._ids = pa.concat_arrays(ids.cast(pa.large_binary()).chunks or [_NO_IDS])
        self._offsets, self._utf8 = _buffers(self._ids)

    @property
    def size_bytes(self) -> int:
        """Memory of the ids."""
        parts = (self.hashes, self._by_hash, self._sorted_hashes, self._offsets, self._utf8)
        return sum(part.nbytes for part in parts)

    def rows_of(self, item_ids: Sequence[str]) -> NDArray[np.int64]:
        """Rows of those ids that are there, each once, rising."""
        return self.find(WantedIds(item_ids))

    def find(self, wanted: WantedIds) -> NDArray[np.int64]:
        """Rows of those ids that are there, each once, rising."""
        num = len(self._sorted_hashes)
        if num == 0:
            return np.empty(0, dtype=np.int64)
        places = np.searchsorted(self._sorted_hashes, wanted.sorted_hashes)  # [W]
        positions = np.arange(len(places))
        found = []
        # Once, unless ids of this index share a hash: the others are then the next ones.
        while len(places):
            is_alike = self._sorted_hashes[np.minimum(places, num - 1)] == wanted.sorted_hashes[positions]
            is_alike &= places < num
            places, positions = places[is_alike], positions[is_alike]
            rows = self._by_hash[places].astype(np.int64)
            is_same = pc.equal(self._ids.take(pa.array(rows)), wanted.utf8.take(pa.array(wanted.order[positions])))
            is_same = is_same.to_numpy(zero_copy_only=False)
            found.append(rows[is_same])
            places, positions = places[~is_same] + 1, positions[~is_same]
        return distinct(np.concatenate([np.empty(0, dtype=np.int64), *found]))

    def packed(self, rows: NDArray[np.int64]) -> tuple[bytes, NDArray[np.int64]]:
        """UTF-8 ids of rows, one after another without a separator, and `[H]` the size of each in bytes."""
        starts, ends = self._offsets[rows], self._offsets[rows + 1]
        return self._utf8[joined_ranges(starts, ends)].tobytes(), ends - starts

    def utf8(self, rows: NDArray[np.int64]) -> list[bytes]:
        """Ids of rows, one by one."""
        packed, sizes = self.packed(rows)
        ends = np.cumsum(sizes).tolist()
        return [packed[end - size : end] for end, size in zip(ends, sizes.tolist(), strict=True)]


_NO_IDS = pa.array([], pa.large_binary())


def _buffers(column: pa.Array) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """`[N + 1]` where each value starts, and where the last ends, and all their bytes."""
    if len(column) == 0:
        return np.zeros(1, dtype=np.int64), np.empty(0, dtype=np.uint8)
    _, offsets, content = column.buffers()
    starts = np.frombuffer(offsets, dtype=np.int64)[column.offset : column.offset + len(column) + 1]
    return starts, np.frombuffer(content, dtype=np.uint8)
