"""`twotower demo`.

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
