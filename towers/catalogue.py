"""The catalogue: all items with their attributes, as two Delta Lake tables below `catalog/`.

Deliberately does not know schemas, towers or indexes: an attribute is a column.

`changes` is an append-only log: one commit per call that writes; its columns are `_op`, `_row` (the order within the
commit), `item_id` and the attributes. `items` is a snapshot. The catalogue is the snapshot plus the changes
after it, last one wins, so no crash between two commits can make it wrong, and writers that append at once need no
common counter: the order between commits is Delta's own commit number.

Spark or any lakehouse tool may write either table: rewrite `items` at will, append to `changes`.
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from deltalake import CommitProperties, DeltaTable, Transaction

from towers.catalogue_columns import ITEM_ID, check_names, checked_ids, conformed_columns, stored_type
from towers.delta_log import COMMIT, COMPACTED_EDIT, DeltaLog, translated
from towers.errors import (
    ConflictError,
    CorruptArtefactError,
    InvalidInputError,
    NotFoundError,
)
from towers.placement import hashes_of
from towers.store import Store

_FOLDER = "catalog"
_OP = "_op"
_ROW = "_row"
_UPSERT = "upsert"
_DELETE = "delete"

_FEED = {"delta.enableChangeDataFeed": "true", "delta.enableExpiredLogCleanup": "false"}
"""The log is what names and orders states, so it is kept whole."""
_APPEND_ONLY = {**_FEED, "delta.appendOnly": "true"}
_FOLDED = "twotower.folded_changes"
"""Delta application id whose version, in `items`, counts the commits of `changes` that the snapshot contains."""

_VERSION = re.compile(r"(\d{1,18})\.(\d{1,18})")
_NO_CHANGES = pa.schema({ITEM_ID: pa.string(), _OP: pa.string(), _ROW: pa.int64(), COMMIT: pa.int64()}).empty_table()

_WRITE_ATTEMPTS = 10


@dataclass(frozen=True)
class UpsertReport:
    """What an upsert did."""

    num_rows: int
    num_items: int
    num_duplicates: int
    """Rows whose id came again further down in the same call; the last one won."""
    catalogue_version: str


@dataclass(frozen=True)
class Upsert:
    """Items to be added or replaced: one row per item, `item_id` (string or integer) and any attributes."""

    items: pa.Table


@dataclass(frozen=True)
class Delete:
    """Items to be deleted."""

    item_ids: Sequence[str]


Edit = Upsert | Delete


@dataclass(frozen=True)
class DeleteReport:
    """What a deletion did."""

    num_items: int
    """Different ids."""
    catalogue_version: str


Outcome = UpsertReport | DeleteReport | InvalidInputError | NotFoundError


@dataclass(frozen=True)
class CatalogueSnapshot:
    """One state of the catalogue."""

    version: str
    items: pa.Table
    """`item_id` (string, unique, rising) and the attributes; a missing attribute is null."""


@dataclass(frozen=True)
class CatalogueSize:
    """How large a state is, at most: items that were changed or deleted since the last compaction count again."""

    num_rows: int
    stored_bytes: int
    """Of its files, which are compressed."""


@dataclass(frozen=True)
class CommitSpan:
    """The way from one state to a later one."""

    version: str
    """The later state."""
    numbers: range
    """Numbers of the commits of `changes` in between."""


@dataclass(frozen=True)
class Commit:
    """The rows of one commit of `changes`; see `last_states`."""

    number: int
    rows: pa.Table


@dataclass(frozen=True)
class CommitSummary:
    """What one commit of `changes` did."""

    number: int
    created: datetime | None
    """None where the writer did not say."""
    num_upserts: int
    num_deletes: int


class Catalogue:
    """The catalogue of one object store. All methods block and may raise `StoreUnavailableError`.

    A version is `<edits of items>.<edits of changes>`: for each table the number (from 1) of the last commit that
    changed its data, 0 before the first. Compaction and Delta's maintenance change no data, so no version.
    """

    def __init__(self, store: Store) -> None:
        """Opens the catalogue; nothing is read yet.

        Raises:
            InvalidInputError: the store is a folder whose path Delta Lake cannot open.
        """
        if re.search("%[0-9A-Fa-f]{2}", store.url):
            raise InvalidInputError(f"store {store.url!r}: Delta Lake reads the % as an escape; rename the folder")
        self._items = DeltaLog(store, f"{_FOLDER}/items", _FEED)
        self._changes = DeltaLog(store, f"{_FOLDER}/changes", _APPEND_ONLY)

    def upsert(self, items: pa.Table) -> UpsertReport:
        """Adds items, or replaces them with all their attributes, in one atomic commit.

        Args:
            items: One row per item: the column `item_id` (string or integer) and any attributes. Of rows with the same
                id the last one wins. Integers are stored as int64, timestamps without a time zone are taken as UTC.

        Raises:
            InvalidInputError: no rows, no ids, an id that is null, empty, too long or contains NUL; a column whose name
                is reserved or whose type differs from the catalogue's. The message names the column.
            ConflictError: too many writers at once; nothing was written.
        """
        (outcome,) = self.commit([Upsert(items)])
        if isinstance(outcome, InvalidInputError):
            raise outcome
        assert isinstance(outcome, UpsertReport)
        return outcome

    def delete(self, item_ids: Sequence[str]) -> int:
        """Deletes items, in one atomic commit; ids that the catalogue does not hold are allowed.

        Returns:
            Number of different ids.

        Raises:
            InvalidInputError: an id that is null, empty, too long or contains NUL.
            NotFoundError: nothing was ever loaded.
            ConflictError: too many writers at once; nothing was written.
        """
        if not item_ids:
            return 0
        (outcome,) = self.commit([Delete(item_ids)])
        if isinstance(outcome, InvalidInputError | NotFoundError):
            raise outcome
        return outcome.num_items

    def commit(self, edits: Sequence[Edit]) -> list[Outcome]:
        """Makes several edits in their order, in one atomic commit. Durable on return.

        Args:
            edits: Each is made whole or not at all. One that is wrong is left out and hinders no other.

        Returns:
            What became of each edit: a report, or the error that `upsert` or `delete` would raise.

        Raises:
            ConflictError: too many writers at once; nothing was written.
        """
        parts = [_part_of(edit) for edit in edits]
        for _ in range(_WRITE_ATTEMPTS):
            schema = self._changes.schema()
            is_empty = schema is None and self._items.schema() is None
            conformed = _conformed_parts(parts, self.attribute_types(), is_empty=is_empty)
            tables = [part.table for part in conformed if isinstance(part, _Part)]
            try:
                number = self._append(schema, tables) if tables else self._changes.last_edit()
            except ConflictError:
                continue  # Another writer created the table or added a column: look again.
            version = _named((self._items.last_edit(), number))
            return [part.report(version) if isinstance(part, _Part) else part for part in conformed]
        raise ConflictError("too many writers change the catalogue at once; try again")

    def attribute_types(self) -> dict[str, pa.DataType]:
        """The type of each attribute, by name; empty before the first load. Costs two small reads."""
        types: dict[str, pa.DataType] = {}
        for schema in (self._items.schema(), self._changes.schema()):
            for field in schema if schema is not None else ():
                if field.name not in (ITEM_ID, _OP, _ROW):
                    types.setdefault(field.name, stored_type(field.type) or field.type)
        return types

    def version(self) -> str | None:
        """The version now, None before the first load. The same string means the same state.

        Cheap: two small reads when nothing changed.
        """
        # Items first: a compaction in between moves changes into items and alters neither number.
        state = (self._items.last_edit(), self._changes.last_edit())
        return None if state == (0, 0) else _named(state)

    def read(self, version: str | None = None) -> CatalogueSnapshot:
        """Reads exactly one state.

        Args:
            version: The version; the one now when left out.

        Raises:
            NotFoundError: there is no such version, or its files were removed.
            CorruptArtefactError: a table that cannot be read, or that another tool changed in a way that the
                catalogue does not allow.
        """
        version = version if version is not None else self.version()
        if version is None:
            raise _nothing_loaded()
        items_edit, changes_edit = self._parsed(version)
        base, num_folded = self._base(version, items_edit, changes_edit)
        parts = []
        if base is not None:
            with translated(f"catalogue version {version}"):
                parts.append(_as_layer(pa.table(base.scan())))
        parts += [rows for _, rows in self._changes.appended(range(num_folded + 1, changes_edit + 1))]
        items, _ = last_states(parts)
        return CatalogueSnapshot(version, items.sort_by(ITEM_ID).combine_chunks())

    def size(self, version: str) -> CatalogueSize:
        """How large a state is, from the logs alone: no item is read.

        Raises:
            NotFoundError: there is no such version.
        """
        items_edit, changes_edit = self._parsed(version)
        base, num_folded = self._base(version, items_edit, changes_edit)
        num_rows, stored_bytes = self._changes.appended_size(range(num_folded + 1, changes_edit + 1))
        if base is not None:
            with translated(f"catalogue version {version}"):
                files = pa.table(base.get_add_actions(flatten=True))
            num_rows += sum(count or 0 for count in files["num_records"].to_pylist())
            stored_bytes += sum(files["size_bytes"].to_pylist())
        return CatalogueSize(num_rows, stored_bytes)

    def commits_since(self, version: str) -> CommitSpan | None:
        """The commits that lead from a state to the one now. Cheap: see `version`.

        Returns:
            None when there is no such way: `items` was rewritten since, or the state never was.
        """
        match = _VERSION.fullmatch(version)
        items_edit, changes_edit = self._items.last_edit(), self._changes.last_edit()
        if match is None or int(match.group(1)) != items_edit or int(match.group(2)) > changes_edit:
            return None
        return CommitSpan(_named((items_edit, changes_edit)), range(int(match.group(2)) + 1, changes_edit + 1))

    def commits(self, numbers: Sequence[int]) -> list[Commit]:
        """Reads commits of `changes`.

        Raises:
            NotFoundError: one was removed by a tool that cleans logs.
            CorruptArtefactError: a commit that another tool wrote in a way that the catalogue does not allow.
        """
        appended = self._changes.appended(numbers)
        changes = _united([rows for _, rows in appended]).combine_chunks()
        commits: dict[int, pa.Table] = dict.fromkeys(numbers, _NO_CHANGES)
        first_row = 0
        for number, files in itertools.groupby(appended, key=lambda file: file[0]):
            num_rows = sum(rows.num_rows for _, rows in files)
            commits[number] = changes.slice(first_row, num_rows)
            first_row += num_rows
        return [Commit(number, rows) for number, rows in commits.items()]

    def num_unfolded(self) -> int:
        """Commits of `changes` since the last compaction: what every reader reads beside the snapshot."""
        table = self._items.open()
        num_folded = 0 if table is None else _num_folded(table)
        return max(0, self._changes.last_edit() - num_folded)

    def last_changes(self, num_commits: int) -> list[CommitSummary]:
        """The newest commits of `changes`, newest first; none that a tool which cleans logs removed."""
        last = self._changes.last_edit()
        summaries: list[CommitSummary] = []
        for number in range(last, max(0, last - num_commits), -1):
            try:
                (commit,) = self.commits([number])
            except NotFoundError:
                break
            num_upserts = pc.sum(pc.equal(commit.rows[_OP], _UPSERT)).as_py() or 0
            created = self._changes.created_at(number)
            summaries.append(CommitSummary(number, created, num_upserts, commit.rows.num_rows - num_upserts))
        return summaries

    def compact(self) -> None:
        """Folds the changes into `items`, so that reads stay fast. The state, and so the version, stays.

        Raises:
            NotFoundError: nothing was ever loaded.
            ConflictError: somebody else wrote `items` meanwhile; nothing was written.
        """
        # What the commit below replaces; opened first, so that a write in between is a conflict.
        table = self._items.open()
        snapshot = self.read()
        items_edit, changes_edit = self._parsed(snapshot.version)
        if table is not None:
            if self._items.edit_at(table.version() + 1) != items_edit:
                raise ConflictError("the catalogue's items changed while they were compacted; try again")
            if _num_folded(table) == changes_edit:
                return
        self._items.write(
            table,
            snapshot.items,
            mode="overwrite",
            schema_mode="overwrite",
            properties=CommitProperties(
                custom_metadata={COMPACTED_EDIT: str(items_edit)},
                app_transactions=[Transaction(_FOLDED, changes_edit)],
                max_commit_retries=0,
            ),
        )

    def _append(self, schema: pa.Schema | None, tables: Sequence[pa.Table]) -> int:
        rows = pa.concat_tables(tables, promote_options="default")
        rows = rows.take(_last_rows(rows[ITEM_ID]))
        rows = rows.add_column(1, _ROW, pa.array(np.arange(rows.num_rows)))
        if schema is not None and set(rows.column_names) <= set(schema.names):
            return self._changes.append(rows, "WRITE")
        return self._changes.write(self._changes.open(), rows, mode="append", schema_mode="merge")

    def _parsed(self, version: str) -> tuple[int, int]:
        match = _VERSION.fullmatch(version)
        if match is None:
            raise _no_version(version)
        items_edit, changes_edit = int(match.group(1)), int(match.group(2))
        is_known = (
            (items_edit, changes_edit) != (0, 0)
            and items_edit <= self._items.last_edit()
            and changes_edit <= self._changes.last_edit()
            and self._changes.edit_at(changes_edit) == changes_edit
        )
        if not is_known:
            raise _no_version(version)
        return items_edit, changes_edit

    def _base(self, version: str, items_edit: int, changes_edit: int) -> tuple[DeltaTable | None, int]:
        """The newest snapshot that a state can be built from, and how many commits of `changes` it contains."""
        number = self._items.num_commits()
        while number > 0:
            edit = self._items.edit_at(number)
            if edit < items_edit:
                break
            if edit > items_edit:
                number = edit - 1
                continue
            table = self._items.open(number)
            assert table is not None
            num_folded = _num_folded(table)
            if num_folded <= changes_edit:
                return table, num_folded
            number -= 1
        if items_edit != 0:
            raise _no_version(version)
        return None, 0


def partition(items: pa.Table, shard: int, num_shards: int) -> pa.Table:
    """The rows of one shard, in their order.

    Raises:
        InvalidInputError: the shard is not one of `num_shards`.
    """
    if not 0 <= shard < num_shards:
        raise InvalidInputError(f"shard {shard}/{num_shards}: shards are numbered from 0 to {num_shards - 1}")
    return items.filter(pa.array(hashes_of(items[ITEM_ID].to_pylist()) % num_shards == shard))


def last_states(parts: Sequence[pa.Table]) -> tuple[pa.Table, pa.Array]:
    """The last state of each item of some commits: `item_id` and attributes of those that are, ids of the deleted.

    Raises:
        CorruptArtefactError: two commits have one column in different types.
    """
    changes = _united(parts).sort_by([(COMMIT, "ascending"), (_ROW, "ascending")])
    changes = changes.take(_last_rows(changes[ITEM_ID]))
    is_there = pc.equal(changes[_OP], _UPSERT)
    attributes = [name for name in changes.column_names if name not in (ITEM_ID, _OP, _ROW, COMMIT)]
    deleted_ids = changes[ITEM_ID].filter(pc.invert(is_there)).combine_chunks()
    return changes.filter(is_there).select([ITEM_ID, *attributes]), deleted_ids


def _num_folded(items: DeltaTable) -> int:
    """How many commits of `changes` a snapshot contains."""
    with translated("catalog/items"):
        return items.transaction_version(_FOLDED) or 0


def _named(state: tuple[int, int]) -> str:
    return f"{state[0]}.{state[1]}"


def _no_version(version: str) -> NotFoundError:
    return NotFoundError(f"the catalogue has no version {version!r}")


def _nothing_loaded() -> NotFoundError:
    return NotFoundError("the catalogue is empty; load items first: twotower catalog load ITEMS.parquet")


def _last_rows(ids: pa.Array) -> pa.Array:
    """Position of the last row of each id, rising."""
    if pc.count_distinct(ids).as_py() == len(ids):
        return pa.array(np.arange(len(ids)))
    rows = pa.table({ITEM_ID: ids, _ROW: np.arange(len(ids))})
    last = rows.group_by(ITEM_ID).aggregate([(_ROW, "max")])[f"{_ROW}_max"].combine_chunks()
    return last.sort()


@dataclass(frozen=True)
class _Part:
    """The rows of one edit."""

    table: pa.Table
    """`_op`, `item_id` and the attributes; each id once."""
    num_rows: int
    """Rows that were given."""
    is_upsert: bool

    def report(self, version: str) -> UpsertReport | DeleteReport:
        num_items = self.table.num_rows
        if self.is_upsert:
            return UpsertReport(self.num_rows, num_items, self.num_rows - num_items, version)
        return DeleteReport(num_items, version)


def _part_of(edit: Edit) -> _Part | InvalidInputError:
    items = edit.items if isinstance(edit, Upsert) else pa.table({ITEM_ID: pa.array(edit.item_ids, pa.string())})
    try:
        ids = checked_ids(items)
        check_names([name for name in items.column_names if name != ITEM_ID])
    except InvalidInputError as error:
        return error
    last_rows = _last_rows(ids)
    op = pa.array([_UPSERT if isinstance(edit, Upsert) else _DELETE] * len(last_rows), pa.string())
    attributes = items.drop_columns([ITEM_ID]).take(last_rows)
    table = pa.table(
        {_OP: op, ITEM_ID: ids.take(last_rows), **{name: attributes[name] for name in attributes.column_names}}
    )
    return _Part(table, items.num_rows, isinstance(edit, Upsert))


def _conformed_parts(
    parts: Sequence[_Part | InvalidInputError], types: dict[str, pa.DataType], *, is_empty: bool
) -> list[_Part | InvalidInputError | NotFoundError]:
    """The parts in the types of the catalogue, to which each adds those of its new attributes."""
    conformed: list[_Part | InvalidInputError | NotFoundError] = []
    for part in parts:
        if isinstance(part, InvalidInputError):
            conformed.append(part)
        elif is_empty and not part.is_upsert:
            conformed.append(_nothing_loaded())
        else:
            try:
                columns = conformed_columns(part.table.drop_columns([_OP, ITEM_ID]), types)
            except InvalidInputError as error:
                conformed.append(error)
                continue
            types = {**types, **{name: column.type for name, column in columns.items()}}
            is_empty = False
            table = pa.table({name: part.table[name] for name in (_OP, ITEM_ID)} | columns)
            conformed.append(replace(part, table=table))
    return conformed


def _as_layer(base: pa.Table) -> pa.Table:
    """A snapshot as changes that came before all others."""
    reserved = {_OP, _ROW, COMMIT} & set(base.column_names)
    if reserved:
        raise CorruptArtefactError(
            f"{_FOLDER}/items: names that start with '_' are reserved; rename {sorted(reserved)}"
        )
    return (
        base.append_column(_OP, pa.array([_UPSERT] * len(base), pa.string()))
        .append_column(_ROW, pa.array(np.arange(len(base))))
        .append_column(COMMIT, pa.array([0] * len(base), pa.int64()))
    )


def _united(parts: Sequence[pa.Table]) -> pa.Table:
    """All rows, with all columns in one type each."""
    types: dict[str, pa.DataType] = {field.name: field.type for field in _NO_CHANGES.schema}
    united = [] if parts else [_NO_CHANGES]
    # Most of thousands of commits have the same columns.
    for part in (pa.concat_tables(alike) for _, alike in itertools.groupby(parts, key=lambda part: part.schema)):
        columns = {}
        for name, column in zip(part.column_names, part.columns, strict=True):
            if name not in types:
                types[name] = stored_type(column.type) or column.type
            type_ = types[name]
            try:
                columns[name] = column if column.type == type_ else column.cast(type_)
            except pa.ArrowException as error:
                raise CorruptArtefactError(
                    f"the catalogue's column {name!r} is {type_} in one table and {column.type} in the other"
                ) from error
        united.append(pa.table(columns))
    changes = pa.concat_tables(united, promote_options="default")
    missing = {ITEM_ID, _OP} - set(changes.column_names)
    if missing:
        raise CorruptArtefactError(f"the catalogue's tables have no column {min(missing)!r}")
    if _ROW not in changes.column_names:
        changes = changes.append_column(_ROW, pa.nulls(len(changes), pa.int64()))
    if changes[ITEM_ID].null_count:
        raise CorruptArtefactError(f"the catalogue has {changes[ITEM_ID].null_count} rows without {ITEM_ID}")
    if pc.any(pc.invert(pc.is_in(changes[_OP], pa.array([_UPSERT, _DELETE])))).as_py():
        raise CorruptArtefactError(f"{_FOLDER}/changes: {_OP} must be {_UPSERT!r} or {_DELETE!r} in every row")
    return changes
