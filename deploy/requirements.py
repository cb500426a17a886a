"""Prints the requirements of the core, or of one extra, as pyproject.toml declares them.

Deliberately knows nothing but the standard library: it runs while an image is built, before anything is installed.
"""

import sys
import tomllib
from pathlib import Path


def requirements(project_file: Path, extra: str | None) -> list[str]:
    """Requirement lines.

    Args:
        project_file: The pyproject.toml.
        extra: Name of an optional-dependencies table entry; None for the core.

    Raises:
        KeyError: there is no such extra.
    """
    project = tomllib.loads(project_file.read_text())["project"]
    declared: list[str] = project["dependencies"] if extra is None else project["optional-dependencies"][extra]
    return declared


if __name__ == "__main__":
    sys.stdout.write("\n".join(requirements(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)) + "\n")
