"""`twotower demo` and `twotower demo-text`.

Deliberately does not know what is shown (`cli.demo`).
"""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    folder: Annotated[Path, typer.Option(help="Holds data, store, logs and report.", metavar="FOLDER")] = Path(
        "var/demo"
    ),
) -> None:
    """Train, publish, serve, retrieve and swap under load, on MovieLens-100K."""
    from cli.demo.run import run
    from cli.screen import screen

    run(folder, screen())


def demo_text(
    folder: Annotated[Path, typer.Option(help="Holds documents, store and logs.", metavar="FOLDER")] = Path(
        "var/demo-text"
    ),
) -> None:
    """Train a text search of Python's standard library, publish and serve it, and answer typed questions."""
    from cli.demo.text import run
    from cli.screen import screen

    run(folder, screen())
