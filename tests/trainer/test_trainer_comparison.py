"""Questions, slices, intervals, and what is made of them."""

import numpy as np
import pytest
import torch

from towers.schema import parse_schema
from trainer.bootstrap import intervals
from trainer.comparison import compare, exposure
from trainer.data import Entities, InteractionLog, TrainingData, order_by_time, split_by_time
from trainer.evaluate import rank
from trainer.questions import Questions, ask, item_lists
from trainer.slices import Slice, all_slices, popularity_deciles


def lists(questions: Questions) -> tuple[list[list[int]], list[list[int]]]:
    found: tuple[list[list[int]], list[list[int]]] = ([], [])
    for name, into in zip((questions.targets, questions.excluded), found, strict=True):
        rows, items = name.pairs()
        into.extend(items[rows == row].tolist() for row in range(len(questions.positions)))
    return found


@pytest.fixture
def log() -> InteractionLog:
    """User 0 did five things, user 1 three, user 2 two."""
    return order_by_time(
        np.array([0, 0, 0, 0, 0, 1, 1, 1, 2, 2]),
        np.array([4, 3, 2, 1, 2, 0, 5, 5, 1, 1]),
        np.arange(10.0),
    )


def test_each_user_is_asked_once_for_all_held_out_items_each_once(log: InteractionLog) -> None:
    questions = ask(log, np.array([2, 3, 4, 7, 8, 9]), exclude_seen=True)
    assert questions.positions.tolist() == [2, 7, 8]
    assert lists(questions) == ([[1, 2], [5], [1]], [[4, 3], [0, 5], []])
    assert lists(ask(log, np.array([4, 7]), exclude_seen=False)) == ([[2], [5]], [[], []])
    rows, items = questions.excluded.pairs(1, 3)
    assert (rows.tolist(), items.tolist()) == ([0, 0], [0, 5])


def test_deciles_of_popularity() -> None:
    assert popularity_deciles(np.array([0, *range(1, 21), 0])).tolist() == [
        0,
        *(1 + rank // 2 for rank in range(20)),
        0,
    ]
    assert popularity_deciles(np.array([7, 7, 0, 7])).tolist() == [1, 1, 0, 1]
    assert popularity_deciles(np.array([0, 0])).tolist() == [0, 0]


def test_slices_hold_the_targets_they_name(log: InteractionLog) -> None:
    schema = parse_schema(
        [
            {"name": "user_id", "owner": "query", "kind": "categorical"},
            {"name": "country", "owner": "query", "kind": "categorical"},
            {"name": "item_id", "owner": "item", "kind": "categorical"},
            {"name": "genres", "owner": "item", "kind": "categorical_list", "column": "genre"},
            {"name": "price", "owner": "item", "kind": "number"},
        ]
    )
    data = TrainingData(
        users=Entities(["a", "b", "c"], {"user_id": ["a", "b", "c"], "country": ["x", None, "x"]}, "users"),
        items=Entities(
            list("012345"),
            {"item_id": list("012345"), "genre": [[], ["p"], ["p", "q"], [], [], None], "price": [1.0] * 6},
            "items",
        ),
        log=log,
        split=split_by_time(log),
        notes=(),
    )
    questions = ask(log, np.array([2, 3, 4, 7, 8, 9]), exclude_seen=True)
    # Targets: items 1 and 2 of user a, 5 of b, 1 of c.
    found = {
        part.name: part.chosen.tolist() for part in all_slices(data, schema, np.array([1, 2, 0, 1, 1, 1]), questions)
    }
    assert found == {
        "cold-items": [False, True, False, False],
        "item-popularity=1": [False, False, True, False],
        "item-popularity=9": [True, False, False, True],
        "history-length=0": [False, False, False, True],
        "history-length=1-4": [True, True, True, False],
        "country=x": [True, True, False, True],
        "country=": [False, False, True, False],
        "genres=p": [True, True, False, True],
        "genres=": [False, False, True, False],
        "genres=q": [False, True, False, False],
    }


def test_intervals_hold_the_mean_as_often_as_they_say() -> None:
    random = np.random.default_rng(1)
    held = 0
    for _ in range(100):
        low, high = intervals(random.exponential(size=(60, 1)))
        held += bool(low[0] <= 1.0 <= high[0])
    # 95 % of 100, less what skewness and chance take.
    assert 85 <= held <= 99


def test_the_interval_of_a_difference_is_that_of_pairs() -> None:
    """Two models that find the same, apart from a little: each is uncertain, their difference is not."""
    first = np.random.default_rng(2).random(100)
    low, high = intervals(np.stack([first, first + 0.01, np.full(100, 0.01)], axis=1))
    assert high[0] - low[0] == pytest.approx(high[1] - low[1])
    assert high[0] - low[0] > 0.05
    assert low[2] == pytest.approx(high[2]) == pytest.approx(0.01)


def test_how_evenly_a_catalogue_is_shown() -> None:
    even = exposure(np.array([2, 2, 2, 2]), np.array([0, 1, 2, 3]), np.array([1, 2]))
    assert even == {"coverage": 1.0, "gini": 0.0, "popularity_bias": 1.0}
    one = exposure(np.array([0, 8, 0, 0]), np.array([0, 9, 0, 0]), np.array([1, 2]))
    assert one == pytest.approx({"coverage": 0.25, "gini": 0.75, "popularity_bias": 10 / 5.5})


def test_models_are_compared_overall_and_by_slice() -> None:
    scores = torch.tensor([[3.0, 2.0, 1.0]] * 3)
    targets, excluded = item_lists([[0], [1], [0, 2]]), item_lists([[], [], []])
    rankings = {
        "good": rank(lambda start, stop: scores[start:stop], targets, excluded, [1]),
        "bad": rank(lambda start, stop: -scores[start:stop], targets, excluded, [1]),
    }
    part = Slice("some", np.array([False, True, True, False]))
    found = compare(rankings, [1], np.array([1, 1, 1]), targets.items, [part])
    assert (found.num_queries, found.num_targets) == (3, 4)
    assert {model: figures["recall_at_1"].value for model, figures in found.figures.items()} == pytest.approx(
        {"good": 0.5, "bad": 1 / 6}
    )
    assert found.exposure["good"]["coverage_at_1"] == pytest.approx(1 / 3)
    [only] = found.slices
    assert (only.name, only.num_queries, only.num_targets) == ("some", 2, 2)
    assert only.figures["good"]["recall_at_1"].value == 0.5
    assert only.figures["bad"]["recall_at_1"].value == 0.0
