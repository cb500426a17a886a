import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from towers.errors import InvalidInputError
from trainer import evaluate


def naive_metrics(
    scores: list[list[float]], targets: list[list[int]], excluded: list[list[int]], k: int
) -> tuple[float, float]:
    recalls, ndcgs = [], []
    for row, wanted, hidden in zip(scores, targets, excluded, strict=True):
        candidates = [item for item in range(len(row)) if item in wanted or item not in hidden]
        best = sorted(candidates, key=lambda item: (-row[item], item))[:k]
        recalls.append(len(set(best) & set(wanted)) / len(wanted))
        gain = sum(1 / math.log2(place + 2) for place, item in enumerate(best) if item in wanted)
        ndcgs.append(gain / sum(1 / math.log2(place + 2) for place in range(min(k, len(wanted)))))
    return float(np.mean(recalls)), float(np.mean(ndcgs))


@given(data=st.data(), num_queries=st.integers(1, 8), num_items=st.integers(1, 12), k=st.integers(1, 15))
def test_metrics_equal_a_naive_loop(data: st.DataObject, num_queries: int, num_items: int, k: int) -> None:
    """Scores come from few values, so that ties are common; targets may be among the excluded."""
    row = st.lists(st.integers(0, 3), min_size=num_items, max_size=num_items)
    some_items = st.sets(st.integers(0, num_items - 1), max_size=num_items).map(sorted)
    wanted_items = st.sets(st.integers(0, num_items - 1), min_size=1, max_size=num_items).map(sorted)
    scores = data.draw(st.lists(row, min_size=num_queries, max_size=num_queries))
    targets = data.draw(st.lists(wanted_items, min_size=num_queries, max_size=num_queries))
    excluded = data.draw(st.lists(some_items, min_size=num_queries, max_size=num_queries))
    matrix = torch.tensor(scores, dtype=torch.float32)
    metrics = evaluate.evaluate(lambda start, stop: matrix[start:stop], targets, excluded, [k])
    recall, ndcg = naive_metrics([[float(score) for score in row] for row in scores], targets, excluded, k)
    assert metrics == pytest.approx({f"recall_at_{k}": recall, f"ndcg_at_{k}": ndcg})


def test_more_queries_than_one_chunk() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, items = torch.randn(700, 4, generator=generator), torch.randn(30, 4, generator=generator)
    targets = [[int(i) % 30] for i in range(700)]
    excluded = [[(i + 1) % 30, (i + 2) % 30] for i in range(700)]
    metrics = evaluate.evaluate(evaluate.embedding_scores(queries, items), targets, excluded, [5])
    recall, ndcg = naive_metrics((queries @ items.T).tolist(), targets, excluded, 5)
    assert metrics == pytest.approx({"recall_at_5": recall, "ndcg_at_5": ndcg})


def test_by_hand() -> None:
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.6]])
    metrics = evaluate.evaluate(lambda start, stop: scores[start:stop], [[2]], [[]], [2, 3])
    assert metrics == pytest.approx(
        {"recall_at_2": 0.0, "ndcg_at_2": 0.0, "recall_at_3": 1.0, "ndcg_at_3": 1 / math.log2(4)}
    )
    seen = evaluate.evaluate(lambda start, stop: scores[start:stop], [[2]], [[0]], [2])
    assert seen == pytest.approx({"recall_at_2": 1.0, "ndcg_at_2": 1 / math.log2(3)})


def test_a_model_that_scores_all_alike_finds_only_the_first_rows() -> None:
    scores = torch.zeros(4, 100)
    metrics = evaluate.evaluate(lambda start, stop: scores[start:stop], [[50], [99], [0], [3]], [[]] * 4, [3])
    assert metrics["recall_at_3"] == 0.25


def test_popularity_ranks_by_training_counts() -> None:
    ranks = evaluate.target_ranks(
        evaluate.popularity_scores(torch.tensor([5, 9, 0, 9])), [[0], [3], [2]], [[1], [], []]
    )
    assert ranks == [[1], [1], [3]]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_not_finite_are_no_ranking(bad: float) -> None:
    with pytest.raises(InvalidInputError, match="not finite"):
        evaluate.target_ranks(lambda start, stop: torch.tensor([[0.0, bad]]), [[0]], [[]])
