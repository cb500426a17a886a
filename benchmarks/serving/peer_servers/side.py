"""What a server must do to be measured beside others, and what they share: a band of recall, child processes, ports.

Deliberately does not know any server.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cli import child

HOST = "127.0.0.1"
K = 100
BUILD_EFFORT = 100
"""Of a graph: what most servers take by default."""
CALL_TIMEOUT_S = 30.0
_START_S = 60.0
_GRACE_S = 10.0
_POLL_S = 0.02
_LAST_CHARACTERS = 300


class SideError(Exception):
    """A server that cannot be measured, and why."""


@dataclass(frozen=True)
class Band:
    """The recall that all sides are tuned to."""

    low: float
    high: float


class Client(Protocol):
    """A caller's way to the server. One whose `search` is a coroutine is shared by all callers.

    Where the side does not tune itself it has `prepare(effort: int)` too: it searches so widely from then on.
    """

    def search(self, vectors: NDArray[np.float32]) -> Any:
        """The K best items of each query `[B, D]`, as the library gives them, in one call."""

    def row(self, item: Any) -> int:
        """The row of one of them."""


class Side(Protocol):
    """A running server, and how to fill it."""

    NAME: str
    IS_SERVER: bool
    """Or a library inside the callers' own process."""
    TUNES_ITSELF: bool
    versions: str
    """Of the server and of its client, in words."""

    def __init__(self, folder: Path, band: Band, stack: ExitStack) -> None:
        """Starts it.

        Args:
            folder: Empty; takes its files.
            band: What its items are to be found with.
            stack: Ends it.

        Raises:
            ImportError: it is not installed.
            SideError: it does not start.
        """

    def fill(self, items: NDArray[np.float32], queries: NDArray[np.float32]) -> str:
        """Loads items `[N, D]` until they are found through an index, and returns that in words.

        Args:
            items: What is to be found.
            queries: `[Q, D]`, others than those that will be asked.

        Raises:
            SideError: the index is not used.
        """

    def client(self) -> Callable[[], Client]:
        """What makes a client in another process."""

    def replace(self, items: NDArray[np.float32], queries: NDArray[np.float32]) -> None:
        """Puts other items in place of all, while they are searched; returns once callers find those alone."""


class Server:
    """A child process that ends with this one."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process = process
        self._log = log

    def wait(self, is_up: Callable[[], object]) -> None:
        """Waits until a check is true; one that raises is false.

        Raises:
            SideError: the process has ended, or is not up in time.
        """
        give_up_s, problem = time.monotonic() + _START_S, ""
        while time.monotonic() < give_up_s and self._process.poll() is None:
            try:
                if is_up():
                    return
            except Exception as error:  # Whatever a client's library raises while nobody listens.
                problem = f"{error}; "
            time.sleep(_POLL_S)
        log = " ".join(self._log.read_text(errors="replace").split())[-_LAST_CHARACTERS:]
        raise SideError(f"it does not start: {problem}{log}")


@contextmanager
def server(
    command: Sequence[str],
    log: Path,
    environment: Mapping[str, str] | None = None,
    end_signal: signal.Signals = signal.SIGTERM,
) -> Iterator[Server]:
    """Runs a program, out of reach of Ctrl-C so that it can be ended in order.

    Args:
        command: The program with its arguments.
        log: Takes what it writes.
        environment: Beside our own.
        end_signal: What asks it to end.
    """
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", child.__file__, str(os.getpid()), *command],
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
    try:
        yield Server(process, log)
    finally:
        process.send_signal(end_signal)
        try:
            process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def chunks(items: NDArray[np.float32], size: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Items `[N, D]` some at a time, each part with the row of its first."""
    for first in range(0, len(items), size):
        yield first, items[first : first + size]
