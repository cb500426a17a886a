"""What a command leaves, for tests to look at."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """Exit code and all that was printed."""

    exit_code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """What was printed, read as JSON."""
        return json.loads(self.out)


Twotower = Callable[..., Outcome]
"""Runs `twotower` with these arguments."""
