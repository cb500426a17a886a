"""The next film on MovieLens-1M, beside the published table of gSASRec: `python -m benchmarks.quality.ml1m_sequences`.

Its protocol: the last film of each user among all films, those seen included. The settings, and each run's epoch, are
chosen by the validation targets alone. Deliberately does not know how anything is trained.
"""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console

from benchmarks.quality import runs
from benchmarks.quality.runs import Rows, Settings
from trainer.comparison import TOWERS, Comparison

METRICS = ("recall_at_1", "recall_at_10", "ndcg_at_10")
PUBLISHED = {
    "SASRec (published)": (0.0442, 0.2392, 0.1259),
    "gSASRec, 128 (published)": (0.0754, 0.3003, 0.1726),
}
_FEATURES = (
    {"name": "genres", "owner": "item", "kind": "categorical_list"},
    {"name": "year", "owner": "item", "kind": "number", "scaling": "quantile"},
    {"name": "title", "owner": "item", "kind": "text", "embedding_dim": 64},
    {"name": "gender", "owner": "query", "kind": "categorical", "embedding_dim": 8},
    {"name": "age", "owner": "query", "kind": "categorical", "embedding_dim": 8},
    {"name": "occupation", "owner": "query", "kind": "categorical", "embedding_dim": 16},
)
_QUICK = {
    "model": {"dim": 32, "embedding_dim": 32, "transformer_blocks": 1},
    "training": {"epochs": 2, "warmup_steps": 50},
}


def write_tables(sequences: Path, films: Path, folder: Path) -> None:
    """The tables as a configuration reads them.

    Args:
        sequences: Folder of the split.
        films: Folder of MovieLens-1M.
        folder: Gets the files.
    """
    rows = pq.read_table(sequences / "sequences.parquet")
    split = rows["split"].cast(pa.string())
    known = pc.if_else(pc.equal(split, "unused"), "history", split)
    rows = rows.set_column(rows.schema.get_field_index("split"), "split", known)
    pq.write_table(rows, folder / "interactions.parquet")
    items = pq.read_table(films / "items.parquet")
    pq.write_table(items.filter(pc.is_in(items["item_id"], pc.unique(rows["item_id"]))), folder / "items.parquet")
    users = pq.read_table(films / "users.parquet")
    for column in ("age", "occupation"):
        users = users.set_column(users.schema.get_field_index(column), column, users[column].cast(pa.string()))
    pq.write_table(users, folder / "users.parquet")


def variants(settings: Settings) -> dict[str, Settings]:
    """The history alone, and all that is known of films and users beside it."""
    return {
        "history alone": settings,
        "with features": {**settings, "features": [*settings["features"], *_FEATURES]},
    }


def measure(
    settings: Settings, seeds: Sequence[int], data: Path, folder: Path, console: Console
) -> dict[str, list[Comparison]]:
    """Each variant with each seed.

    Args:
        settings: Of the history alone.
        seeds: Of the runs.
        data: Folder of the tables.
        folder: Keeps the runs.
        console: Gets the progress.
    """
    return {
        name: [
            runs.trained(
                runs.changed(variant, {"training": {"seed": seed}}),
                folder / "ml1m-sequences" / f"{name.replace(' ', '-')}-{seed}",
                data,
                console,
            )
            for seed in seeds
        ]
        for name, variant in variants(settings).items()
    }


def main() -> None:
    """Trains, and prints the table."""
    arguments = runs.command_line(__doc__, "two epochs of a small model, one seed").parse_args()
    console = Console()
    data = arguments.runs / "ml1m-sequences-data"
    data.mkdir(parents=True, exist_ok=True)
    write_tables(runs.folder_of("movielens-1m-sequences"), runs.folder_of("movielens-1m"), data)
    settings = runs.read_settings(Path(__file__).with_suffix(".toml"))
    if arguments.quick:
        settings = runs.changed(settings, _QUICK)
    found = measure(settings, range(1 if arguments.quick else arguments.seeds), data, arguments.runs, console)
    alone = found["history alone"]
    rows: Rows = {
        **{name: runs.of_seeds(alone[:1], name, METRICS) for name in alone[0].figures if name != TOWERS},
        **PUBLISHED,
        **{f"two towers, {name}": runs.of_seeds(comparisons, TOWERS, METRICS) for name, comparisons in found.items()},
    }
    console.print(runs.shown("MovieLens-1M, the next film; test", METRICS, rows))
    if arguments.json:
        runs.write(arguments.json, found)


if __name__ == "__main__":
    main()
