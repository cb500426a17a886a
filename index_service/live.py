"""One searchable checkpoint version: a built index, and all that changed in the catalogue since it was built.

Deliberately does not know gRPC, the object store, where changes come from, or which other versions are loaded.

A view is a state: it never changes, and goes when the last request that holds it ends. An update makes the next view
out of parts of the last, so requests and updates never wait for each other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from index_service.attributes import Attributes
from index_service.delta import Patches, Segment, unknown_attribute, values_of
from index_service.embed import embed_items
from index_service.feed import Changes
from index_service.filters import Condition
from index_service.row_set import RowSet
from index_service.shard import Hits, ShardIndex
from towers.catalogue import ITEM_ID
from towers.tower import Tower

_Value = TypeVar("_Value")
_UNKNOWN = object()
_SMALLEST_REBUILD = 10_000
"""Changed items below which a rebuild is not worth its process."""


@dataclass(frozen=True)
class LiveView:
    """A built index of N items and a delta of M: row r is the built one's below N, the delta's row r - N from there."""

    base: ShardIndex
    catalogue_version: str
    tombstones: NDArray[np.int64]
    """Rows of the built index that were replaced or deleted, rising."""
    patches: Patches
    delta: Segment
    quarantined_ids: frozenset[str] = field(default_factory=frozenset)
    """Items that an update could not embed."""

    @property
    def checkpoint_version(self) -> int:
        """The checkpoint whose item tower made all embeddings."""
        return self.base.checkpoint_version

    @property
    def dim(self) -> int:
        """D."""
        return self.base.manifest.dim

    @property
    def num_items(self) -> int:
        """Items that can be found."""
        return self.base.num_items - len(self.tombstones) + self.delta.num_items

    @property
    def attribute_names(self) -> tuple[str, ...]:
        """Attributes that can be asked for."""
        delta_names = [name for name in self.delta.items.column_names if name != ITEM_ID]
        return tuple(dict.fromkeys((*self.base.attribute_names, *self.patches.names, *delta_names)))

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
        gone = np.union1d(self.tombstones, self.base.rows_of(excluded_item_ids))
        allowed = self._built_matching(condition) - RowSet.of_rows(gone, self.base.num_items)
        built = self.base.search_rows(embeddings, k, allowed)
        if self.delta.num_items == 0:
            return built
        num_wanted = min(k, self.num_items)
        embeddings = np.ascontiguousarray(embeddings, dtype=np.float32)
        forbidden = self.delta.rows_of(excluded_item_ids)
        if condition is not None:
            forbidden = np.union1d(forbidden, np.flatnonzero(~self._delta_attributes.mask(condition)))
        scores, rows = self.delta.search(embeddings, num_wanted, forbidden)  # [B, K], [B, K]
        rows[rows >= 0] += self.base.num_items
        built_scores, built_rows = _as_columns(built, num_wanted)  # [B, K]
        scores = np.concatenate((built_scores, scores), axis=1)  # [B, 2 K]
        rows = np.concatenate((built_rows, rows), axis=1)  # [B, 2 K]
        best = np.argsort(-scores, axis=1, kind="stable")[:, :num_wanted]  # [B, K]
        scores, rows = np.take_along_axis(scores, best, axis=1), np.take_along_axis(rows, best, axis=1)  # [B, K]
        is_hit = rows >= 0  # [B, K]
        return Hits(is_hit.sum(axis=1), scores[is_hit], rows[is_hit])

    def _built_matching(self, condition: Condition | None) -> RowSet:
        """The rows of the built index that meet a condition, by the attributes that they have now."""
        num_rows = self.base.num_items
        if condition is None:
            return RowSet.everything(num_rows)
        matching = self.base.attributes.matching(condition)
        if len(self.patches.rows) == 0:
            return matching
        patched = self._patched_attributes.mask(condition)
        unpatched = matching - RowSet.of_rows(self.patches.rows, num_rows)
        return unpatched | RowSet.of_rows(self.patches.rows[patched], num_rows)

    @cached_property
    def _patched_attributes(self) -> Attributes:
        # The row numbers count the rows where there are no attributes at all.
        table = self.patches.attributes
        columns = {"_row": pa.array(self.patches.rows), **dict(zip(table.column_names, table.columns, strict=True))}
        return Attributes(pa.table(columns), self.base.attributes.filterable)

    @cached_property
    def _delta_attributes(self) -> Attributes:
        return Attributes(self.delta.items.drop_columns([ITEM_ID]), self.base.attributes.filterable)

    def packed_ids(self, rows: NDArray[np.int64]) -> tuple[bytes, NDArray[np.int64]]:
        """UTF-8 ids of rows, one after another without a separator, and `[H]` the size of each in bytes."""
        is_delta = rows >= self.base.num_items
        if not is_delta.any():
            return self.base.packed_ids(rows)
        built = _unpacked(*self.base.packed_ids(rows[~is_delta]))
        ids = _woven(is_delta, built, self.delta.utf8_ids(rows[is_delta] - self.base.num_items))
        return b"".join(ids), np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))

    def built_values(self, name: str, rows: NDArray[np.int64]) -> list[Any]:
        """One attribute of rows of the built index as it was built; a value like no other where it is not kept."""
        if name not in self.base.attribute_names:
            return [_UNKNOWN] * len(rows)
        return self.base.attribute_values(name, rows)

    def delta_values(self, name: str, rows: NDArray[np.int64]) -> list[Any]:
        """One attribute of rows of the delta, None where an item has none."""
        return values_of(self.delta.items, name, rows)

    def attribute_values(self, name: str, rows: NDArray[np.int64]) -> list[Any]:
        """One attribute of rows, None where an item has none.

        Raises:
            InvalidInputError: there is no such attribute.
        """
        if name not in self.attribute_names:
            raise unknown_attribute(name, self.attribute_names)
        is_delta = rows >= self.base.num_items
        built_rows = rows[~is_delta]
        is_built = name in self.base.attribute_names
        built = self.base.attribute_values(name, built_rows) if is_built else [None] * len(built_rows)
        built = self.patches.apply(built, name, built_rows)
        return _woven(is_delta, built, self.delta_values(name, rows[is_delta] - self.base.num_items))


class LiveIndex:
    """A checkpoint version that takes changes. `view` may be read by any thread; one at a time applies changes."""

    def __init__(self, base: ShardIndex, tower: Tower | None) -> None:
        """Starts at the state of the catalogue that the index was built from.

        Args:
            base: The built index.
            tower: The item tower of the same checkpoint; None for an index that takes no changes.
        """
        self.base = base
        self.view = LiveView(
            base,
            base.manifest.catalogue_version,
            np.empty(0, dtype=np.int64),
            Patches.empty(),
            Segment.empty(base.manifest.dim),
        )
        self._tower = tower
        columns = () if tower is None else (feature.column for feature in tower.encoder.features)
        self._tower_columns = tuple(column for column in columns if column != ITEM_ID)

    @property
    def catalogue_version(self) -> str:
        """The state of the catalogue that is searched."""
        return self.view.catalogue_version

    @property
    def built_catalogue_version(self) -> str:
        """The state of the catalogue that the index was built from."""
        return self.base.manifest.catalogue_version

    @property
    def num_items(self) -> int:
        """Items that can be found."""
        return self.view.num_items

    @property
    def num_delta_items(self) -> int:
        """Items that were added or changed since the index was built."""
        return self.view.delta.num_items + len(self.view.patches.rows)

    @property
    def num_tombstones(self) -> int:
        """Items of the built index that were replaced or deleted."""
        return len(self.view.tombstones)

    @property
    def num_quarantined(self) -> int:
        """Items left out because they could not be embedded."""
        return self.base.manifest.num_quarantined + len(self.view.quarantined_ids)

    @property
    def size_bytes(self) -> int:
        """Memory of the built index and of all that changed since."""
        return self.base.size_bytes + self.view.delta.size_bytes + self.view.patches.size_bytes

    def needs_rebuild(self, share: float) -> bool:
        """Whether so much has changed that a new index should be built.

        The new one catches up from its own `built_catalogue_version` before it replaces this one, so that nothing is
        lost or goes back in time; this one takes changes until then.

        Args:
            share: Of the built items, new embeddings or tombstones.
        """
        num_changed = max(self.view.delta.num_items, len(self.view.tombstones))
        return num_changed >= max(share * self.base.num_items, _SMALLEST_REBUILD)

    def apply(self, changes: Changes) -> None:
        """Makes the next state visible, as a whole. Blocks while items are embedded.

        Only items whose tower columns changed are embedded. One that cannot be is quarantined: neither its old state
        nor its new one is found.

        Args:
            changes: What changed since `catalogue_version`.
        """
        view = self.view
        upserts = changes.upserts
        if upserts.num_rows == 0 and not changes.deleted_ids:
            self.view = replace(view, catalogue_version=changes.catalogue_version)
            return
        assert self._tower is not None, "an index without a tower takes no changes"
        ids: list[str] = upserts[ITEM_ID].to_pylist()
        changed_ids = [*ids, *changes.deleted_ids]
        built_rows = np.setdiff1d(view.base.rows_of(changed_ids), view.tombstones, assume_unique=True)
        built = dict(zip(_unpacked(*view.base.packed_ids(built_rows)), built_rows.tolist(), strict=True))
        delta_rows = view.delta.rows_of(changed_ids)
        moved = dict(zip(view.delta.utf8_ids(delta_rows), delta_rows.tolist(), strict=True))
        # Where each upserted item is now, -1 where it is not.
        old_built = np.array([built.get(item_id.encode(), -1) for item_id in ids], dtype=np.int64)
        old_delta = np.array([moved.get(item_id.encode(), -1) for item_id in ids], dtype=np.int64)
        keeps_built = self._embed_alike(upserts, old_built, view.built_values)
        keeps_delta = self._embed_alike(upserts, old_delta, view.delta_values)
        embedded = embed_items(self._tower, upserts.filter(pa.array(~(keeps_built | keeps_delta))), lambda _: None)
        added = Segment(embedded.items, embedded.embeddings).joined(
            Segment(upserts.filter(pa.array(keeps_delta)), view.delta.embeddings[old_delta[keeps_delta]])
        )
        patched_rows = old_built[keeps_built]
        gone = np.setdiff1d(built_rows, patched_rows, assume_unique=True)
        patches = view.patches.without(gone)
        if len(patched_rows):
            patches = patches.replaced(patched_rows, upserts.filter(pa.array(keeps_built)).drop_columns([ITEM_ID]))
        self.view = replace(
            view,
            catalogue_version=changes.catalogue_version,
            tombstones=np.union1d(view.tombstones, gone),
            patches=patches,
            delta=view.delta.without(delta_rows).joined(added),
            quarantined_ids=view.quarantined_ids.difference(changed_ids).union(embedded.quarantined),
        )

    def _embed_alike(
        self, items: pa.Table, old_rows: NDArray[np.int64], old_values: Callable[[str, NDArray[np.int64]], list[Any]]
    ) -> NDArray[np.bool_]:
        """Which items were there before (row -1: not), with the same values in all columns that the tower reads."""
        is_alike = old_rows >= 0
        for column in self._tower_columns:
            candidates = np.flatnonzero(is_alike)
            pairs = zip(values_of(items, column, candidates), old_values(column, old_rows[candidates]), strict=True)
            is_alike[candidates] = [new == old for new, old in pairs]
        return is_alike


def _as_columns(hits: Hits, k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """`[B, K]` scores and rows; row -1 where there are fewer."""
    is_hit = np.arange(k) < hits.counts[:, None]  # [B, K]
    scores = np.full(is_hit.shape, -np.inf, dtype=np.float32)
    rows = np.full(is_hit.shape, -1, dtype=np.int64)
    scores[is_hit], rows[is_hit] = hits.scores, hits.rows
    return scores, rows


def _woven(is_second: NDArray[np.bool_], first: Sequence[_Value], second: Sequence[_Value]) -> list[_Value]:
    """Two lists as one, in the order that the mask says."""
    if not second:
        return list(first)
    sources = (iter(first), iter(second))
    return [next(sources[source]) for source in is_second.tolist()]


def _unpacked(utf8: bytes, sizes: NDArray[np.int64]) -> list[bytes]:
    ends = np.cumsum(sizes).tolist()
    return [utf8[end - size : end] for end, size in zip(ends, sizes.tolist(), strict=True)]
