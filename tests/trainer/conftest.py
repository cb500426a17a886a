"""A toy world with a known answer: users and items come in two kinds, and users like items of their own kind."""

import contextlib
import functools
import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from trainer.config import TrainerConfig

with contextlib.suppress(ImportError, AttributeError):  # Where torch keeps it elsewhere, each export makes its own.
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    # What each of torch's operators is in ONNX: a third of the time of an export, and the same for all of them.
    ONNXRegistry.from_torchlib = staticmethod(functools.cache(ONNXRegistry.from_torchlib))

NUM_USERS = 60
NUM_ITEMS = 40
NUM_LIKED = 10

CONFIG = """
run_folder = "run"

[data]
interactions = "interactions.parquet"
items = "items.parquet"
users = "users.parquet"

[[features]]
name = "user_id"
owner = "query"
kind = "categorical"

[[features]]
name = "history"
owner = "query"
kind = "sequence"
items = "item_id"
max_length = 5

[[features]]
name = "segment"
owner = "query"
kind = "categorical"
hash_buckets = 8

[[features]]
name = "interests"
owner = "query"
kind = "categorical_list"

[[features]]
name = "age"
owner = "query"
kind = "number"

[[features]]
name = "joined"
owner = "query"
kind = "timestamp"

[[features]]
name = "about"
owner = "query"
kind = "text"
hash_buckets = 64

[[features]]
name = "taste"
owner = "query"
kind = "vector"
size = 3

[[features]]
name = "item_id"
owner = "item"
kind = "categorical"
min_count = 11

[[features]]
name = "brand"
owner = "item"
kind = "categorical"
hash_buckets = 8
embedding_dim = 4

[[features]]
name = "tags"
owner = "item"
kind = "categorical_list"

[[features]]
name = "price"
owner = "item"
kind = "number"

[[features]]
name = "views"
owner = "item"
kind = "number"
scaling = "log1p"

[[features]]
name = "year"
owner = "item"
kind = "number"
scaling = "quantile"
num_buckets = 4

[[features]]
name = "added"
owner = "item"
kind = "timestamp"

[[features]]
name = "title"
owner = "item"
kind = "text"
hash_buckets = 64

[[features]]
name = "image"
owner = "item"
kind = "vector"
size = 4

[model]
dim = 12
query_hidden = [24]
embedding_dim = 8
dropout = 0.1

[training]
batch_size = 32
epochs = 4
learning_rate = 0.01
patience = 4

[evaluation]
ks = [5, 10]
"""
"""All kinds of features that a tower can have, on both sides where both can have them."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Sums in one order, so that equal runs are equal bit for bit."""
    torch.set_num_threads(1)


def toy_tables() -> dict[str, pa.Table]:
    """The three tables. Even ids are of one kind, odd ids of the other; some values are missing."""
    random = np.random.default_rng(7)
    users, items = range(NUM_USERS), range(NUM_ITEMS)
    kinds = ("calm", "loud")
    interactions: dict[str, list[int]] = {"user_id": [], "item_id": [], "timestamp": []}
    for user in users:
        own = [item for item in items if item % 2 == user % 2]
        for moment, item in enumerate(random.choice(own, NUM_LIKED, replace=False).tolist()):
            interactions["user_id"].append(user)
            interactions["item_id"].append(item)
            interactions["timestamp"].append(1_700_000_000 + 3600 * moment + user)
    return {
        "interactions": pa.table(interactions),
        "items": pa.table(
            {
                "item_id": list(items),
                "brand": [None if item == 3 else f"brand {item % 5}" for item in items],
                "tags": pa.array(
                    [[] if item == 4 else [kinds[item % 2], f"tag {item % 7}"] for item in items], pa.list_(pa.string())
                ),
                "price": [None if item == 5 else 10.0 + item for item in items],
                "views": [item**3 for item in items],
                "year": pa.array([None if item == 6 else 1980 + item for item in items], pa.int64()),
                "added": pa.array([1_600_000_000 + 86_400 * item for item in items], pa.timestamp("s")),
                "title": [None if item == 7 else f"A {kinds[item % 2]} thing, number {item}" for item in items],
                "image": pa.array(
                    [None if item == 8 else random.normal(item % 2, 1, 4).tolist() for item in items],
                    pa.list_(pa.float32()),
                ),
            }
        ),
        "users": pa.table(
            {
                "user_id": list(users),
                "segment": [None if user == 3 else f"segment {user % 4}" for user in users],
                "interests": pa.array([[f"interest {user % 6}"] * (user % 3) for user in users], pa.list_(pa.string())),
                "age": [float("nan") if user == 4 else 20.0 + user for user in users],
                "joined": [1_500_000_000.5 + user for user in users],
                "about": [f"likes {kinds[user % 2]} things" for user in users],
                "taste": pa.array([[float(user % 2), 0.5, -1.0] for user in users], pa.list_(pa.float64(), 3)),
            }
        ),
    }


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """A folder with the toy tables and the configuration `toy.toml`."""
    for name, table in toy_tables().items():
        pq.write_table(table, tmp_path / f"{name}.parquet")
    (tmp_path / "toy.toml").write_text(CONFIG)
    return tmp_path


@pytest.fixture
def configure() -> Callable[..., TrainerConfig]:
    """The toy configuration after changes such as `training__epochs=1` or, of a feature, `history__max_length=3`."""

    def changed(**changes: Any) -> TrainerConfig:
        content = tomllib.loads(CONFIG)
        for name, value in changes.items():
            table, _, key = name.partition("__")
            features = {feature["name"]: feature for feature in content["features"]}
            (content | features)[table][key] = value
        return TrainerConfig.model_validate_json(json.dumps(content))

    return changed
