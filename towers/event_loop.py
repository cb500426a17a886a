"""The event loop of a service's process, and how the interpreter is shared around it.

Deliberately does not know what runs on it.
"""

import gc
import sys
from collections.abc import Coroutine
from typing import Any

import uvloop

_SWITCH_INTERVAL_S = 0.0005
"""A request asks for the interpreter several times; at Python's 5 ms each, one that comes while a thread computes (a
vocabulary is loaded, an update applied) would wait for tens of milliseconds."""
_NEW_OBJECTS = 50_000
"""More than there were, before garbage is looked for. A call leaves no cycles behind: at Python's 700, every few
requests would pay for a look."""


def run(main: Coroutine[Any, Any, None]) -> None:
    """Runs a service until `main` returns."""
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    gc.set_threshold(_NEW_OBJECTS)
    uvloop.run(main)
