"""One immutable index in memory: the items of one shard under one checkpoint version and one catalogue version.

Deliberately does not know gRPC, the object store, or which other versions are loaded.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from index_service.ann import AnnIndex
from index_service.artefact import ArtefactManifest, LoadedArtefact
from index_service.attributes import Attributes
from index_service.filters import Condition
from index_service.item_ids import ItemIds
from index_service.planner import search_allowed
from index_service.row_set import RowSet
from towers.catalogue_columns import ITEM_ID
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
        self.ids = ItemIds(artefact.items.column(ITEM_ID), artefact.item_hashes)
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
        return self.ann.size_bytes + self.attributes.size_bytes + self.ids.size_bytes

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
        self.require_queries(embeddings)
        if k < 1:
            raise InvalidInputError(f"k is {k}; ask for at least 1")
        embeddings = np.ascontiguousarray(embeddings, dtype=np.float32)
        scores, rows = search_allowed(self.ann, embeddings, k, allowed)  # [B, K], [B, K]
        # There are always as many as allowed, up to k.
        return Hits(np.full(len(rows), rows.shape[1]), scores.reshape(-1), rows.reshape(-1))

    def require_queries(self, embeddings: NDArray[np.float32]) -> None:
        """Refuses what cannot be the embeddings of queries.

        Raises:
            InvalidInputError: they have another dimension, are not finite or are longer than 1.
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

    def rows_of(self, item_ids: Sequence[str]) -> NDArray[np.int64]:
        """Rows of those ids that this shard holds, each once, rising."""
        return self.ids.rows_of(item_ids)

    def packed_ids(self, rows: NDArray[np.int64]) -> tuple[bytes, NDArray[np.int64]]:
        """UTF-8 ids of rows, one after another without a separator, and `[H]` the size of each in bytes."""
        return self.ids.packed(rows)
