"""Where commands print.

Deliberately does not know what.
"""

import sys
from collections.abc import Sequence
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

_WIDTH_OF_A_FILE = 200
"""Tables that go into a pipe or a file are not squeezed into 80 columns."""


def screen() -> Console:
    """The console of results."""
    return Console(width=None if sys.stdout.isatty() else _WIDTH_OF_A_FILE, highlight=False)


def say(line: str) -> None:
    """Prints one line, as it is."""
    typer.echo(line)


def print_table(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a titled table, below an empty line."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print()
    console.print(table)


def shown(value: Any) -> str:
    """An attribute's value, briefly: 1995.0 is 1995, nothing is empty."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() else f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(shown(entry) for entry in value)
    return str(value)
