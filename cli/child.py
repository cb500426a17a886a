"""Becomes another program that ends when its parent does: `python child.py PARENT_PID PROGRAM ARGUMENT…`.

Deliberately imports nothing of ours: it runs for a few milliseconds, without site packages, between fork and program.
(`preexec_fn` would do the same inside a fork of the parent, which is not safe once the parent has threads.)
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Binds this process to its parent, then becomes the program."""
    parent_pid, program = int(sys.argv[1]), sys.argv[2]
    if sys.platform == "linux":
        # It outlives exec. Other systems have no such thing: there a parent that is killed leaves its children.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        sys.exit("the parent has ended already")
    os.execv(program, sys.argv[2:])  # noqa: S606


if __name__ == "__main__":
    main()
