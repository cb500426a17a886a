"""One searchable checkpoint version: a built index, and all that changed in the catalogue since it was built.

Deliberately does not know gRPC, the object store, where changes come from, or which other versions are loaded.

A view is a state: it never changes, and goes when the last request that holds it ends. An update makes the next view
out of parts of the last, so requests and updates never wait for each other.
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from index_service.delta import Patches, PatchStack, Segment, sealed, values_of
from index_service.embed import EmbeddedItems, embed_items
from index_service.feed import Changes
from index_service.filters import Condition
from index_service.item_ids import WantedIds
from index_service.planner import search_allowed
from index_service.row_set import RowSet
from index_service.saved_delta import SavedDelta
from index_service.shard import Hits, ShardIndex
from towers.catalogue_columns import ITEM_ID
from towers.errors import InvalidInputError
from towers.tower import Tower

_Value = TypeVar("_Value")
_UNKNOWN = object()
_MOST_SCANNED = 8192
"""Of the newest items: they are scanned by every search and copied by every update."""
_TYPICAL_K = 100
_SMALLEST_REBUILD = 10_000
"""Changed items below which a rebuild is not worth its process."""
_MOST_UNSAVED_COMMITS = 1_000
_LEAST_UNSAVED = 10_000
_UNSAVED_SHARE = 0.5
"""A delta is saved after so many commits, or when so many changes, and this share of it, came since the last time: a
restart then takes seconds, and all saves together write a few times what changed."""
_REBUILD_PAUSE_S = 120.0
"""From one index to its successor: under a storm of changes one build would follow another, and win nothing, because
what is sealed is searched as fast as what is built."""


@dataclass(frozen=True)
class LiveView:
    """What is searched: the built index, then items that came later and are sealed, then the newest ones.

    Rows are numbered through: those of the built index from 0, the sealed ones after them, the newest at the end.
    """

    base: ShardIndex
    catalogue_version: str
    alive: RowSet
    """Rows of the built index that were neither replaced nor deleted."""
    patches: PatchStack
    """New attributes of rows of the built index."""
    sealed: Segment
    sealed_alive: RowSet
    newest: Segment
    quarantined: Mapping[str, str] = field(default_factory=dict)
    """Items that an update could not embed, each with the reason."""
    num_commits: int = 0
    """Of the catalogue's log, applied since the index was loaded."""
    num_changes: int = 0
    """Upserts and deletes, applied since the index was loaded."""

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
        return self.alive.count + self.num_new_items

    @property
    def num_new_items(self) -> int:
        """Items that have an embedding that the built index does not have."""
        return self.sealed_alive.count + self.newest.num_items

    @property
    def num_tombstones(self) -> int:
        """Items of the built index that were replaced or deleted."""
        return self.base.num_items - self.alive.count

    @property
    def num_patched(self) -> int:
        """Items of the built index that have new attributes."""
        return int(self.alive.contains(self.patches.rows).sum())

    @property
    def size_bytes(self) -> int:
        """Memory of the built index and of all that changed since."""
        patches = sum(level.size_bytes for level in self.patches.levels)
        return self.base.size_bytes + patches + self.sealed.size_bytes + self.newest.size_bytes

    @property
    def attribute_names(self) -> tuple[str, ...]:
        """Attributes that can be asked for."""
        patches = (level.attributes for level in self.patches.levels)
        parts = (self.base.attributes, *patches, self.sealed.attributes, self.newest.attributes)
        return tuple(dict.fromkeys(name for attributes in parts for name in attributes.names))

    def to_save(self) -> SavedDelta:
        """What differs from the built index."""
        parts = ((self.sealed, self.sealed_alive.rows), (self.newest, np.arange(self.newest.num_items)))
        items = [segment.items.take(pa.array(rows)) for segment, rows in parts]
        # FAISS gathers without holding the interpreter.
        embeddings = [segment.ann.exact.reconstruct_batch(rows) for segment, rows in parts]
        patches = self.patches.merged(self.alive)
        return SavedDelta(
            catalogue_version=self.catalogue_version,
            alive=self.alive,
            patched_rows=patches.rows,
            patched_items=patches.items,
            items=pa.concat_tables(items, promote_options="default"),
            embeddings=np.concatenate(embeddings),
            quarantined=self.quarantined,
        )

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
        (_, allowed), *later = self.allowed(condition, excluded_item_ids)
        found = [self.base.search_rows(embeddings, k, allowed)]
        embeddings = np.ascontiguousarray(embeddings, dtype=np.float32)
        for (segment, allowed), (_, _, first_row) in zip(later, self._segments, strict=True):
            if segment.num_items == 0:
                continue
            scores, rows = search_allowed(segment.ann, embeddings, k, allowed)  # [B, K], [B, K]
            found.append(Hits(np.full(len(rows), rows.shape[1]), scores.ravel(), rows.ravel() + first_row))
        return _best(found, k)

    def allowed(
        self, condition: Condition | None, excluded_item_ids: Sequence[str]
    ) -> list[tuple[ShardIndex | Segment, RowSet]]:
        """Each part, and which of its own rows may be returned; arguments and errors as of `search`."""
        allowed = self.alive
        if condition is not None:
            matching = self.base.attributes.matching(condition)
            for level in self.patches.levels:
                matching = level.patched(matching, condition)
            allowed &= matching
        parts: list[tuple[ShardIndex | Segment, RowSet]] = [(self.base, allowed)]
        for segment, alive, _ in self._segments:
            if condition is not None and segment.num_items:
                alive &= segment.attributes.matching(condition)
            parts.append((segment, alive))
        if excluded_item_ids:
            excluded = WantedIds(excluded_item_ids)
            parts = [(part, rows - RowSet.of_rows(part.ids.find(excluded), part.num_items)) for part, rows in parts]
        return parts

    def packed_ids(self, rows: NDArray[np.int64]) -> tuple[bytes, NDArray[np.int64]]:
        """UTF-8 ids of rows, one after another without a separator, and `[H]` the size of each in bytes."""
        if (rows < self.base.num_items).all():
            return self.base.packed_ids(rows)
        ids = self._collected(rows, self.base.ids.utf8, lambda segment, own: segment.ids.utf8(own))
        return b"".join(ids), np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))

    def attribute_values(self, name: str, rows: NDArray[np.int64]) -> list[Any]:
        """One attribute of rows, None where an item has none.

        Raises:
            InvalidInputError: there is no such attribute.
        """
        known = self.attribute_names
        if name not in known:
            raise InvalidInputError(f"attribute_names: unknown attribute {name!r}; known: {sorted(known)}")

        def built(own: NDArray[np.int64]) -> list[Any]:
            values = values_of(self.base.attributes, name, own)
            for level in self.patches.levels:
                level.patch(values, name, own)
            return values

        return self._collected(rows, built, lambda segment, own: values_of(segment.attributes, name, own))

    @cached_property
    def _segments(self) -> Sequence[tuple[Segment, RowSet, int]]:
        """Beside the built index: the items, which of them are still there, and the row of the first."""
        first_row = self.base.num_items
        newest_alive = RowSet.everything(self.newest.num_items)
        return (
            (self.sealed, self.sealed_alive, first_row),
            (self.newest, newest_alive, first_row + self.sealed.num_items),
        )

    def _collected(
        self,
        rows: NDArray[np.int64],
        built: Callable[[NDArray[np.int64]], list[_Value]],
        later: Callable[[Segment, NDArray[np.int64]], list[_Value]],
    ) -> list[_Value]:
        """Something of each row, asked of the part that the row belongs to."""
        first_rows = [first_row for _, _, first_row in self._segments]
        parts = np.searchsorted(first_rows, rows, side="right")
        if not parts.any():
            return built(rows)
        answers = [iter(built(rows[parts == 0]))]
        for part, (segment, _, first_row) in enumerate(self._segments, start=1):
            own = rows[parts == part] - first_row
            answers.append(iter(later(segment, own) if len(own) else []))
        return [next(answers[part]) for part in parts.tolist()]


