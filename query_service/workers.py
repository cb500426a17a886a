"""Several processes of the query service on one address: this one starts them, replaces those that die, ends them all.

Deliberately does not know how a request is answered: it loads no tower and listens on nothing.

1. The address belongs to these processes alone, from before the first starts until after the last has ended.
2. The first worker listens at once and says why the service is not ready. The others start when it is ready, and listen
   when they are: no connection is given to a worker that cannot answer while another one can.
3. Whatever ends the first worker before it is ready ends the service: what is wrong is told once.
4. After that a worker that ends is replaced, again and again, with growing pauses.
5. Where this process ends, in whatever way, so do the workers.
"""

import asyncio
import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict

from query_service.settings import QuerySettings
from towers.errors import InvalidInputError, TwoTowerError
from towers.rpc import until_stopped

_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 30.0
_PATIENCE_S = 5.0
"""Beyond drain and grace, before a worker that does not end is killed."""

_log = logging.getLogger(__name__)


class WorkerOrder(BaseModel):
    """What a worker is told: one line, JSON, on its stdin, since settings may hold a password."""

    model_config = ConfigDict(frozen=True)

    number: int
    settings: dict[str, Any]
    folder: Path
    """Holds the sockets over which workers ask each other."""
    joins_at_once: bool
    """Whether it listens before its version is loaded."""


class WorkerMessage(BaseModel):
    """What a worker says once: one line, JSON, on its stdout."""

    model_config = ConfigDict(frozen=True)

    failure: str = ""
    """Why it cannot start, in words; empty: it is ready."""
    is_invalid_input: bool = False

    @classmethod
    def of_failure(cls, error: TwoTowerError) -> Self:
        """What to say of a failure."""
        return cls(failure=str(error), is_invalid_input=isinstance(error, InvalidInputError))

    @property
    def error(self) -> TwoTowerError:
        """The failure, for the process that started the worker."""
        return (InvalidInputError if self.is_invalid_input else TwoTowerError)(self.failure)


def run(settings: QuerySettings) -> None:
    """Keeps the workers until SIGTERM or SIGINT; then they drain.

    Raises:
        InvalidInputError: another process listens on the address, or a worker cannot start with these settings.
        TwoTowerError: the first worker ended before it was ready.
        ModuleNotFoundError: what the workers need is not installed.
    """
    # A worker that fails at an import cannot say so; this process need not pay for what it only looks for.
    if find_spec("redis") is None:
        raise ModuleNotFoundError("redis is not installed", name="redis")
    asyncio.run(_run(settings))


async def _run(settings: QuerySettings) -> None:
    # First, so that a signal during the start ends the workers too.
    stopped = asyncio.create_task(until_stopped())
    with (
        exclusive(settings.address) as address,
        tempfile.TemporaryDirectory(prefix="twotower-") as folder,
    ):
        _log.info("%d workers share %s", settings.workers, address)
        workers = _Workers(settings, address, Path(folder))
        keeping = [asyncio.create_task(workers.keep(number)) for number in range(settings.workers)]
        try:
            ended, _ = await asyncio.wait({stopped, *keeping}, return_when=asyncio.FIRST_COMPLETED)
            for task in ended:
                await task
        finally:
            for task in keeping:
                task.cancel()
            await asyncio.gather(*keeping, return_exceptions=True)


@contextmanager
def exclusive(address: str) -> Iterator[str]:
    """Keeps an address for the processes that this one starts: strangers cannot listen there, nor do any already.

    The sockets that hold it never listen, so no connection ends with them. What makes others fail is that they are
    not open for reuse; what lets the workers in is that they share their port with the same user's processes.

    Args:
        address: `host:port`; with port 0, a free one is chosen.

    Returns:
        The address with its port.

    Raises:
        InvalidInputError: another process listens there, or the host is not one of this machine.
    """
    host, _, text = address.rpartition(":")
    port = int(text)
    with ExitStack() as held:
        try:
            found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            for family, kind, protocol, _, (name, *_) in dict.fromkeys(found):
                holder = held.enter_context(socket.socket(family, kind, protocol))
                # As gRPC's servers do: a port whose last connections are still closing is free.
                holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                holder.bind((name, port))
                holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
                holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                port = holder.getsockname()[1]
        except OSError as error:
            raise InvalidInputError(f"cannot listen on {address}: is another process using it? ({error})") from error
        yield f"{host}:{port}"


class _Workers:
    """All workers of a service."""

    def __init__(self, settings: QuerySettings, address: str, folder: Path) -> None:
        self._settings = {**settings.model_dump(mode="json"), "address": address}
        self._end_s = settings.drain_s + settings.grace_s + _PATIENCE_S
        self._folder = folder
        self._running: set[int] = set()
        self._is_ready = asyncio.Event()
        """Set once a worker has been ready."""

    async def keep(self, number: int) -> None:
        """Runs one worker, and the next one in its place, until cancelled; then it drains.

        Raises:
            TwoTowerError: the first worker ended before it was ready.
        """
        if number > 0:
            await self._is_ready.wait()
        pause_s = _FIRST_PAUSE_S
        while True:
            said, why = await self._run_one(number)
            if said == WorkerMessage():
                pause_s = _FIRST_PAUSE_S
            elif not self._is_ready.is_set():
                raise said.error if said else TwoTowerError(f"worker {number} has ended before it was ready: {why}")
            reason = f"{why}: {said.failure}" if said and said.failure else why
            _log.warning("worker %d has ended and is replaced in %.1f s: %s", number, pause_s, reason)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _run_one(self, number: int) -> tuple[WorkerMessage | None, str]:
        """One life of a worker: what it said, and how it ended."""
        order = WorkerOrder(
            number=number, settings=self._settings, folder=self._folder, joins_at_once=not self._running
        )
        self._running.add(number)
        try:
            # This thread starts it, with which it dies. Ctrl-C reaches this process alone.
            worker = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "query_service.worker", str(os.getpid())),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                process_group=0,
            )
            try:
                _log.info("worker %d starts, pid %d", number, worker.pid)
                return await self._accompany(worker, order)
            finally:
                await self._end(worker, number)
        finally:
            self._running.discard(number)

    async def _accompany(
        self, worker: asyncio.subprocess.Process, order: WorkerOrder
    ) -> tuple[WorkerMessage | None, str]:
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.write(order.model_dump_json().encode() + b"\n")
        line = await worker.stdout.readline()
        said = WorkerMessage.model_validate_json(line) if line else None
        if said == WorkerMessage():
            _log.info("worker %d is ready", order.number)
            self._is_ready.set()
        return said, _in_words(await worker.wait())

    async def _end(self, worker: asyncio.subprocess.Process, number: int) -> None:
        """Lets a worker drain that has not ended by itself."""
        if worker.returncode is not None:
            return
        worker.terminate()
        try:
            await asyncio.wait_for(worker.wait(), self._end_s)
        except TimeoutError:
            _log.warning("worker %d does not end and is killed", number)
            worker.kill()
            await worker.wait()


def _in_words(exit_code: int) -> str:
    return f"killed by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"exit code {exit_code}"
