"""A process that answers what it is asked: a line of JSON each way.

Deliberately does not know what it is asked.
"""

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self


class Process:
    """Runs until it is closed."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Starts it, and waits until it is ready, of which it tells by its first line.

        Args:
            command: Of a program that answers each line of its input with one.
            environment: Variables besides those of this process.

        Raises:
            OSError: it cannot be started.
            RuntimeError: it ended instead; says with what last words.
        """
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        self.version: str = self._answer()["version"]

    def ask(self, **asked: Any) -> dict[str, Any]:
        """What it answers.

        Raises:
            RuntimeError: it ended instead; says with what last words.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Ends it."""
        self._process.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            _, errors = self._process.communicate()
            raise RuntimeError((errors.strip().splitlines() or ["it said nothing"])[-1])
        answer: dict[str, Any] = json.loads(line)
        return answer
