"""Child processes of tests that end with the test run, however it ends.

Deliberately does not know what they do.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

_DIE_WITH_PARENT = (
    "import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, signal.SIGKILL); os.execv(sys.argv[1], sys.argv[1:])"
)
"""PR_SET_PDEATHSIG, which outlives exec. Set by a process of its own, so that the test run never forks Python code."""


def tied(program: Path | str, *arguments: str) -> Sequence[str]:
    """The command that runs a program, by its full path, as a child that dies with the thread that starts it."""
    return (sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(program), *arguments)


def tied_python(code: str, *arguments: str) -> Sequence[str]:
    """The same for Python code; `arguments` are its `sys.argv[1:]`."""
    return tied(sys.executable, "-c", code, *arguments)