class LiveIndex:
    """A checkpoint version that takes changes. `view` may be read by any thread; one at a time applies changes."""

    def __init__(self, base: ShardIndex, tower: Callable[[], Tower] | None, delta: SavedDelta | None = None) -> None:
        """Starts at the state of the catalogue that the index was built from, or that a delta leads to.

        Args:
            base: The built index.
            tower: Gives the item tower of the same checkpoint; asked only when items are upserted. None for an index
                that takes none.
            delta: What was saved beside this very index.
        """
        self.base = base
        self.tower = tower
        self._loaded_s = time.monotonic()
        self._filterable = base.attributes.filterable
        nothing = Segment.empty(base.manifest.dim, self._filterable)
        self.view = LiveView(
            base,
            base.manifest.catalogue_version,
            RowSet.everything(base.num_items),
            PatchStack(),
            nothing,
            RowSet.everything(0),
            nothing,
        )
        if delta is not None:
            self.view = self._settled(self._with(delta))
        self._num_saved_commits = self._num_saved_changes = 0

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
        return self.view.num_new_items + self.view.num_patched

    @property
    def num_tombstones(self) -> int:
        """Items of the built index that were replaced or deleted."""
        return self.view.num_tombstones

    @property
    def num_quarantined(self) -> int:
        """Items left out because they could not be embedded."""
        return self.base.manifest.num_quarantined + len(self.view.quarantined)

    @property
    def size_bytes(self) -> int:
        """Memory of the built index and of all that changed since."""
        return self.view.size_bytes

    def needs_rebuild(self, share: float) -> bool:
        """Whether so much has changed that a new index should be built.

        The new one catches up from its own `built_catalogue_version` before it replaces this one, so that nothing is
        lost or goes back in time; this one takes changes until then.

        Args:
            share: Of the built items, new embeddings or tombstones.
        """
        if time.monotonic() < self._loaded_s + _REBUILD_PAUSE_S:
            return False
        num_changed = max(self.view.num_new_items, self.view.num_tombstones)
        return num_changed >= max(share * self.base.num_items, _SMALLEST_REBUILD)

    def is_worth_saving(self) -> bool:
        """Whether a restart would have much to read or to embed again."""
        num_changes = self.view.num_changes - self._num_saved_changes
        num_commits = self.view.num_commits - self._num_saved_commits
        enough = max(_LEAST_UNSAVED, _UNSAVED_SHARE * (self.num_delta_items + self.num_tombstones))
        return num_changes >= enough or num_commits >= _MOST_UNSAVED_COMMITS

    def to_save(self) -> SavedDelta:
        """The delta now, which counts as saved. Blocks; changes may be applied meanwhile."""
        view = self.view
        # Where it cannot be kept, the next one will be: a store that is down is not asked at each update.
        self._num_saved_commits, self._num_saved_changes = view.num_commits, view.num_changes
        return view.to_save()

    def apply(self, changes: Changes) -> None:
        """Makes the next state visible, as a whole. Blocks while items are embedded.

        Only items whose tower columns changed are embedded. One that cannot be is quarantined: neither its old state
        nor its new one is found.

        Args:
            changes: What changed since `catalogue_version`.
        """
        view = self.view
        upserts = changes.upserts
        view = replace(
            view,
            catalogue_version=changes.catalogue_version,
            num_commits=view.num_commits + changes.num_commits,
            num_changes=view.num_changes + upserts.num_rows + len(changes.deleted_ids),
        )
        if upserts.num_rows == 0 and not changes.deleted_ids:
            self.view = view
            return
        base, sealed_part, newest = view.base, view.sealed, view.newest
        ids: list[str] = upserts[ITEM_ID].to_pylist()
        changed_ids = [*ids, *changes.deleted_ids]
        # Where the changed items are now.
        in_base = _alive_rows(view.alive, base.rows_of(changed_ids))
        in_sealed = _alive_rows(view.sealed_alive, sealed_part.ids.rows_of(changed_ids))
        in_newest = newest.ids.rows_of(changed_ids)
        old = [
            _Found(part, rows, ids) for part, rows in ((base, in_base), (sealed_part, in_sealed), (newest, in_newest))
        ]
        keeps = [self._embed_alike(upserts, found) for found in old]
        embedded = self._embedded(upserts.filter(pa.array(~(keeps[0] | keeps[1] | keeps[2]))))
        newest = newest.without(in_newest)
        for found, keep in zip(old[1:], keeps[1:], strict=True):
            if keep.any():
                vectors = found.source.ann.vectors[found.rows[keep]]
                newest = newest.joined(Segment.of(upserts.filter(pa.array(keep)), vectors, self._filterable))
        if embedded.items.num_rows:
            newest = newest.joined(Segment.of(embedded.items, embedded.embeddings, self._filterable))
        patched_rows = old[0].rows[keeps[0]]
        patches = view.patches
        if len(patched_rows):
            patches = patches.on_top(Patches(patched_rows, upserts.filter(pa.array(keeps[0])), self._filterable))
        alive = _without(view.alive, np.setdiff1d(in_base, patched_rows))
        self.view = self._settled(
            replace(
                view,
                alive=alive,
                patches=patches,
                sealed_alive=_without(view.sealed_alive, in_sealed),
                newest=newest,
                quarantined={**_others(view.quarantined, changed_ids), **embedded.quarantined},
            )
        )

    def _with(self, delta: SavedDelta) -> LiveView:
        patches = Patches(delta.patched_rows, delta.patched_items, self._filterable)
        return replace(
            self.view,
            catalogue_version=delta.catalogue_version,
            alive=delta.alive,
            patches=PatchStack().on_top(patches) if len(patches.rows) else PatchStack(),
            newest=Segment.of(delta.items, delta.embeddings, self._filterable),
            quarantined=delta.quarantined,
        )

    def _settled(self, view: LiveView) -> LiveView:
        """A view that can be searched: many new items are sealed, and what its searches share is made."""
        if view.newest.num_items > _MOST_SCANNED:
            sealed_part = sealed(self.base.ann, view.sealed, view.sealed_alive, view.newest)
            view = replace(
                view,
                sealed=sealed_part,
                sealed_alive=RowSet.everything(sealed_part.num_items),
                newest=Segment.empty(view.dim, self._filterable),
            )
        # The first search of a view makes what the others reuse: counts of what is alive in each list.
        view.search(np.eye(1, view.dim, dtype=np.float32), _TYPICAL_K)
        return view

    def _embedded(self, items: pa.Table) -> EmbeddedItems:
        if items.num_rows == 0:
            return EmbeddedItems(items, np.empty((0, self.view.dim), dtype=np.float32), {})
        return embed_items(self._required_tower(), items, lambda _: None)

    def _required_tower(self) -> Tower:
        assert self.tower is not None, "an index without a tower takes no items"
        return self.tower()

    def _embed_alike(self, items: pa.Table, found: "_Found") -> NDArray[np.bool_]:
        """Which items a part has, with the same values in all columns that the tower reads."""
        is_alike = found.rows >= 0
        if not is_alike.any():
            return is_alike
        columns = {feature.column for feature in self._required_tower().encoder.features}
        for column in columns - {ITEM_ID}:
            candidates = np.flatnonzero(is_alike)
            new = items[column].take(pa.array(candidates)).to_pylist() if column in items.column_names else None
            old = found.values(column, candidates)
            is_alike[candidates] = [(None if new is None else new[i]) == value for i, value in enumerate(old)]
        return is_alike


