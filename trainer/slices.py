"""Parts of the held-out interactions that are looked at by themselves: cold items, popular items, short histories, …

Deliberately does not know who is judged by them.
"""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from towers.features import RawValue, category_token
from towers.schema import CategoricalFeature, CategoricalListFeature, FeatureSchema
from trainer.data import ITEM_ID, USER_ID, TrainingData
from trainer.questions import Questions

NUM_DECILES = 10
_HISTORY_LENGTHS = (0, 1, 5, 10, 20, 50, 100)
"""Shortest history of each slice; the last has no end."""
_VALUES_SHOWN = 20


@dataclass(frozen=True)
class Slice:
    """Some of the P targets."""

    name: str
    """`cold-items`, or `item-popularity=10`, `history-length=5-9`, `<feature>=<value>`; no value: it is missing."""
    chosen: NDArray[np.bool_]
    """`[P]`"""


def all_slices(
    data: TrainingData, schema: FeatureSchema, item_counts: NDArray[np.int64], questions: Questions
) -> list[Slice]:
    """All slices with a target, of categorical features those of the most frequent values.

    Items are cold without a training interaction. The others fall into ten parts of about as many items each, 10 the
    most popular; items with equal counts stay together. Features that hold the ids are no slices.

    Args:
        data: Users, items and the log.
        schema: Its categorical features, of the user or the item, give slices.
        item_counts: `[I]` training interactions of each item.
        questions: Whose targets are sliced.
    """
    queries, items = questions.targets.pairs()
    lengths = questions.positions - data.log.starts[questions.positions]
    slices = [Slice("cold-items", item_counts[items] == 0)]
    deciles = popularity_deciles(item_counts)[items]
    slices += [Slice(f"item-popularity={decile}", deciles == decile) for decile in range(1, NUM_DECILES + 1)]
    shortest = np.searchsorted(_HISTORY_LENGTHS, lengths, side="right")[queries]
    slices += [
        Slice(f"history-length={name}", shortest == number) for number, name in enumerate(_length_names(), start=1)
    ]
    for feature in _sliced_features(schema):
        entities, rows = (
            (data.items, items)
            if feature.owner == "item"
            else (data.users, data.log.users[questions.positions][queries])
        )
        slices += _by_value(feature.name, entities.columns[feature.column], rows)
    return [part for part in slices if part.chosen.any()]


def slice_kinds(schema: FeatureSchema) -> list[str]:
    """What the name of a slice may begin with, up to its `=`."""
    return ["cold-items", "item-popularity", "history-length", *(feature.name for feature in _sliced_features(schema))]


def popularity_deciles(item_counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """`[I]` 1 to 10 by training interactions `[I]`, 0 for items without any."""
    warm = np.sort(item_counts[item_counts > 0])
    num_below = np.searchsorted(warm, item_counts, side="left")
    deciles: NDArray[np.int64] = np.where(item_counts > 0, 1 + num_below * NUM_DECILES // max(1, len(warm)), 0)
    return deciles


def _sliced_features(schema: FeatureSchema) -> Iterator[CategoricalFeature | CategoricalListFeature]:
    for feature in schema.features:
        if isinstance(feature, CategoricalFeature | CategoricalListFeature) and feature.column not in (
            USER_ID,
            ITEM_ID,
        ):
            yield feature


def _length_names() -> Iterator[str]:
    for shortest, longer in itertools.pairwise(_HISTORY_LENGTHS):
        yield str(shortest) if longer == shortest + 1 else f"{shortest}-{longer - 1}"
    yield f"{_HISTORY_LENGTHS[-1]}+"


def _by_value(name: str, column: Sequence[RawValue], rows: NDArray[np.int64]) -> Iterator[Slice]:
    """A slice for each of the most frequent values of a column `[R]`, whose rows `[P]` are those of the targets."""
    tokens = [_tokens(value) for value in column]
    rows_with: dict[str, list[int]] = {}
    frequencies: Counter[str] = Counter()
    for row, times in zip(*(found.tolist() for found in np.unique(rows, return_counts=True)), strict=True):
        for token in tokens[row]:
            rows_with.setdefault(token, []).append(row)
            frequencies[token] += times
    shown = sorted(frequencies, key=lambda token: (-frequencies[token], token))[:_VALUES_SHOWN]
    for token in shown:
        yield Slice(f"{name}={token}", np.isin(rows, rows_with[token]))


def _tokens(value: RawValue) -> set[str]:
    """The values that an entity has; an empty one stands for none."""
    entries = value if isinstance(value, list) else [value]
    return {category_token(entry) or "" for entry in entries} or {""}
