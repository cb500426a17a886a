"""One Delta table as a log of numbered commits: which of them changed data, and what each appended.

Deliberately does not know what the rows mean. The one place where deltalake's errors become ours.
"""

import json
import logging
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError

from towers.errors import ConflictError, CorruptArtefactError, NotFoundError, StoreUnavailableError, TwoTowerError
from towers.store import Store

COMMIT = "_commit"
"""Column of appended rows: the number of their commit."""
COMPACTED_EDIT = "twotower.compacted_edit"
"""In the commit info of a compaction: the edit that it leaves untouched."""

_PARALLEL_READS = 8
_NUM_RECENT = 16
"""Commits that are kept in memory: the newest are looked at several times."""
_NUM_SIZES = 100_000
"""Commits whose sizes are kept."""

_CHECKPOINT_INTERVAL = 100
"""Commits between two summaries of the log where the table does not say; Delta's own default."""
_LAST_PLAIN_WRITER_VERSION = 4
"""Up to here all that Delta may ask of a writer is in a table's configuration and in its columns' metadata."""

_log = logging.getLogger(__name__)


class DeltaLog:
    """The commits of one Delta table, numbered from 1: commit number n has the Delta version n - 1.

    Commits and appended files are read through `Store`: `DeltaTable.history` and `load_cdf` hold the interpreter lock
    while they wait for the store, which would stop a serving process.
    """

    def __init__(self, store: Store, path: str, configuration: Mapping[str, str]) -> None:
        """Nothing is read yet.

        Args:
            store: The object store.
            path: The table's folder in the store.
            configuration: Table properties, set when the table is created.
        """
        self._store = store
        self._configuration = configuration
        self._path = path
        self._url = f"{store.url}/{self._path}"
        self._lock = threading.Lock()
        self._shape: _Shape | None = None
        self._num_commits = 0
        self._last_edit = 0
        self._recent: dict[int, list[dict[str, Any]]] = {}
        self._sizes: dict[int, tuple[int, int]] = {}
        """Rows and bytes that each commit appended: a follower of the log sizes it without reading it again."""

    def open(self, number: int | None = None) -> DeltaTable | None:
        """The table after a commit, the last one when left out; None when there is no table."""
        version = None if number is None else number - 1
        with translated(self._path):
            try:
                return DeltaTable(self._url, version=version, storage_options=self._store.storage_options)
            except TableNotFoundError:
                return None

    def write(
        self,
        table: DeltaTable | None,
        rows: pa.Table,
        *,
        mode: Literal["append", "overwrite"],
        schema_mode: Literal["merge", "overwrite"],
        properties: CommitProperties | None = None,
    ) -> int:
        """Commits rows to a table that `open` gave, creating it where there was none; returns the commit's number.

        Raises:
            ConflictError: somebody else created or changed the table; nothing was written.
        """
        with translated(self._path):
            if table is not None:
                write_deltalake(table, rows, mode=mode, schema_mode=schema_mode, commit_properties=properties)
                return table.version() + 1
            try:
                write_deltalake(
                    self._url,
                    rows,
                    mode="error",
                    configuration=self._configuration,
                    storage_options=self._store.storage_options,
                    # A retry would let two creators both succeed, the second with its schema in place of the first's.
                    commit_properties=properties or CommitProperties(max_commit_retries=0),
                )
            except DeltaError as error:
                if "already exists" in str(error):
                    raise ConflictError(f"{self._path} was created by somebody else") from error
                raise
            return 1

    def schema(self) -> pa.Schema | None:
        """The columns of the table; None when there is no table. Costs one small read while the columns stay."""
        self.last_edit()
        shape = self._shape
        if shape is None:
            table = self.open()
            if table is None:
                return None
            with translated(self._path):
                shape = self._shape = _Shape.of(table)
        return shape.schema

    def append(self, rows: pa.Table, operation: str) -> int:
        """Commits rows whose columns the table has; returns the commit's number. Durable on return.

        Costs the same however long the log is: deltalake's own writer goes through all files of the table. Others that
        append meanwhile are no conflict, the commit comes after theirs.

        Args:
            rows: Columns that `schema` has, in its types; others of the table are null.
            operation: What the commit info calls it.

        Raises:
            ConflictError: the table is gone or its columns changed; nothing was written.
        """
        file = f"part-00000-{uuid.uuid4()}-c000.snappy.parquet"
        schema = self.schema()
        if schema is None:
            raise ConflictError(f"{self._path} is gone")
        shape = self._shape
        if shape is None or not shape.is_plain:
            table = self.open()
            if table is None:
                raise ConflictError(f"{self._path} is gone")
            return self.write(table, rows, mode="append", schema_mode="merge")
        sink = pa.BufferOutputStream()
        pq.write_table(rows.cast(pa.schema([schema.field(name) for name in rows.column_names])), sink)
        content = sink.getvalue()
        self._store.put_durable(f"{self._path}/{file}", content.to_pybytes())
        now_ms = time.time_ns() // 1_000_000
        actions: Sequence[dict[str, Any]] = (
            {"commitInfo": {"timestamp": now_ms, "operation": operation, "operationParameters": {"mode": "Append"}}},
            {
                "add": {
                    "path": file,
                    "partitionValues": {},
                    "size": content.size,
                    "modificationTime": now_ms,
                    "dataChange": True,
                    "stats": json.dumps({"numRecords": rows.num_rows}),
                }
            },
        )
        commit = "\n".join(map(json.dumps, actions)).encode()
        while True:
            number = self.num_commits() + 1
            if self._shape is not shape:
                self._store.delete(f"{self._path}/{file}")
                raise ConflictError(f"the columns of {self._path} changed")
            try:
                self._store.put_durable(self._commit_path(number), commit)
            except ConflictError:
                # A client of a store that repeats a request may meet its own commit.
                if any(action.get("add", {}).get("path") == file for action in self._actions(number) or ()):
                    break
                continue
            break
        if number % shape.checkpoint_interval == 0:
            self._checkpoint()
        return number

    def num_commits(self) -> int:
        """Number of commits now."""
        self.last_edit()
        return self._num_commits

    def last_edit(self) -> int:
        """Number of the last commit that changed data; 0 when there is none."""
        with self._lock:
            if self._num_commits == 0:
                table = self.open()
                if table is None:
                    return 0
                number = table.version() + 1
                self._last_edit = self.edit_at(number)
                self._num_commits = number
            while (actions := self._actions(self._num_commits + 1)) is not None:
                if any("metaData" in action or "protocol" in action for action in actions):
                    self._shape = None
                edit = _edit(actions, self._num_commits + 1)
                self._last_edit = self._last_edit if edit is None else edit
                self._num_commits += 1
            return self._last_edit

    def edit_at(self, number: int) -> int:
        """Number of the last commit up to `number` that changed data; 0 when there is none."""
        for candidate in range(number, 0, -1):
            actions = self._actions(candidate)
            if actions is None:
                return candidate  # Removed by a tool that cleans logs: all before it counts as one edit.
            edit = _edit(actions, candidate)
            if edit is not None:
                return edit
        return 0

    def created_at(self, number: int) -> datetime | None:
        """When a commit was written; None where its writer did not say."""
        for action in self._actions(number) or ():
            timestamp_ms = action.get("commitInfo", {}).get("timestamp")
            if timestamp_ms is not None:
                return datetime.fromtimestamp(timestamp_ms / 1000, UTC)
        return None

    def appended(self, numbers: Sequence[int]) -> list[tuple[int, pa.Table]]:
        """The rows that commits appended, with the column `_commit`: one table a file, in the order of the numbers.

        Raises:
            NotFoundError: a commit or one of its files was removed.
            CorruptArtefactError: a commit removes rows, or a file cannot be read.
        """
        if len(numbers) < _PARALLEL_READS:
            return [(number, rows) for number in numbers for rows in self._appended(number)]
        with ThreadPoolExecutor(_PARALLEL_READS) as readers:
            commits = zip(numbers, readers.map(self._appended, numbers), strict=True)
            return [(number, rows) for number, commit in commits for rows in commit]

    def appended_size(self, numbers: Sequence[int]) -> tuple[int, int]:
        """How many rows commits appended, as far as their writers said, and the size in bytes of the files."""
        with ThreadPoolExecutor(_PARALLEL_READS) as readers:
            list(readers.map(self._actions, [number for number in numbers if number not in self._sizes]))
        sizes = [self._sizes.get(number, (0, 0)) for number in numbers]
        return sum(num_rows for num_rows, _ in sizes), sum(size_bytes for _, size_bytes in sizes)

    def _appended(self, number: int) -> list[pa.Table]:
        actions = self._actions(number)
        if actions is None:
            raise NotFoundError(
                f"{self._path}: commit {number - 1} was removed before a compaction had folded it; "
                "restore it, or load the catalogue again"
            )
        tables = []
        for action in actions:
            if action.get("remove", {}).get("dataChange"):
                raise CorruptArtefactError(f"{self._path}: commit {number - 1} removes rows; the log is append-only")
            added = action.get("add", {})
            if added.get("dataChange"):
                rows = self._rows(unquote(added["path"]))
                tables.append(rows.append_column(COMMIT, pa.array([number] * len(rows), pa.int64())))
        return tables

    def _rows(self, file: str) -> pa.Table:
        try:
            content = self._store.get(f"{self._path}/{file}")
            # A fourth of what `read_table` costs a small file.
            return pq.ParquetFile(pa.BufferReader(content)).read(use_threads=False)
        except NotFoundError as error:
            raise NotFoundError(
                f"{self._path}/{file} was removed before a compaction had folded it; "
                "restore it, or load the catalogue again"
            ) from error
        except pa.ArrowException as error:
            raise CorruptArtefactError(f"{self._path}/{file} cannot be read: {error}") from error

    def _actions(self, number: int) -> list[dict[str, Any]] | None:
        """What a commit did; None when there is none of this number, or not any more."""
        known = self._recent.get(number)
        if known is not None:
            return known
        path = self._commit_path(number)
        try:
            content = self._store.get(path)
        except NotFoundError:
            return None
        try:
            actions = [json.loads(line) for line in content.splitlines() if line.strip()]
        except ValueError as error:
            raise CorruptArtefactError(f"{path} is not a Delta commit: {error}") from error
        self._sizes[number] = _appended_size(actions)
        self._sizes.pop(number - _NUM_SIZES, None)
        self._recent[number] = actions
        self._recent.pop(number - _NUM_RECENT, None)
        return actions

    def _checkpoint(self) -> None:
        """Sums the log up, so that opening the table stays fast. Not worth a commit that is durable already."""
        table = self.open()
        if table is not None:
            try:
                with translated(self._path):
                    table.create_checkpoint()
            except TwoTowerError as error:
                _log.warning("%s: its log has no new checkpoint: %s", self._path, error)

    def _commit_path(self, number: int) -> str:
        return f"{self._path}/_delta_log/{number - 1:020}.json"