class _Found:
    """Where a part of a view has the items of an update."""

    def __init__(self, source: ShardIndex | Segment, rows: NDArray[np.int64], item_ids: Sequence[str]) -> None:
        self.source = source
        self.rows = np.full(len(item_ids), -1)
        if len(rows):
            row_of = dict(zip(source.ids.utf8(rows), rows.tolist(), strict=True))
            self.rows = np.array([row_of.get(item_id.encode(), -1) for item_id in item_ids], dtype=np.int64)
        """`[U]` the row of each upserted item; -1 where the part does not have it."""

    def values(self, name: str, items: NDArray[np.int64]) -> list[Any]:
        """One attribute of some of the items; a value like no other where it is not kept."""
        is_absent = isinstance(self.source, Segment) and name not in self.source.items.column_names
        if name not in self.source.attributes.names and not is_absent:
            return [_UNKNOWN] * len(items)
        return values_of(self.source.attributes, name, self.rows[items])


def _others(quarantined: Mapping[str, str], changed_ids: Collection[str]) -> Mapping[str, str]:
    changed = set(changed_ids) if quarantined else ()
    return {item_id: reason for item_id, reason in quarantined.items() if item_id not in changed}


def _without(alive: RowSet, rows: NDArray[np.int64]) -> RowSet:
    """The same set, with all that it has been asked before, where nothing goes."""
    return alive - RowSet.of_rows(rows, alive.num_rows) if len(rows) else alive


def _alive_rows(alive: RowSet, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    return rows[alive.contains(rows)]


def _best(found: Sequence[Hits], k: int) -> Hits:
    """The k best hits of each query of several parts, each of which has as many hits for one query as for another."""
    found = [hits for hits in found if len(hits.rows)] or list(found[:1])
    if len(found) == 1:
        return found[0]
    num_queries = len(found[0].counts)
    scores = np.concatenate([hits.scores.reshape(num_queries, -1) for hits in found], axis=1)  # [B, 3 K]
    rows = np.concatenate([hits.rows.reshape(num_queries, -1) for hits in found], axis=1)  # [B, 3 K]
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]  # [B, K]
    scores, rows = np.take_along_axis(scores, best, axis=1), np.take_along_axis(rows, best, axis=1)  # [B, K]
    return Hits(np.full(num_queries, rows.shape[1]), scores.ravel(), rows.ravel())
