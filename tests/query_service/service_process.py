"""A service in a process of its own, started from the environment alone.

Deliberately does not know what a test wants of it.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from child_process import tied

from towers.health import is_serving

PATIENCE_S = 60.0


def free_port() -> int:
    """A port that nothing listens on at the moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


class ServiceProcess:
    """`python -m MODULE`, on one port over all its starts."""

    def __init__(self, service: str, service_name: str, settings: Mapping[str, object]) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self._service = service
        self._service_name = service_name
        self._settings = {name: str(value) for name, value in settings.items()}
        self._log = Path(tempfile.mkstemp(prefix=f"{service}-", suffix=".log")[1])
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def log(self) -> str:
        return self._log.read_text()

    def start(self) -> None:
        settings = {"ADDRESS": self.address, "POLL_INTERVAL_S": "0.05", "DRAIN_S": "0", **self._settings}
        environment = {
            **{name: value for name, value in os.environ.items() if name != "REDIS_URL"},
            **{f"TWOTOWER_{name}": value for name, value in settings.items()},
            "OMP_NUM_THREADS": "1",
        }
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                tied(sys.executable, "-m", "cli.main", "serve", self._service), env=environment, stdout=log, stderr=log
            )

    def until_ready(self) -> None:
        """Waits until the service reports SERVING."""
        assert self._process is not None
        give_up = time.monotonic() + PATIENCE_S
        while not is_serving(self.address, self._service_name):
            assert self._process.poll() is None, f"{self._service} has ended:\n{self.log}"
            assert time.monotonic() < give_up, f"{self._service} is not ready:\n{self.log}"
            time.sleep(0.02)

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def exit_code(self) -> int:
        """Waits for the end."""
        assert self._process is not None
        code = self._process.wait(PATIENCE_S)
        self._process = None
        return code

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._process is not None:
            self.signal(signal.SIGKILL)
            self.exit_code()
        if error is not None:
            sys.stdout.write(f"--- {self._service} ---\n{self.log}")
        self._log.unlink()
