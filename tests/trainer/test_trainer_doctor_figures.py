"""Figures of the doctor with known answers, and the findings that follow from them."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from towers.features import RawValue
from trainer.config import DataConfig, TrainerConfig, TrainingConfig
from trainer.data import order_by_time, read_item_texts
from trainer.doctor import lists
from trainer.doctor.accuracy import false_negative_share
from trainer.doctor.leaks import given_away
from trainer.doctor.lists import overlap, skewness, top_lists
from trainer.doctor.neighbours import examples
from trainer.doctor.subject import TITLE_COLUMNS
from trainer.doctor.training import best_probability

FIGURES_OF_GOOD_LISTS = {
    "overlap_of_two_lists": 0.1,
    "share_of_the_most_frequent_list": 0.01,
    "k_occurrence_skewness": 3.0,
    "share_of_lists_with_the_largest_hub": 0.2,
    "popularity_bias": 1.5,
}


def test_the_nearest_items_come_first() -> None:
    items = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert top_lists(queries, items, 2).tolist() == [[0, 2], [1, 2]]


def test_overlap_is_the_mean_share_of_pairs_of_lists() -> None:
    # Three lists of two: {0, 1}, {0, 2}, {3, 4}. One pair of the three has one of two items in common.
    assert overlap(np.array([2, 1, 1, 1, 1]), num_lists=3, k=2) == pytest.approx(1 / 6)
    assert overlap(np.array([5, 5]), num_lists=5, k=2) == 1.0
    assert overlap(np.array([1, 1]), num_lists=1, k=2) == 0.0


def test_skewness_by_hand() -> None:
    # Deviations -1, -1, -1, 3: third moment 24 / 4, variance 12 / 4.
    assert skewness(np.array([0, 0, 0, 4])) == pytest.approx(6 / 3**1.5)
    assert skewness(np.array([1, 2, 3])) == pytest.approx(0.0)
    assert skewness(np.array([7, 7, 7])) == 0.0


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, []),
        ({"overlap_of_two_lists": 0.51}, ["same-list-for-everyone"]),
        ({"k_occurrence_skewness": 11.0, "share_of_lists_with_the_largest_hub": 0.3}, ["hubs"]),
        ({"k_occurrence_skewness": 11.0}, []),
        ({"share_of_lists_with_the_largest_hub": 0.3}, []),
        ({"popularity_bias": 2.1}, ["popularity-bias"]),
        ({"popularity_bias": 0.4}, ["popularity-bias"]),
    ],
)
def test_what_is_said_of_lists(changed: dict[str, float], expected: list[str]) -> None:
    found = lists.list_findings(FIGURES_OF_GOOD_LISTS | changed, k=10, logq="counts")
    assert [finding.name for finding in found] == expected


@pytest.mark.parametrize(
    ("weight", "logq", "expected"),
    [
        (2.0, "counts", "wrong-logq-sign"),
        (1.0, "counts", "popularity-missing"),
        (2.0, "none", "popularity-missing"),
        (-1.0, "counts", "popularity-excess"),
    ],
)
def test_what_is_said_of_the_weight_of_popularity(weight: float, logq: str, expected: str) -> None:
    assert lists.popularity_finding(weight, "recall_at_10", 0.1, 0.2, logq).name == expected


def test_negatives_of_all_sources_take_their_part_of_the_best_probability(
    configure: Callable[..., TrainerConfig],
) -> None:
    """At temperature 1: 3 of the batch, 5 uniform, 7 remembered, 2 hard and 4 shown."""
    sources = {"batch_size": 4, "uniform_negatives": 5, "memory": 7, "hard_negatives": 2, "shown_negatives": 4}
    config = configure(**{f"training__{name}": number for name, number in sources.items()})
    assert best_probability(config, 1.0) == pytest.approx(math.e / (math.e + 21 / math.e))


def test_false_negatives_by_hand() -> None:
    """Users 0 and 1 train on items {0, 1} and {0, 2}, and like one more: 2 and 1. Popularity is 1/2, 1/4, 1/4."""
    log = order_by_time(np.array([0, 0, 0, 1, 1, 1]), np.array([0, 1, 2, 0, 2, 1]), np.arange(6.0))
    train = np.array([0, 1, 3, 4])
    assert false_negative_share(log, train, TrainingConfig(), 3) == pytest.approx(0.25)
    # Nothing is masked but the positive: 1 less 1/2, 1/4, 1/2, 1/4.
    unmasked = TrainingConfig(mask_known_positives=False)
    assert false_negative_share(log, train, unmasked, 3) == pytest.approx(0.625)


def linked(*rows: int) -> dict[int, set[int]]:
    return {0: set(rows)}


def test_a_value_whose_holders_all_chose_the_item_gives_it_away() -> None:
    """Of 1,000 users eight hold a value, and those eight are who chose item 0."""
    holders = list(range(8))
    column: list[RawValue] = ["b"] * 1000
    column[:8] = ["a"] * 8
    pairs = [(user, 0) for user in holders]
    assert given_away(column, linked(*holders), pairs, min_others=1) == 1.0
    # Half of the holders chose something else.
    assert given_away(column, linked(*holders[:4]), pairs[:4], min_others=1) == 0.0
    # Everybody chose it: that those eight did is chance.
    assert given_away(column, linked(*range(1000)), pairs, min_others=1) == 0.0


def test_a_value_of_ones_own_gives_nothing_away() -> None:
    column: list[RawValue] = [f"own {user}" for user in range(1000)]
    assert given_away(column, linked(*range(8)), [(0, 0)], min_others=1) == 0.0


def test_a_list_gives_away_by_any_of_its_entries() -> None:
    column: list[RawValue] = [["common", "told"] if user < 8 else ["common"] for user in range(1000)]
    assert given_away([*column, None], linked(*range(8)), [(0, 0), (1, 0)], min_others=1) == 1.0
    # Of a row without a value nothing is known.
    assert given_away([*column, None], linked(*range(8), 1000), [(0, 0), (1000, 0)], min_others=1) == 0.5


def test_examples_are_spread_over_popularity_and_end_with_a_cold_item() -> None:
    counts = np.arange(101)[::-1].copy()
    assert examples(counts).tolist() == [0, 1, 10, 25, 49, 74, 100]
    # An item that several quantiles fall on is there once.
    assert examples(np.array([3, 0, 0])).tolist() == [0, 1]


def test_titles_are_read_whether_or_not_a_feature_reads_them(tmp_path: Path) -> None:
    table = pa.table({"item_id": [7, 8, 9], "name": ["no", "no", "no"], "title": ["Seven", None, "Nine"]})
    pq.write_table(table, tmp_path / "items.parquet")
    config = DataConfig(interactions="interactions.parquet", items="items.parquet")
    assert read_item_texts(config, tmp_path, TITLE_COLUMNS) == {"7": "Seven", "9": "Nine"}
    (tmp_path / "items.csv").write_text("film|name\n007|Bond\n008|\n")
    config = DataConfig(interactions="i.csv", items="items.csv", item_id_column="film", csv_separator="|")
    assert read_item_texts(config, tmp_path, TITLE_COLUMNS) == {"007": "Bond"}
    (tmp_path / "items.csv").write_text("film|year\n007|1962\n")
    assert read_item_texts(config, tmp_path, TITLE_COLUMNS) == {}


def test_titles_of_documents(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text('{"_id": "d1", "title": "On towers", "text": "They stand."}\n')
    config = DataConfig(layout="beir", interactions="qrels.tsv", items="corpus.jsonl", users="queries.jsonl")
    assert read_item_texts(config, tmp_path, TITLE_COLUMNS) == {"d1": "On towers"}
