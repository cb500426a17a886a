"""A toy world to fall ill in: items have a genre and a popularity, users like two genres and have a history of it."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from trainer.run import train

NUM_USERS = 400
NUM_ITEMS = 150
NUM_GENRES = 10
NUM_LIKED = 10

FEATURES = """
[[features]]
name = "history"
owner = "query"
kind = "sequence"
items = "item_id"
max_length = 20

[[features]]
name = "item_id"
owner = "item"
kind = "categorical"

[[features]]
name = "genre"
owner = "item"
kind = "categorical"
"""

CONFIG = """
run_folder = "run"

[data]
interactions = "interactions.parquet"
items = "items.parquet"
users = "users.parquet"

{features}

[model]
dim = 16
embedding_dim = 16

[training]
batch_size = 256
epochs = {epochs}
learning_rate = {learning_rate}
temperature = {temperature}
patience = 20
seed = 1

[evaluation]
ks = [10]
"""


def tables() -> dict[str, pa.Table]:
    """Genres of items and tastes of users are drawn; within a genre popularity falls as in the wild."""
    random = np.random.default_rng(3)
    genres = np.arange(NUM_ITEMS) % NUM_GENRES
    popularity = 1 / (1 + np.arange(NUM_ITEMS) // NUM_GENRES)
    interactions: dict[str, list[int]] = {"user_id": [], "item_id": [], "timestamp": []}
    for user in range(NUM_USERS):
        tastes = random.choice(NUM_GENRES, 2, replace=False)
        weights = popularity * np.where(np.isin(genres, tastes), 1.0, 0.01)
        liked = random.choice(NUM_ITEMS, NUM_LIKED, replace=False, p=weights / weights.sum())
        random.shuffle(liked)
        for moment, item in enumerate(liked.tolist()):
            interactions["user_id"].append(user)
            interactions["item_id"].append(item)
            interactions["timestamp"].append(1_700_000_000 + 3600 * moment + user)
    return {
        "interactions": pa.table(interactions),
        "items": pa.table(
            {
                "item_id": list(range(NUM_ITEMS)),
                "genre": [f"genre {genre}" for genre in genres],
                "title": [f"Tale {item} of <genre> {genre}" for item, genre in enumerate(genres)],
                "constant": ["the same"] * NUM_ITEMS,
            }
        ),
        "users": pa.table(
            {"user_id": list(range(NUM_USERS)), "country": [f"country {user % 7}" for user in range(NUM_USERS)]}
        ),
    }


def trained(
    folder: Path,
    features: str = FEATURES,
    changed: Mapping[str, pa.Table] | None = None,
    force: str | None = None,
    **options: Any,
) -> Path:
    """Trains in the toy world for a few seconds and publishes checkpoint 1.

    Args:
        folder: Where the world is made.
        features: Declarations.
        changed: Tables in place of the world's.
        force: Publishes what the gates refuse.
        options: `epochs`, `learning_rate`, `temperature`.

    Returns:
        The folder, with the store in `store`.
    """
    for name, table in (tables() | dict(changed or {})).items():
        pq.write_table(table, folder / f"{name}.parquet")
    settings = {"epochs": 6, "learning_rate": 0.01, "temperature": 0.1} | options
    (folder / "toy.toml").write_text(CONFIG.format(features=features, **settings))
    console = Console(file=io.StringIO())
    train(folder / "toy.toml", store=str(folder / "store"), resume=False, console=console, force=force)
    return folder
