"""A running service as one more model to be judged: the same questions, answered by whoever serves them.

Deliberately does not know how it is called.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from towers.features import RawValue
from trainer.data import Entities
from trainer.encode import DataEncoder
from trainer.evaluate import Ranking, rank_answers
from trainer.questions import ItemLists, Questions

LIVE = "live_service"
"""Name of the model."""


@dataclass(frozen=True)
class LiveQuery:
    """One query as a caller would ask it."""

    features: Mapping[str, RawValue]
    excluded_item_ids: Sequence[str]


AskLive = Callable[[Sequence[LiveQuery], int], Iterator[Sequence[str]]]
"""Asks for the k best items of each query; gives their ids, best first, in the order of the queries."""


def live_ranking(
    ask_live: AskLive, questions: Questions, encoder: DataEncoder, items: Entities, ks: Sequence[int]
) -> tuple[Ranking, list[str]]:
    """Ranks the targets by the answers of a service.

    Args:
        ask_live: Asks it.
        questions: What is asked.
        encoder: Knows the raw features of each question.
        items: Those of the data.
        ks: The cut-offs; as many items are asked for as the largest.

    Returns:
        The ranking, and a line if the service returned items that the data does not have: each takes a place.
    """
    features = encoder.raw_queries(questions.positions.tolist())
    excluded = _without_targets(questions)
    queries = [
        LiveQuery(row, [items.ids[item] for item in left_out]) for row, left_out in zip(features, excluded, strict=True)
    ]
    row_of = {item_id: row for row, item_id in enumerate(items.ids)}
    answers = [
        np.array([row_of.get(item_id, -1) for item_id in answer], dtype=np.int64)
        for answer in ask_live(queries, max(ks))
    ]
    num_unknown = sum(int((answer < 0).sum()) for answer in answers)
    notes = [f"the service returned {num_unknown:,} items that {items.name} does not have"] if num_unknown else []
    return rank_answers(answers, questions.targets, len(items.ids), ks), notes


def _without_targets(questions: Questions) -> list[list[int]]:
    """What is left out of each ranking: a target never is, though the user may have seen it before."""
    targets, excluded = _as_sets(questions.targets), _as_sets(questions.excluded)
    return [sorted(seen - wanted) for seen, wanted in zip(excluded, targets, strict=True)]


def _as_sets(lists: ItemLists) -> list[set[int]]:
    return [
        set(lists.items[start:stop].tolist())
        for start, stop in zip(lists.starts.tolist(), lists.stops.tolist(), strict=True)
    ]
