"""`twotower evaluate`.

Deliberately does not know how a model is judged.
"""

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from cli import options
from cli.options import DEFAULT_STORE


def evaluate(
    version: Annotated[int, typer.Argument(help="The checkpoint.", metavar="VERSION")],
    data: Annotated[Path, typer.Argument(help="Folder of the data files.", metavar="DATA")],
    store: options.StoreUrl = DEFAULT_STORE,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures here.", metavar="FILE")] = None,
) -> None:
    """Rank all items for each user's last interaction, by a checkpoint and by baselines, overall and by slice."""
    # Read when torch is imported: threads that spin while they wait starve themselves on busy cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from cli.screen import say, screen
    from towers.checkpoint import CheckpointStore
    from towers.store import Store
    from trainer import comparison
    from trainer.judge import evaluate_version

    evaluation = evaluate_version(CheckpointStore(Store(store)), version, data)
    found, ks = evaluation.comparison, evaluation.options.ks
    for note in evaluation.notes:
        say(f"Warning: {note}")
    seen = "seen items left out" if evaluation.options.exclude_seen else "seen items included"
    title = (
        f"Checkpoint {version}: {found.num_targets:,} targets of {found.num_queries:,} users, all items ranked, {seen}"
    )
    screen().print(comparison.accuracy_table(found, ks, title))
    screen().print(comparison.exposure_table(found, ks))
    screen().print(comparison.slice_table(found, evaluation.options.metric))
    if json_file is not None:
        json_file.write_text(json.dumps({"version": version, **comparison.as_json(found)}, indent=1) + "\n")