@dataclass(frozen=True)
class _Shape:
    """What a writer must know of a table."""

    schema: pa.Schema
    is_plain: bool
    """Whether an append is no more than a file and a commit that names it."""
    checkpoint_interval: int

    @classmethod
    def of(cls, table: DeltaTable) -> "_Shape":
        metadata, protocol = table.metadata(), table.protocol()
        schema = pa.schema(table.schema().to_arrow())
        is_plain = (
            protocol.min_reader_version == 1
            and protocol.min_writer_version <= _LAST_PLAIN_WRITER_VERSION
            and not metadata.partition_columns
            and not any(name.startswith("delta.constraints.") for name in metadata.configuration)
            and not any(field.metadata for field in schema)
        )
        return cls(schema, is_plain, int(metadata.configuration.get("delta.checkpointInterval", _CHECKPOINT_INTERVAL)))


def _appended_size(actions: Sequence[dict[str, Any]]) -> tuple[int, int]:
    """Rows that a commit appended, as far as its writer said, and the size in bytes of their files."""
    files = [action["add"] for action in actions if action.get("add", {}).get("dataChange")]
    num_rows = sum(json.loads(file.get("stats") or "{}").get("numRecords", 0) for file in files)
    return num_rows, sum(file["size"] for file in files)


def _edit(actions: Sequence[dict[str, Any]], number: int) -> int | None:
    """The edit that a commit leaves the table at; None when it changes no data."""
    for action in actions:
        compacted_edit = action.get("commitInfo", {}).get(COMPACTED_EDIT)
        if compacted_edit is not None:
            return int(compacted_edit)
    changes_data = any(action.get(kind, {}).get("dataChange") for action in actions for kind in ("add", "remove"))
    return number if changes_data else None


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Turns deltalake's errors into ours; `what` begins the message."""
    try:
        yield
    except TwoTowerError:
        raise
    except CommitFailedError as error:
        raise ConflictError(f"{what} was changed by somebody else: {error}") from error
    except Exception as error:  # Where a store fails below the surface, deltalake raises Exception itself.
        first_line = str(error).partition("\n")[0]
        if "not found" in str(error):
            raise NotFoundError(f"{what}: a file is gone: {first_line}") from error
        if isinstance(error, DeltaError):
            raise CorruptArtefactError(f"{what}: {first_line}") from error
        raise StoreUnavailableError(f"{what}: {first_line}") from error
