import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from trainer import baselines
from trainer.config import TrainerConfig
from trainer.data import InteractionLog, order_by_time, read_data, split_by_time
from trainer.evaluate import evaluate, rank
from trainer.questions import ask, item_lists


def random_log(num_users: int = 30, num_items: int = 15, num_interactions: int = 200) -> InteractionLog:
    """With repeated items, users of few interactions, and items of none."""
    random = np.random.default_rng(3)
    users = np.sort(random.integers(num_users, size=num_interactions))
    items = random.integers(num_items - 2, size=num_interactions)
    return order_by_time(users, items, random.random(num_interactions))


def test_popularity_ranks_by_training_counts_and_equal_counts_by_row() -> None:
    scores = baselines.popularity_scores(np.array([5, 9, 0, 9]))
    ranking = rank(scores, item_lists([[0], [3], [2]]), item_lists([[1], [], []]), [4])
    assert ranking.ranks.tolist() == [1, 1, 3]


@pytest.mark.parametrize("largest_basket", [500, 3])
def test_item_knn_equals_a_naive_loop(largest_basket: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "_LARGEST_BASKET", largest_basket)
    monkeypatch.setattr(baselines, "NUM_NEIGHBOURS", 4)
    log, num_items = random_log(), 15
    split = split_by_time(log)
    taken = {}
    for user in np.unique(log.users):
        own = [position for position in split.train if log.users[position] == user]
        taken[user] = {int(log.items[position]) for position in own[-largest_basket:]}
    holders = [{user for user, items in taken.items() if item in items} for item in range(num_items)]

    def cosine(item: int, other: int) -> float:
        shared = len(holders[item] & holders[other])
        return shared / math.sqrt(len(holders[item]) * len(holders[other])) if shared and item != other else 0.0

    nearest = [
        sorted(range(num_items), key=lambda other: (-cosine(item, other), other))[:4] for item in range(num_items)
    ]
    expected = np.zeros((len(split.test), num_items))
    for row, position in enumerate(split.test):
        for item in log.items[log.starts[position] : position]:
            for other in nearest[item]:
                expected[row, other] += cosine(item, other)
    scores = baselines.item_knn_scores(log, split.train, split.test, num_items)
    np.testing.assert_allclose(scores(0, len(split.test)).numpy(), expected, rtol=1e-5)
    np.testing.assert_array_equal(scores(3, 5).numpy(), scores(0, len(split.test))[3:5].numpy())


@pytest.mark.skipif(importlib.util.find_spec("implicit") is None, reason="needs twotower[baselines]")
def test_als_finds_the_two_kinds_of_the_toy_world(world: Path, configure: Callable[..., TrainerConfig]) -> None:
    data = read_data(configure().data, configure().feature_schema(), world)
    split = data.split
    questions = ask(data.log, split.test, exclude_seen=True)
    found = baselines.baselines(data.log, split.train, questions.positions, 40)
    figures = {
        name: evaluate(scores, questions.targets, questions.excluded, [12])["recall_at_12"]
        for name, scores in found.items()
    }
    assert figures.keys() == {"popularity", "item_knn", "als"}
    # Of each kind there are twenty items, of which a user saw all but eleven.
    assert figures["als"] > 0.9
    assert figures["popularity"] < 0.5


def test_item_knn_finds_the_two_kinds_of_the_toy_world(world: Path, configure: Callable[..., TrainerConfig]) -> None:
    data = read_data(configure().data, configure().feature_schema(), world)
    split = data.split
    questions = ask(data.log, split.test, exclude_seen=True)
    scores = baselines.item_knn_scores(data.log, split.train, questions.positions, 40)
    figures = evaluate(scores, questions.targets, questions.excluded, [12])
    assert figures["recall_at_12"] == 1.0  # As above.
    assert torch.isfinite(scores(0, 60)).all()
