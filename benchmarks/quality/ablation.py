"""What each correction and feature is worth on MovieLens-1M: `python -m benchmarks.quality.ablation`.

Each is switched off in turn, all else stays, and what that loses is shown with a paired 95 % interval; so is what
another seed alone changes, below which nothing is worth telling. Only the epoch of each run is chosen, by the
validation targets. Deliberately does not know how anything is trained, nor look for better settings.
"""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.quality.runs import Settings, changed, command_line, folder_of, published, read_settings
from trainer import data
from trainer.bootstrap import intervals
from trainer.evaluate import embedding_scores, query_figures, rank
from trainer.published import open_published
from trainer.questions import ask

METRICS = ("ndcg_at_10", "recall_at_10")
FULL = "everything"
AGAIN = "everything, other seeds"
_DRAWN_SEPARATELY = 100
"""Between the seeds of one and those of the other."""


@dataclass(frozen=True)
class Length:
    """How much is trained."""

    num_users: int
    num_newest: int
    """Interactions of each user that are kept."""
    epochs: int | None
    """None: those of the settings."""


LONG = Length(num_users=2999, num_newest=50, epochs=None)
QUICK = Length(num_users=500, num_newest=30, epochs=2)


@dataclass(frozen=True)
class Worth:
    """Of a part, by one metric."""

    value: float
    """Without it."""
    lost: float
    """What the whole has more."""
    low: float
    """Bounds of the 95 % interval of what is lost, over users."""
    high: float


def write_tables(source: Path, length: Length, folder: Path) -> None:
    """The newest interactions of some users, those with times, and what is known of users and films.

    Args:
        source: Folder of MovieLens-1M.
        length: How much.
        folder: Gets the files.
    """
    log = pq.read_table(source / "interactions.parquet")
    log = log.filter(pc.is_valid(log["timestamp"]))
    users = np.unique(log["user_id"].to_numpy())
    chosen = np.sort(np.random.default_rng(0).permutation(users)[: length.num_users])
    log = log.filter(pc.is_in(log["user_id"], pa.array(chosen))).sort_by(
        [("user_id", "ascending"), ("timestamp", "descending"), ("row", "descending")]
    )
    rows = log["user_id"].to_numpy()
    places = np.arange(len(rows)) - np.searchsorted(rows, rows)
    log = log.filter(pa.array(places < length.num_newest)).sort_by([("timestamp", "ascending"), ("row", "ascending")])
    pq.write_table(log.select(["user_id", "item_id", "timestamp"]), folder / "interactions.parquet")
    for name in ("items", "users"):
        pq.write_table(pq.read_table(source / f"{name}.parquet"), folder / f"{name}.parquet")


def variants(settings: Settings) -> dict[str, Settings]:
    """Everything, and everything but one thing."""

    def training(**values: Any) -> Settings:
        return changed(settings, {"training": values})

    def pooled(pooling: str) -> Settings:
        features = [
            {**feature, "pooling": pooling} if feature["kind"] == "sequence" else feature
            for feature in settings["features"]
        ]
        return {**settings, "features": features}

    def without(owner: str, kept: str) -> Settings:
        features = [feature for feature in settings["features"] if feature["owner"] != owner or feature["name"] == kept]
        return {**settings, "features": features}

    return {
        FULL: settings,
        "no logQ": training(logq="none"),
        "known positives not masked": training(mask_known_positives=False),
        "no uniform negatives": training(uniform_negatives=0),
        "no hard negatives": training(hard_negatives=0),
        "no memory": training(memory=0),
        "not symmetric": training(symmetric=False),
        "temperature not learned": training(learn_temperature=False),
        "no user features": without("query", "history"),
        "no item features": without("item", "item_id"),
        "history by attention": pooled("attention"),
        "history by its mean": pooled("mean"),
    }


