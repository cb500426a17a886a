"""A subject for the doctor whose towers say what a test wants: 20 items, and users who choose one each in the test."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from towers.schema import parse_schema
from trainer.config import TrainerConfig
from trainer.data import Entities, TrainingData, order_by_time, split_by_time
from trainer.doctor.subject import Subject
from trainer.encode import DataEncoder, Tensors
from trainer.published import Change, PublishedTowers, unchanged
from trainer.questions import ask

NUM_ITEMS = 20
FEATURES = [
    {"name": "user_id", "owner": "query", "kind": "categorical"},
    {"name": "history", "owner": "query", "kind": "sequence", "items": "item_id"},
    {"name": "item_id", "owner": "item", "kind": "categorical"},
    {"name": "genre", "owner": "item", "kind": "categorical"},
]


@dataclass(frozen=True)
class Queries:
    """Positions of the log, and features that are 2 everywhere: the first entry of a vocabulary."""

    positions: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.positions)

    def batch(self, rows: Tensor) -> Tensors:
        """Features of some."""
        return {"user_id": torch.full((len(rows),), 2), "history": torch.full((len(rows), 1), 2)}


@dataclass(frozen=True)
class Towers:
    """Scores are given: items are unit vectors. Queries without a history want item 0."""

    scores: Tensor
    """`[N, I]` of each position of the log."""
    manifest: Any
    fitted: Any

    def embed_queries(self, queries: Queries, change: Change = unchanged) -> Tensor:
        """The scores, where there is a history."""
        rows = torch.arange(len(queries))
        history = change(queries.batch(rows), rows)["history"]
        return torch.where(history > 0, self.scores[queries.positions], torch.eye(NUM_ITEMS)[0])

    def embed_items(self, items: Tensors) -> Tensor:
        """All of them."""
        return torch.eye(len(items["item_id"]))


def subject_of(chosen: Sequence[Sequence[int]], scores: Tensor, ks: int = 2, **training: Any) -> Subject:
    """Users who chose items in this order, the last but one for validation, the last for the test.

    Args:
        chosen: Items of each user.
        scores: `[N, I]` what the towers say at each interaction.
        ks: Length of lists.
        training: Options.
    """
    users = np.repeat(np.arange(len(chosen)), [len(items) for items in chosen])
    log = order_by_time(users, np.array([item for items in chosen for item in items]), np.arange(float(len(users))))
    split = split_by_time(log)
    items = [str(item) for item in range(NUM_ITEMS)]
    genres = [f"genre {item % 2}" for item in range(NUM_ITEMS)]
    data = TrainingData(
        Entities([str(user) for user in range(len(chosen))], {}, "users"),
        Entities(items, {"item_id": items, "genre": genres}, "items"),
        log,
        split,
        (),
    )
    config = TrainerConfig.model_validate_json(
        json.dumps(
            {
                "data": {"interactions": "interactions.csv", "items": "items.csv"},
                "features": FEATURES,
                "model": {"dim": NUM_ITEMS},
                "training": training,
                "evaluation": {"ks": [ks], "metric": f"recall_at_{ks}", "exclude_seen": False},
            }
        )
    )
    towers = Towers(scores.float(), SimpleNamespace(epochs=()), SimpleNamespace(schema=parse_schema(FEATURES)))
    encoder = SimpleNamespace(queries=Queries, items=lambda: {"item_id": torch.arange(NUM_ITEMS)})
    subject = Subject(
        cast(PublishedTowers, towers),
        config,
        Path("nowhere"),
        data,
        cast(DataEncoder, encoder),
        np.bincount(log.items[split.train], minlength=NUM_ITEMS),
        ask(log, split.test, exclude_seen=False),
    )
    vars(subject)["item_names"] = [f"Tale {item}" for item in items]
    return subject


def wanting(items: Sequence[int]) -> Tensor:
    """`[N, I]` scores that have one item first."""
    return torch.eye(NUM_ITEMS)[list(items)]
