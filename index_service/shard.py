"""One immutable index in memory: the items of one shard under one checkpoint version and one catalogue version.

Deliberately does not know gRPC, the object store, or which other versions are loaded.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from index_service.ann import AnnIndex
from index_service.artefact import ArtefactManifest, LoadedArtefact
from index_service.attributes import Attributes
from index_service.filters import Condition
from index_service.planner import search_allowed
from index_service.row_set import RowSet, joined_ranges
from towers.catalogue import ITEM_ID
from towers.errors import InvalidInputError

_LARGEST_SQUARED_NORM = 1.01


@dataclass(frozen=True)
class Hits:
    """Results of B queries, H hits in all: those of query 0 first, best first within a query."""

    counts: NDArray[np.int64]
    """`[B]` hits of each query."""
    scores: NDArray[np.float32]
    """`[H]`"""
    rows: NDArray[np.int64]
    """`[H]`"""


class ShardIndex:
    """A loaded index. Never changes, so any number of threads may search it."""

    def __init__(self, artefact: LoadedArtefact, filterable: Collection[str] = ()) -> None:
        """Prepares what searches need.

        Args:
            artefact: The index.
            filterable: The attributes that conditions may name.
        """
        self.manifest: ArtefactManifest = artefact.manifest
        self.ann: AnnIndex = artefact.ann
        self.attributes = Attributes(artefact.items.drop_columns([ITEM_ID]), filterable)
        """Of the items, row by row."""
        self.attributes.prepare()
        self._by_hash = np.argsort(artefact.item_hashes, kind="stable").astype(np.int32)  # [N]
        self._hashes = artefact.item_hashes[self._by_hash]  # [N], rising
        ids = artefact.items.column(ITEM_ID).combine_chunks().cast(pa.large_binary())
        # Plain buffers and not one object an item: a load must not hold the interpreter from the searches beside it.
        self._id_offsets, self._id_bytes = _binary_buffers(ids)
        self._all = RowSet.everything(self.num_items)

    def __str__(self) -> str:
        return f"checkpoint {self.manifest.checkpoint_version} at catalogue {self.manifest.catalogue_version}"

    @property
    def checkpoint_version(self) -> int:
        """The checkpoint whose item tower made the embeddings."""
        return self.manifest.checkpoint_version

    @property
    def num_items(self) -> int:
        """N."""
        return self.manifest.num_items

    @property
    def size_bytes(self) -> int:
        """Memory of the index, its vectors, ids and attributes."""
        ids = (self._by_hash, self._hashes, self._id_offsets, self._id_bytes)
        return self.ann.size_bytes + self.attributes.size_bytes + sum(part.nbytes for part in ids)

    @property
    def attribute_names(self) -> tuple[str, ...]:
        """Attributes that can be asked for: strings, numbers, booleans, moments and lists of strings or numbers."""
        return self.attributes.names

    def search(
        self,
        embeddings: NDArray[np.float32],
        k: int,
        condition: Condition | None = None,
        excluded_item_ids: Sequence[str] = (),
    ) -> Hits:
        """Returns the k best items of each query: k whenever that many are allowed.

        Args:
            embeddings: `[B, D]`, row i is the unit embedding of query i.
            k: At least 1.
            condition: What items must meet; None: nothing.
            excluded_item_ids: Items that must not be returned; unknown ids are ignored.

        Raises:
            InvalidInputError: the embeddings have another dimension, are not finite or are longer than 1, k is below
                1, or the condition names an attribute that is not filterable or holds another kind of value.
        """
        allowed = self._all if condition is None else self.attributes.matching(condition)
        if excluded_item_ids:
            allowed -= RowSet.of_rows(self.rows_of(excluded_item_ids), self.num_items)
        return self.search_rows(embeddings, k, allowed)

    def search_rows(self, embeddings: NDArray[np.float32], k: int, allowed: RowSet) -> Hits:
        """Returns the k best of some items for each query: k whenever that many are allowed.

        Args:
            embeddings: `[B, D]`, row i is the unit embedding of query i.
            k: At least 1.
            allowed: The rows that may be returned.

        Raises:
            InvalidInputError: the embeddings have another dimension, are not finite or are longer than 1, or k is
                below 1.
        """
        # FAISS itself only asserts these, and under `python -O` it would read out of bounds.
        if embeddings.ndim != 2 or embeddings.shape[1] != self.manifest.dim:
            raise InvalidInputError(
                f"query_embeddings: the shape is {list(embeddings.shape)}, "
                f"checkpoint {self.checkpoint_version} has dimension {self.manifest.dim}"
            )
        if not np.isfinite(embeddings).all():
            raise InvalidInputError("query_embeddings: not all numbers are finite")
        if (np.einsum("bd,bd->b", embeddings, embeddings) > _LARGEST_SQUARED_NORM).any():
            raise InvalidInputError("query_embeddings: the rows must be unit vectors")
        if k < 1:
            raise InvalidInputError(f"k is {k}; ask for at least 1")
        embeddings = np.ascontiguousarray(embeddings, dtype=np.float32)
        scores, rows = search_allowed(self.ann, embeddings, k, allowed)  # [B, K], [B, K]
        # There are always as many as allowed, up to k.
        return Hits(np.full(len(rows), rows.shape[1]), scores.reshape(-1), rows.reshape(-1))

    def rows_of(self, item_ids: Sequence[str]) -> NDArray[np.int64]:
        """Rows of those ids that this shard holds, each once, rising."""
        wanted = [item_id.encode() for item_id in item_ids]
        digests = b"".join(map(xxhash.xxh3_64_digest, wanted))
        hashes = np.frombuffer(digests, dtype=">u8").astype(np.uint64)
        order = np.argsort(hashes)  # Neighbours are looked for in neighbouring memory.
        # [first, end) holds one row where this shard has the id, none where not, and more only where hashes collide.
        firsts = np.searchsorted(self._hashes, hashes[order])
        ends = np.searchsorted(self._hashes, hashes[order], side="right")
        rows: NDArray[np.int64] = self._by_hash[joined_ranges(firsts, ends)].astype(np.int64)
        positions = np.repeat(order, ends - firsts)
        sizes = np.fromiter(map(len, wanted), dtype=np.int64, count=len(wanted))[positions]
        starts = self._id_offsets[rows]
        has_size = self._id_offsets[rows + 1] - starts == sizes
        rows, positions, sizes, starts = rows[has_size], positions[has_size], sizes[has_size], starts[has_size]
        if len(rows) == 0:
            return rows
        found = self._id_bytes[joined_ranges(starts, starts + sizes)]
        expected = np.frombuffer(b"".join([wanted[position] for position in positions.tolist()]), dtype=np.uint8)
        is_same: NDArray[np.bool_] = np.logical_and.reduceat(found == expected, np.cumsum(sizes) - sizes)
        return np.unique(rows[is_same])

    def packed_ids(self, rows: NDArray[np.int64]) -> tuple[bytes, NDArray[np.int64]]:
        """UTF-8 ids of rows, one after another without a separator, and `[H]` the size of each in bytes."""
        starts, ends = self._id_offsets[rows], self._id_offsets[rows + 1]
        return self._id_bytes[joined_ranges(starts, ends)].tobytes(), ends - starts

    def attribute_values(self, name: str, rows: NDArray[np.int64]) -> list[Any]:
        """One attribute of rows, None where an item has none.

        Raises:
            InvalidInputError: there is no such attribute.
        """
        return self.attributes.values(name, rows)


def _binary_buffers(column: pa.Array) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """`[N + 1]` where each value starts, and where the last ends, and all their bytes."""
    if len(column) == 0:
        return np.zeros(1, dtype=np.int64), np.empty(0, dtype=np.uint8)
    _, offsets, content = column.buffers()
    starts = np.frombuffer(offsets, dtype=np.int64)[column.offset : column.offset + len(column) + 1]
    return starts, np.frombuffer(content, dtype=np.uint8)
