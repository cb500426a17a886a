import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from towers.errors import InvalidInputError
from trainer import evaluate
from trainer.questions import item_lists


def naive_metrics(
    scores: list[list[float]], targets: list[list[int]], excluded: list[list[int]], k: int
) -> dict[str, float]:
    recalls, ndcgs, mrrs = [], [], []
    for row, wanted, hidden in zip(scores, targets, excluded, strict=True):
        candidates = [item for item in range(len(row)) if item in wanted or item not in hidden]
        best = sorted(candidates, key=lambda item: (-row[item], item))[:k]
        recalls.append(len(set(best) & set(wanted)) / len(wanted))
        gain = sum(1 / math.log2(place + 2) for place, item in enumerate(best) if item in wanted)
        ndcgs.append(gain / sum(1 / math.log2(place + 2) for place in range(min(k, len(wanted)))))
        mrrs.append(next((1 / (place + 1) for place, item in enumerate(best) if item in wanted), 0.0))
    return {
        f"{name}_at_{k}": float(np.mean(values))
        for name, values in (("recall", recalls), ("ndcg", ndcgs), ("mrr", mrrs))
    }


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
    metrics = evaluate.evaluate(
        lambda start, stop: matrix[start:stop], item_lists(targets), item_lists(excluded), [k, k + 2]
    )
    rows = [[float(score) for score in row] for row in scores]
    assert metrics == pytest.approx(
        naive_metrics(rows, targets, excluded, k) | naive_metrics(rows, targets, excluded, k + 2)
    )


def test_answers_of_somebody_else_rank_as_scores_do() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(20, 12, generator=generator)
    targets = item_lists([[i % 12, (i + 5) % 12][: 1 + i % 2] for i in range(20)])
    expected = evaluate.rank(lambda start, stop: scores[start:stop], targets, item_lists([[]] * 20), [3, 6])
    answers = [row.numpy() for row in evaluate.best_items(scores, 6)]
    found = evaluate.rank_answers(answers, targets, 12, [3, 6])
    for name in ("queries", "ranks"):
        assert getattr(found, name).tolist() == getattr(expected, name).tolist()
    assert {k: shown.tolist() for k, shown in found.shown.items()} == {
        k: shown.tolist() for k, shown in expected.shown.items()
    }


def test_an_item_that_is_not_ours_takes_a_place() -> None:
    targets = item_lists([[2], [0, 1], [3]])
    answers = [np.array([-1, 2, 0]), np.array([1]), np.array([], dtype=np.int64)]
    found = evaluate.rank_answers(answers, targets, 4, [2, 3])
    assert found.ranks.tolist() == [1, 3, 0, 3]
    assert {k: shown.tolist() for k, shown in found.shown.items()} == {2: [0, 1, 1, 0], 3: [1, 1, 1, 0]}


def test_more_queries_than_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "_SCORES_AT_ONCE", 100)
    generator = torch.Generator().manual_seed(0)
    queries, items = torch.randn(70, 4, generator=generator), torch.randn(30, 4, generator=generator)
    targets = [[i % 30, (i + 7) % 30][: 1 + i % 2] for i in range(70)]
    excluded = [[(i + 1) % 30, (i + 2) % 30][: i % 3] for i in range(70)]
    scores = evaluate.embedding_scores(queries, items)
    metrics = evaluate.evaluate(scores, item_lists(targets), item_lists(excluded), [5])
    assert metrics == pytest.approx(naive_metrics((queries @ items.T).tolist(), targets, excluded, 5))


def test_by_hand() -> None:
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.6]])
    metrics = evaluate.evaluate(lambda start, stop: scores[start:stop], item_lists([[2]]), item_lists([[]]), [2, 3])
    found = {"recall_at_3": 1.0, "ndcg_at_3": 1 / math.log2(4), "mrr_at_3": 1 / 3}
    assert metrics == pytest.approx({"recall_at_2": 0.0, "ndcg_at_2": 0.0, "mrr_at_2": 0.0} | found)
    seen = evaluate.evaluate(lambda start, stop: scores[start:stop], item_lists([[2]]), item_lists([[0]]), [2])
    assert seen == pytest.approx({"recall_at_2": 1.0, "ndcg_at_2": 1 / math.log2(3), "mrr_at_2": 0.5})


def test_a_model_that_scores_all_alike_finds_only_the_first_rows() -> None:
    scores = torch.zeros(4, 100)
    targets = item_lists([[50], [99], [0], [3]])
    metrics = evaluate.evaluate(lambda start, stop: scores[start:stop], targets, item_lists([[]] * 4), [3])
    assert metrics["recall_at_3"] == 0.25


def test_items_that_are_shown_are_counted_at_each_k_without_the_excluded() -> None:
    scores = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    ranking = evaluate.rank(
        lambda start, stop: scores[start:stop], item_lists([[1], [2]]), item_lists([[0], [0, 1]]), [1, 2]
    )
    assert {k: shown.tolist() for k, shown in ranking.shown.items()} == {1: [0, 1, 1], 2: [0, 1, 2]}


def test_targets_that_are_not_chosen_count_neither_as_found_nor_as_missed() -> None:
    scores = torch.tensor([[4.0, 3.0, 2.0, 1.0]] * 2)
    ranking = evaluate.rank(
        lambda start, stop: scores[start:stop], item_lists([[0, 2], [1]]), item_lists([[], []]), [2]
    )
    figures = evaluate.query_figures(ranking, [2], np.array([False, True, False]))
    assert {name: values.tolist() for name, values in figures.items()} == {
        "recall_at_2": [0.0],
        "ndcg_at_2": [0.0],
        "mrr_at_2": [0.0],
    }


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_not_finite_are_no_ranking(bad: float) -> None:
    with pytest.raises(InvalidInputError, match="not finite"):
        evaluate.rank(lambda start, stop: torch.tensor([[0.0, bad]]), item_lists([[0]]), item_lists([[]]), [1])
