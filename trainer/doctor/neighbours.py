"""Nearest neighbours of a few items, by their titles: what a person sees at a glance.

Deliberately does not judge them.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
from numpy.typing import NDArray
from pyarrow import csv

from towers.features import category_token
from trainer.beir import read_documents
from trainer.config import DataConfig
from trainer.data import ITEM_ID, data_files
from trainer.doctor.lists import top_lists
from trainer.doctor.report import Section, Table
from trainer.doctor.subject import Subject

TITLE_COLUMNS = ("title", "name")
"""Looked for in this order; without any, ids are shown."""
_EXAMPLES = (1.0, 0.99, 0.9, 0.75, 0.5, 0.25)
"""Quantiles of popularity that examples are taken from."""
_NUM_NEIGHBOURS = 5


def neighbours_section(subject: Subject) -> Section:
    """Of items from the most popular down, and of one that training never saw."""
    titles = read_titles(subject.config.data, subject.folder)
    names = [titles.get(item, item) for item in subject.data.items.ids]
    rows = examples(subject.item_counts)
    num_shown = min(_NUM_NEIGHBOURS + 1, len(names))
    lists = top_lists(subject.item_embeddings[rows], subject.item_embeddings, num_shown)
    scores = (subject.item_embeddings[rows] @ subject.item_embeddings.T).numpy()
    return Section(
        "Nearest neighbours",
        "The nearest items of the item tower, with their cosines. They should be of a kind. Neighbours that have only "
        "their popularity in common mean too few interactions, or negatives that are too easy.",
        tables=[
            Table(
                "Examples",
                ("item", "training interactions", "nearest items"),
                [
                    (
                        names[row],
                        f"{subject.item_counts[row]:,}",
                        "; ".join(f"{names[item]} ({scores[place, item]:.2f})" for item in nearest if item != row),
                    )
                    for place, (row, nearest) in enumerate(zip(rows.tolist(), lists.tolist(), strict=True))
                ],
            )
        ],
    )


def examples(item_counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows of items at some quantiles of popularity, and the first cold one, each once."""
    rising = np.argsort(item_counts, kind="stable")
    rising = rising[item_counts[rising] > 0]
    rows = [int(rising[round(share * (len(rising) - 1))]) for share in _EXAMPLES]
    rows += np.flatnonzero(item_counts == 0)[:1].tolist()
    return np.array(list(dict.fromkeys(rows)), dtype=np.int64)


def read_titles(config: DataConfig, folder: Path) -> Mapping[str, str]:
    """Titles of the items' table by id, whether or not a feature reads them; empty where it has none."""
    path = data_files(config, folder)["items"]
    if config.layout == "beir":
        return _titles(read_documents(path), ITEM_ID)
    as_csv = ds.CsvFileFormat(
        parse_options=csv.ParseOptions(delimiter=config.csv_separator, newlines_in_values=True),
        # As written, so that an id 007 stays one.
        convert_options=csv.ConvertOptions(
            column_types={name: pa.string() for name in (config.item_id_column, *TITLE_COLUMNS)}
        ),
    )
    items = ds.dataset(path, format="parquet" if path.suffix == ".parquet" else as_csv)
    wanted = [name for name in items.schema.names if name in (config.item_id_column, *TITLE_COLUMNS)]
    return _titles(items.to_table(columns=wanted), config.item_id_column)


def _titles(items: pa.Table, id_column: str) -> Mapping[str, str]:
    title = next((name for name in TITLE_COLUMNS if name in items.column_names), None)
    if title is None:
        return {}
    pairs = zip(items.column(id_column).to_pylist(), items.column(title).to_pylist(), strict=True)
    return {token: str(name) for item, name in pairs if name and (token := category_token(item)) is not None}
