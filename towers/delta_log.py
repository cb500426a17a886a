"""One Delta table as a log of numbered commits: which of them changed data, and what each appended.

Deliberately does not know what the rows mean. The one place where deltalake's errors become ours.
"""

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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
        self._num_commits = 0
        self._last_edit = 0
        self._recent: dict[int, list[dict[str, Any]]] = {}

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
            return pq.read_table(pa.BufferReader(content))
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
        path = f"{self._path}/_delta_log/{number - 1:020}.json"
        try:
            content = self._store.get(path)
        except NotFoundError:
            return None
        try:
            actions = [json.loads(line) for line in content.splitlines() if line.strip()]
        except ValueError as error:
            raise CorruptArtefactError(f"{path} is not a Delta commit: {error}") from error
        self._recent[number] = actions
        self._recent.pop(number - _NUM_RECENT, None)
        return actions


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
