"""Writes a small world with a known answer: each user likes one genre, so recommendations should be of that genre.

Deliberately knows nothing of towers: three tables and two configurations, for trying a deployment out.
"""

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

NUM_GENRES = 16
ITEMS_PER_GENRE = 20
USERS_PER_GENRE = 30
INTERACTIONS_PER_USER = 16
LOYALTY = 0.95
"""Share of a user's interactions that are with the genre they like."""

_CONFIG = """\
[data]
interactions = "interactions.parquet"
items = "items.parquet"
users = "users.parquet"

[[features]]
name = "history"
kind = "sequence"
owner = "query"
items = "item_id"
max_length = 20

[[features]]
name = "country"
kind = "categorical"
owner = "query"

[[features]]
name = "item_id"
kind = "categorical"
owner = "item"

[[features]]
name = "genre"
kind = "categorical"
owner = "item"

[[features]]
name = "title"
kind = "text"
owner = "item"
hash_buckets = 1000

[model]
{model}

[training]
batch_size = 256
epochs = 12
patience = 12
learning_rate = 0.01
"""

_MODELS = {
    "first.toml": "dim = 16\nembedding_dim = 16",
    "second.toml": "dim = 24\nembedding_dim = 24\nquery_hidden = [32]\nitem_hidden = [32]",
}


def write_toy_data(folder: Path) -> None:
    """Writes `interactions.parquet`, `items.parquet`, `users.parquet`, `first.toml` and `second.toml`.

    Args:
        folder: An existing folder. Item `i` is of genre `i // ITEMS_PER_GENRE`.
    """
    rng = np.random.default_rng(0)
    num_items = NUM_GENRES * ITEMS_PER_GENRE
    num_users = NUM_GENRES * USERS_PER_GENRE
    items = range(num_items)
    pq.write_table(
        pa.table(
            {
                "item_id": [str(item) for item in items],
                "genre": [f"genre-{item // ITEMS_PER_GENRE}" for item in items],
                "title": [f"Title {item} of genre {item // ITEMS_PER_GENRE}" for item in items],
            }
        ),
        folder / "items.parquet",
    )
    pq.write_table(
        pa.table(
            {
                "user_id": [f"user-{user}" for user in range(num_users)],
                "country": rng.choice(["ar", "fr", "jp"], num_users),
            }
        ),
        folder / "users.parquet",
    )
    users = np.repeat(np.arange(num_users), INTERACTIONS_PER_USER)
    liked = (users // USERS_PER_GENRE) * ITEMS_PER_GENRE + rng.integers(ITEMS_PER_GENRE, size=users.size)
    any_item = rng.integers(num_items, size=users.size)
    chosen = np.where(rng.random(users.size) < LOYALTY, liked, any_item)
    pq.write_table(
        pa.table(
            {
                "user_id": [f"user-{user}" for user in users],
                "item_id": [str(item) for item in chosen],
                "timestamp": 1_700_000_000 + np.arange(users.size, dtype=np.int64),
            }
        ),
        folder / "interactions.parquet",
    )
    for name, model in _MODELS.items():
        (folder / name).write_text(_CONFIG.format(model=model))


if __name__ == "__main__":
    write_toy_data(Path(sys.argv[1]))
