"""Reads a Dockerfile into stages, for the tests here.

Deliberately knows only what this project's Dockerfile uses: no here-documents, no escape directive.
"""

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Stage:
    """One `FROM … AS name` and its instructions, those of the stages below it first."""

    instructions: tuple[tuple[str, str], ...]
    """Pairs of keyword and arguments."""

    def last(self, keyword: str) -> str:
        """Arguments of the instruction that holds in the end; empty without any."""
        return next((arguments for word, arguments in reversed(self.instructions) if word == keyword), "")

    def command(self, keyword: str) -> list[str]:
        """Exec form of ENTRYPOINT, CMD, or the CMD of HEALTHCHECK."""
        return list(json.loads(self.last(keyword)[self.last(keyword).index("[") :]))

    @property
    def environment(self) -> dict[str, str]:
        """All ENV instructions, in order."""
        pairs = (pair for word, arguments in self.instructions if word == "ENV" for pair in shlex.split(arguments))
        return dict(pair.split("=", 1) for pair in pairs)


def read_stages(path: Path) -> dict[str, Stage]:
    """Stages by name."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    stages: dict[str, Stage] = {}
    name = ""
    for line in re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines():
        word, _, arguments = line.strip().partition(" ")
        if word == "FROM":
            parent, _, name = arguments.split()
            stages[name] = Stage(stages[parent].instructions if parent in stages else ())
        elif word and name:
            stages[name] = Stage((*stages[name].instructions, (word, arguments.strip())))
    return stages