def measure(
    settings: Mapping[str, Settings], seeds: Sequence[int], tables: Path, folder: Path, console: Console
) -> dict[str, dict[str, Worth]]:
    """Trains all variants.

    Args:
        settings: Of each variant; the first of them is everything.
        seeds: Of the runs of each.
        tables: Folder of the data files.
        folder: Keeps the runs.
        console: Gets the progress.

    Returns:
        Variant to metric to what its part is worth, everything with other seeds among them.
    """
    runs = {name: (variant, seeds) for name, variant in settings.items()}
    runs[AGAIN] = (settings[FULL], [seed + _DRAWN_SEPARATELY for seed in seeds])
    found = {}
    for name, (variant, own_seeds) in runs.items():
        figures = []
        for seed in own_seeds:
            console.rule(f"{name}, seed {seed}")
            seeded = changed(variant, {"training": {"seed": seed}})
            figures.append(_figures(seeded, tables, folder / f"{name.replace(' ', '-')}-{seed}", console))
        found[name] = np.mean(figures, axis=0)
    return {name: worth(found[FULL], figures) for name, figures in found.items()}


def worth(whole: NDArray[np.float64], part: NDArray[np.float64]) -> dict[str, Worth]:
    """What the whole has more than a part of it.

    Args:
        whole: `[Q, M]` of each user, a column for each of `METRICS`.
        part: `[Q, M]` of the same users.
    """
    lost = whole - part
    low, high = intervals(lost)
    return {
        metric: Worth(
            float(part[:, column].mean()), float(lost[:, column].mean()), float(low[column]), float(high[column])
        )
        for column, metric in enumerate(METRICS)
    }


def shown(found: Mapping[str, Mapping[str, Worth]]) -> Table:
    """A row for each variant."""
    table = Table(title="What is lost without; test, 95 % intervals over users")
    for heading in ("", "NDCG@10", "lost", "Recall@10", "lost"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, by_metric in found.items():
        cells = []
        for one in by_metric.values():
            interval = "" if name == FULL else f"{one.lost:+.4f} ({one.low:+.4f} to {one.high:+.4f})"
            cells += [f"{one.value:.4f}", interval]
        table.add_row(name, *cells)
    return table


def as_json(found: Mapping[str, Mapping[str, Worth]]) -> str:
    """All figures."""
    return json.dumps(
        {name: {metric: vars(one) for metric, one in by_metric.items()} for name, by_metric in found.items()}, indent=1
    )


def _figures(settings: Settings, tables: Path, folder: Path, console: Console) -> NDArray[np.float64]:
    """`[Q, M]` of one run."""
    towers = open_published(*published(settings, folder, tables, console))
    config = towers.config()
    read = data.read_data(config.data, towers.fitted.schema, tables)
    questions = ask(read.log, read.split.test, config.evaluation.exclude_seen)
    scores = embedding_scores(*towers.embed(read, questions.positions))
    ranking = rank(scores, questions.targets, questions.excluded, config.evaluation.ks)
    figures = query_figures(ranking, config.evaluation.ks)
    return np.stack([figures[metric] for metric in METRICS], axis=1)


def main() -> None:
    """Trains, and prints the table."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    parser = command_line(__doc__, "few epochs on few interactions of few users")
    parser.set_defaults(seeds=1)
    arguments = parser.parse_args()
    length = QUICK if arguments.quick else LONG
    settings = read_settings(Path(__file__).with_suffix(".toml"))
    if length.epochs is not None:
        settings = changed(settings, {"training": {"epochs": length.epochs, "warmup_steps": 20}})
    console = Console()
    with tempfile.TemporaryDirectory() as tables:
        write_tables(folder_of("movielens-1m"), length, Path(tables))
        folder = arguments.runs / ("ablation-quick" if arguments.quick else "ablation")
        found = measure(variants(settings), range(arguments.seeds), Path(tables), folder, console)
    console.print(shown(found))
    if arguments.json:
        arguments.json.write_text(as_json(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
