"""The ids of the rows of an index: packed for answers, and found by their hash.

Deliberately does not know what the rows hold.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from index_service.row_set import joined_ranges


class ItemIds:
    """Unique ids of N rows. Never change."""

    def __init__(self, ids: pa.ChunkedArray, hashes: NDArray[np.uint64]) -> None:
        """Takes `[N]` strings and `[N]` their hashes, see `hashes_of`."""
        self.hashes = hashes
        self._by_hash = np.argsort(hashes, kind="stable").astype(np.int32)  # [N]
        self._sorted_hashes = hashes[self._by_hash]  # [N], rising
        # Plain buffers and not one object an item: a load must not hold the interpreter from the searches beside it.
        self._offsets, self._utf8 = _buffers(pa.concat_arrays(ids.cast(pa.large_binary()).chunks or [_NO_IDS]))

    @property
    def size_bytes(self) -> int:
        """Memory of the ids."""
        parts = (self.hashes, self._by_hash, self._sorted_hashes, self._offsets, self._utf8)
        return sum(part.nbytes for part in parts)

    def rows_of(self, item_ids: Sequence[str]) -> NDArray[np.int64]:
        """Rows of those ids that are there, each once, rising."""
        wanted = [item_id.encode() for item_id in item_ids]
        hashes = _hashes(wanted)
        order = np.argsort(hashes)  # Neighbours are looked for in neighbouring memory.
        # [first, end) holds one row where the id is there, none where not, and more only where hashes collide.
        firsts = np.searchsorted(self._sorted_hashes, hashes[order])
        ends = np.searchsorted(self._sorted_hashes, hashes[order], side="right")
        rows: NDArray[np.int64] = self._by_hash[joined_ranges(firsts, ends)].astype(np.int64)
        positions = np.repeat(order, ends - firsts)
        sizes = np.fromiter(map(len, wanted), dtype=np.int64, count=len(wanted))[positions]
        starts = self._offsets[rows]
        has_size = self._offsets[rows + 1] - starts == sizes
        rows, positions, sizes, starts = rows[has_size], positions[has_size], sizes[has_size], starts[has_size]
        if len(rows) == 0:
            return rows
        found = self._utf8[joined_ranges(starts, starts + sizes)]
        expected = np.frombuffer(b"".join([wanted[position] for position in positions.tolist()]), dtype=np.uint8)
        is_same: NDArray[np.bool_] = np.logical_and.reduceat(found == expected, np.cumsum(sizes) - sizes)
        return np.unique(rows[is_same])

    def packed(self, rows: NDArray[np.int64]) -> tuple[bytes, NDArray[np.int64]]:
        """UTF-8 ids of rows, one after another without a separator, and `[H]` the size of each in bytes."""
        starts, ends = self._offsets[rows], self._offsets[rows + 1]
        return self._utf8[joined_ranges(starts, ends)].tobytes(), ends - starts

    def utf8(self, rows: NDArray[np.int64]) -> list[bytes]:
        """Ids of rows, one by one."""
        packed, sizes = self.packed(rows)
        ends = np.cumsum(sizes).tolist()
        return [packed[end - size : end] for end, size in zip(ends, sizes.tolist(), strict=True)]


def hashes_of(item_ids: Iterable[str]) -> NDArray[np.uint64]:
    """xxh3_64 of each id."""
    return _hashes([item_id.encode() for item_id in item_ids])


_NO_IDS = pa.array([], pa.large_binary())


def _hashes(utf8: Sequence[bytes]) -> NDArray[np.uint64]:
    return np.frombuffer(b"".join(map(xxhash.xxh3_64_digest, utf8)), dtype=">u8").astype(np.uint64)


def _buffers(column: pa.Array) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """`[N + 1]` where each value starts, and where the last ends, and all their bytes."""
    if len(column) == 0:
        return np.zeros(1, dtype=np.int64), np.empty(0, dtype=np.uint8)
    _, offsets, content = column.buffers()
    starts = np.frombuffer(offsets, dtype=np.int64)[column.offset : column.offset + len(column) + 1]
    return starts, np.frombuffer(content, dtype=np.uint8)
