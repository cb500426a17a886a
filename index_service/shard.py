"""One immutable index in memory: the items of one shard under one checkpoint version and one catalogue version.

Deliberately does not know gRPC, the object store, or which other versions are loaded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from index_service.ann import AnnIndex
from index_service.artefact import ArtefactManifest, LoadedArtefact
from towers.catalogue import ITEM_ID
from towers.errors import InvalidInputError

_LARGEST_SQUARED_NORM = 1.01
_EFFORT_GROWTH = 4
_NO_ROWS: NDArray[np.int64] = np.empty(0, dtype=np.int64)


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

    def __init__(self, artefact: LoadedArtefact) -> None:
        self.manifest: ArtefactManifest = artefact.manifest
        self.ann: AnnIndex = artefact.ann
        self.size_bytes: int = self.ann.size_bytes + artefact.items.nbytes + artefact.item_hashes.nbytes
        self._hashes = artefact.item_hashes
        items, num_items = artefact.items, artefact.manifest.num_items
        ids = _contiguous(items.column(ITEM_ID)).cast(pa.large_binary())
        # Plain buffers and not one object an item: a load must not hold the interpreter from the searches beside it.
        _, offsets, utf8 = ids.buffers()
        self._id_offsets = (
            np.frombuffer(offsets, dtype="<i8")[ids.offset : ids.offset + num_items + 1]
            if num_items
            else np.zeros(1, np.int64)
        )
        self._id_utf8: bytes = utf8.to_pybytes() if num_items else b""
        self._attributes = {
            name: _contiguous(items.column(name))
            for name in items.column_names
            if name != ITEM_ID and _is_servable(items.schema.field(name).type)
        }

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
    def attribute_names(self) -> tuple[str, ...]:
        """Attributes that can be asked for: strings, numbers, booleans, moments and lists of strings or numbers."""
        return tuple(self._attributes)

    def search(self, embeddings: NDArray[np.float32], k: int, excluded_rows: NDArray[np.int64] = _NO_ROWS) -> Hits:
        """Returns the k best items of each query: k whenever that many are not excluded.

        Args:
            embeddings: `[B, D]`, row i is the unit embedding of query i.
            k: At least 1.
            excluded_rows: Rows that must not be returned, each at most once.

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
        num_queries = len(embeddings)
        num_wanted = min(k, self.num_items - len(excluded_rows))
        if num_wanted < 1 or num_queries == 0:
            return Hits(np.zeros(num_queries, dtype=np.int64), np.empty(0, dtype=np.float32), _NO_ROWS)
        embeddings = np.ascontiguousarray(embeddings, dtype=np.float32)
        # FAISS holds only a pointer to the selectors: `excluded` and `allowed` must outlive the search.
        excluded = faiss.IDSelectorBatch(excluded_rows) if len(excluded_rows) else None
        allowed = faiss.IDSelectorNot(excluded) if excluded is not None else None
        scores, rows = self._search_wider(embeddings, num_wanted, allowed)  # [B, K], [B, K]
        is_hit = rows >= 0  # [B, K]
        return Hits(is_hit.sum(axis=1), scores[is_hit], rows[is_hit])

    def rows_of(self, item_ids: Sequence[str]) -> NDArray[np.int64]:
        """Rows of those ids that this shard holds, each once, rising."""
        wanted = list({item_id.encode() for item_id in item_ids})
        hashes = np.fromiter(map(xxhash.xxh3_64_intdigest, wanted), dtype=np.uint64, count=len(wanted))
        # [first, end) holds one row where this shard has the id, none where not, and more only where hashes collide.
        firsts = np.searchsorted(self._hashes, hashes).tolist()
        ends = np.searchsorted(self._hashes, hashes, side="right").tolist()
        found = [
            row
            for utf8, first, end in zip(wanted, firsts, ends, strict=True)
            for row in range(first, end)
            if self._utf8_id(row) == utf8
        ]
        return np.array(sorted(found), dtype=np.int64)

    def packed_ids(self, rows: NDArray[np.int64]) -> tuple[bytes, NDArray[np.int64]]:
        """UTF-8 ids of rows, one after another without a separator, and `[H]` the size of each in bytes."""
        starts, ends = self._id_offsets[rows], self._id_offsets[rows + 1]
        utf8 = self._id_utf8
        return b"".join(
            [utf8[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
        ), ends - starts

    def attribute_values(self, name: str, rows: NDArray[np.int64]) -> list[Any]:
        """One attribute of rows, None where an item has none.

        Raises:
            InvalidInputError: there is no such attribute.
        """
        column = self._attributes.get(name)
        if column is None:
            raise InvalidInputError(f"attribute_names: unknown attribute {name!r}; known: {sorted(self._attributes)}")
        return column.take(pa.array(rows)).to_pylist()  # type: ignore[no-any-return]

    def _utf8_id(self, row: int) -> bytes:
        return self._id_utf8[self._id_offsets[row] : self._id_offsets[row + 1]]

    def _search_wider(
        self, embeddings: NDArray[np.float32], k: int, allowed: Any
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Searches, and once more with more effort for the queries that came back short."""
        effort_k = k
        scores, rows = self.ann.search(embeddings, k, effort_k, allowed)  # [B, K], [B, K]
        while effort_k < self.ann.widest_k:
            is_short = rows[:, -1] < 0  # [B]
            if not is_short.any():
                break
            effort_k *= _EFFORT_GROWTH
            scores[is_short], rows[is_short] = self.ann.search(
                np.ascontiguousarray(embeddings[is_short]), k, effort_k, allowed
            )
        return scores, rows


def _contiguous(column: pa.ChunkedArray) -> pa.Array:
    combined = column.combine_chunks()
    return combined if isinstance(combined, pa.Array) else pa.concat_arrays(combined.chunks)


def _is_servable(kind: pa.DataType) -> bool:
    types = pa.types
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _is_string(kind.value_type) or _is_number(kind.value_type)
    return (
        _is_string(kind)
        or _is_number(kind)
        or any(is_kind(kind) for is_kind in (types.is_boolean, types.is_timestamp, types.is_date, types.is_null))
    )


def _is_string(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))
