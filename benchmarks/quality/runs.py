"""Training runs of a benchmark: configurations with some values changed, trained once, shown beside published rows.

Deliberately does not know any data set.
"""

import argparse
import json
import statistics
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomlkit
from rich.console import Console
from rich.table import Table

from towers.checkpoint import CheckpointStore
from towers.store import Store
from trainer.comparison import Comparison, as_json
from trainer.judge import evaluate_version
from trainer.run import RUNS, train
from trainer.state import STATE_FILE

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
"""Public data sets, beside the repository; nothing of them is in it."""

Settings = Mapping[str, Any]
"""A training configuration, as its TOML file reads."""

Rows = dict[str, Sequence[Sequence[float] | float]]
"""Model to a figure, or those of several seeds, for each metric."""


def command_line(description: str | None, quick: str) -> argparse.ArgumentParser:
    """What all benchmarks of quality share.

    Args:
        description: Of the benchmark.
        quick: What `--quick` does.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--runs", type=Path, default=RUNS / "quality", help="folder of the runs; what is there goes on")
    return parser


def folder_of(*names: str) -> Path:
    """A data set.

    Raises:
        SystemExit: it is not there.
    """
    folder = SHARED.joinpath(*names)
    if not folder.is_dir():
        raise SystemExit(f"error: {folder}: not there; its README says where the data are from")
    return folder


def read_settings(path: Path) -> Settings:
    """A TOML file."""
    return tomllib.loads(path.read_text(encoding="utf-8"))


def changed(settings: Settings, changes: Mapping[str, Mapping[str, Any]]) -> Settings:
    """Settings with some values of some tables replaced; None takes a value out."""
    tables = {
        name: {key: value for key, value in {**settings.get(name, {}), **values}.items() if value is not None}
        for name, values in changes.items()
    }
    return {**settings, **tables}


def published(settings: Settings, folder: Path, data: Path, console: Console) -> tuple[CheckpointStore, int]:
    """Trains and publishes, or goes on from where an interrupted run stood.

    Args:
        settings: The configuration; its paths are relative to the data.
        folder: Of the run; what another configuration left there is refused.
        data: Folder of the data files.
        console: Gets the progress.

    Returns:
        Where it is published, and as which version.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config_path = folder / "config.toml"
    config_path.write_text(tomlkit.dumps({**settings, "run_folder": "state"}), encoding="utf-8")
    store = store_of(folder)
    report = train(
        config_path,
        store=store.url,
        resume=(folder / "state" / STATE_FILE).exists(),
        console=console,
        data_folder=data,
        force="a benchmark shows what came out, gates or not",
    )
    assert report is not None, "there is one process"
    return CheckpointStore(store), report.version


def store_of(folder: Path) -> Store:
    """Where the run of a folder publishes."""
    return Store(f"file://{(folder / 'store').resolve()}")


def trained(settings: Settings, folder: Path, data: Path, console: Console) -> Comparison:
    """Trains as `published` does, and judges what was published beside the baselines."""
    return evaluate_version(*published(settings, folder, data, console), data).comparison


def mean_and_spread(values: Sequence[float]) -> str:
    """`0.3012 ± 0.0009` of several seeds: mean and standard deviation."""
    if len(values) == 1:
        return f"{values[0]:.4f}"
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"


def of_seeds(found: Sequence[Comparison], model: str, metrics: Sequence[str]) -> list[list[float]]:
    """Figures of a model: for each metric those of all seeds."""
    return [[comparison.figures[model][metric].value for comparison in found] for metric in metrics]


def shown(title: str, metrics: Sequence[str], rows: Rows) -> Table:
    """A row for each model; figures of several seeds as mean and spread.

    Args:
        title: Of the table.
        metrics: Its columns.
        rows: Its rows.
    """
    table = Table(title=title)
    table.add_column("")
    for metric in metrics:
        name, _, k = metric.partition("_at_")
        table.add_column(f"{ {'recall': 'Recall', 'ndcg': 'NDCG', 'mrr': 'MRR'}[name] }@{k}", justify="right")
    for model, columns in rows.items():
        cells = [[column] if isinstance(column, float) else list(column) for column in columns]
        table.add_row(model, *map(mean_and_spread, cells))
    return table


def write(path: Path, found: Mapping[str, Sequence[Comparison]]) -> None:
    """All figures of all seeds."""
    figures = {name: [as_json(comparison) for comparison in comparisons] for name, comparisons in found.items()}
    path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
