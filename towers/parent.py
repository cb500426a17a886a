"""What a process owes to another one of ours that started it: to end with it, and to report on its stdout.

Deliberately does not know what either of them does, nor what is reported.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

_PR_SET_PDEATHSIG = 1


def end_with_parent(pid: int) -> None:
    """Ends this process with its parent, even when the parent is killed. Call it first.

    Other systems than Linux have no such thing: there a parent that is killed leaves its children.

    Args:
        pid: The parent that is meant; where it has ended already, this process ends at once.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != pid:
        sys.exit(1)


@contextmanager
def message_stream() -> Iterator[TextIO]:
    """The real stdout. Whatever a library prints there goes to stderr instead."""
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as messages:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        yield messages
