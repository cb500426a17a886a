"""`twotower doctor`.

Deliberately does not know what ails a checkpoint.
"""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli import options
from cli.options import DEFAULT_STORE

if TYPE_CHECKING:
    from trainer.doctor.report import Finding

_PAGES = Path("var/doctor")
_STYLES = {"critical": "bold red", "warning": "yellow", "note": "blue"}


def doctor(
    version: Annotated[int, typer.Argument(help="The checkpoint.", metavar="VERSION")],
    data: Annotated[
        Path | None, typer.Argument(help="Folder of the data files; without it most is left out.", metavar="[DATA]")
    ] = None,
    store: options.StoreUrl = DEFAULT_STORE,
    html_file: Annotated[
        Path | None, typer.Option("--html", help=f"The page. [default: {_PAGES}/VERSION.html]", metavar="FILE")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write findings and figures here.", metavar="FILE")
    ] = None,
) -> None:
    """Find what a checkpoint suffers from, and say what to do about it; plots are in one HTML page.

    Exits with 1 where a finding is critical.
    """
    # Read when torch is imported: threads that spin while they wait starve themselves on busy cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    import matplotlib  # noqa: F401 - known to be missing before the work, not after it

    from cli.failures import FAILED
    from cli.screen import say
    from towers.checkpoint import CheckpointStore
    from towers.store import Store
    from trainer.doctor.examine import examine
    from trainer.doctor.page import html

    report = examine(CheckpointStore(Store(store)), version, data)
    page = html_file if html_file is not None else _PAGES / f"{version}.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(html(report), encoding="utf-8")
    if json_file is not None:
        json_file.write_text(json.dumps(report.as_json(), indent=1) + "\n")
    for note in report.notes:
        say(f"Warning: {note}")
    if report.data is None:
        say("Without data only the training and held-out queries can be looked at: twotower doctor VERSION DATA")
    _print_findings(report.findings)
    say(f"Page: {page}")
    if any(finding.severity == "critical" for finding in report.findings):
        raise typer.Exit(FAILED)


def _print_findings(findings: "list[Finding]") -> None:
    from rich.text import Text

    from cli.screen import say, screen

    if not findings:
        say("Nothing found")
    for finding in findings:
        screen().print(
            Text.assemble((finding.severity, _STYLES[finding.severity]), f" {finding.name}: {finding.finding}"),
            soft_wrap=True,
        )
        screen().print(Text(f"  Remedy: {finding.remedy}"), soft_wrap=True)
