"""`twotower train` and `twotower checkpoints`.

Deliberately does not know how a model is trained.
"""

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import options
from cli.options import DEFAULT_STORE

if TYPE_CHECKING:
    from towers.checkpoint import Manifest
    from towers.deployment import Deployment


def train(
    config: Annotated[Path, typer.Argument(help="The training configuration.", metavar="CONFIG.toml")],
    store: options.StoreUrl = DEFAULT_STORE,
    data: Annotated[
        Path | None, typer.Option(help="Folder of the data files, instead of the configuration's.", metavar="FOLDER")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")] = False,
    auto: Annotated[
        bool,
        typer.Option(
            "--auto", help="First choose what CONFIG.toml leaves out from the data, and write it to CONFIG.auto.toml."
        ),
    ] = False,
    force: Annotated[
        str | None,
        typer.Option(help="Publish although gates refuse; the manifest keeps who and why.", metavar="REASON"),
    ] = None,
) -> None:
    """Train both towers and publish them as a new checkpoint. Ctrl-C is safe: --resume goes on.

    Towers that have collapsed, or cannot be shown to be about as good as the live checkpoint, are not published.
    """
    from cli.failures import INTERRUPTED
    from cli.screen import screen
    from trainer.config import read_config

    # Before torch, whose import takes seconds, and which reads this then: threads that spin while they wait starve
    # themselves when anything else runs on the same cores.
    if auto:
        from trainer.chosen import write_chosen

        config = write_chosen(config, data, screen())
    read_config(config)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from trainer import run

    try:
        run.train(config, store=store, resume=resume, console=screen(), data_folder=data, force=force)
    except run.Interrupted as interrupted:
        typer.echo(str(interrupted), err=True)
        raise typer.Exit(INTERRUPTED) from interrupted


def checkpoints(store: options.StoreUrl = DEFAULT_STORE, as_json: options.Json = False) -> None:
    """List the published checkpoints with their offline metrics."""
    from cli.screen import say
    from towers.checkpoint import CheckpointStore
    from towers.deployment import DeploymentStore
    from towers.errors import CorruptArtefactError
    from towers.store import Store

    opened = Store(store)
    published = CheckpointStore(opened)
    deployment = DeploymentStore(opened).current()
    manifests: list[Manifest | CorruptArtefactError] = []
    versions = published.versions()
    for version in versions:
        try:
            manifests.append(published.manifest(version))
        except CorruptArtefactError as error:
            manifests.append(error)
    rows = [_as_row(version, manifest, deployment) for version, manifest in zip(versions, manifests, strict=True)]
    if as_json:
        say(json.dumps(rows))
    elif rows:
        _print_table(rows)
    else:
        say(f"no checkpoint is published in {opened.url}; train one: twotower train CONFIG.toml --store {store}")


def _as_row(version: int, manifest: "Manifest | Exception", deployment: "Deployment") -> dict[str, Any]:
    slot = {deployment.live_version: "live", deployment.standby_version: "standby"}.get(version, "")
    row: dict[str, Any] = {"version": version, "slot": slot, "held": slot == "standby" and deployment.held}
    if isinstance(manifest, Exception):
        return {**row, "error": str(manifest)}
    return {
        **row,
        "created": manifest.created.isoformat(timespec="seconds"),
        "dim": manifest.dim,
        "parent_version": manifest.parent_version,
        "code_revision": manifest.code_revision,
        "forced": manifest.forced.model_dump() if manifest.forced else None,
        "metrics": dict(manifest.metrics),
    }


def _print_table(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    from cli.screen import screen

    metrics = list(dict.fromkeys(name for row in rows for name in row.get("metrics", {})))
    # The test split is what versions are compared by; the rest is in the JSON.
    names = [name for name in metrics if re.fullmatch(r"test\.(recall|ndcg)_at_\d+", name)] or metrics
    table = Table()
    for name in ("version", "created", "dim", *names):
        table.add_column(name, justify="right")
    table.add_column("")
    for row in rows:
        mark = row["slot"] + (" (held)" if row["held"] else "")
        if "error" in row:
            table.add_row(str(row["version"]), *[""] * (len(names) + 2), f"{mark} damaged: {row['error']}".strip())
            continue
        if row["forced"]:
            mark = f"{mark} forced: {row['forced']['reason']}".strip()
        figures = (f"{row['metrics'][name]:.4f}" if name in row["metrics"] else "" for name in names)
        table.add_row(str(row["version"]), row["created"], str(row["dim"]), *figures, mark)
    screen().print(table)
