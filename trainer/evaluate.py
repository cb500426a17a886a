"""Exact ranking of all items, and what it says of each query: Recall, NDCG and MRR.

Deliberately does not know how scores come about: towers and baselines are ranked by the same code.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from towers.errors import InvalidInputError
from trainer.questions import ItemLists

ScoreRows = Callable[[int, int], Tensor]
"""Scores `[stop - start, I]` of queries start to stop against all items."""

_SCORES_AT_ONCE = 1 << 24
"""Of one block of queries: 64 MB."""


@dataclass(frozen=True)
class Ranking:
    """Where Q queries rank their P targets among all I items that are not excluded."""

    queries: NDArray[np.int64]
    """`[P]` the query of each target, rising."""
    ranks: NDArray[np.int64]
    """`[P]` 0 is best; the depth of the ranking stands for all that are not among the best."""
    shown: Mapping[int, NDArray[np.int64]]
    """For each k, `[I]` the number of queries that have an item among their k best."""


def evaluate(score_rows: ScoreRows, targets: ItemLists, excluded: ItemLists, ks: Sequence[int]) -> dict[str, float]:
    """Means over queries of Recall, NDCG and MRR.

    Args:
        score_rows: Gives the scores.
        targets: Items to be found for each query; at least one each.
        excluded: Items that leave each query's ranking. A target never does.
        ks: The cut-offs.

    Returns:
        `recall_at_<k>`, `ndcg_at_<k>` and `mrr_at_<k>`.

    Raises:
        InvalidInputError: a score is not finite, so there is no ranking.
    """
    figures = query_figures(rank(score_rows, targets, excluded, ks), ks)
    return {name: float(values.mean()) for name, values in figures.items()}


def rank(score_rows: ScoreRows, targets: ItemLists, excluded: ItemLists, ks: Sequence[int]) -> Ranking:
    """Ranks all items for each query, as deep as the largest k.

    Of items with equal scores the one with the lower row comes first, so a model that scores all alike gains nothing.

    Args:
        score_rows: Gives the scores.
        targets: Items to be found for each query.
        excluded: Items that leave each query's ranking, targets aside.
        ks: The cut-offs.

    Raises:
        InvalidInputError: a score is not finite.
    """
    depth = max(ks)
    num_items = score_rows(0, 1).shape[1]
    num_rows = max(1, _SCORES_AT_ONCE // num_items)
    shown = {k: np.zeros(num_items, dtype=np.int64) for k in ks}
    ranks: list[NDArray[np.int64]] = []
    for start in range(0, len(targets), num_rows):
        stop = min(start + num_rows, len(targets))
        scores = score_rows(start, stop).clone()  # [b, I]
        if not torch.isfinite(scores).all():
            raise InvalidInputError("a score is not finite, so items cannot be ranked; lower [training] learning_rate")
        rows, items = map(torch.from_numpy, targets.pairs(start, stop))  # [p], [p]
        wanted = scores[rows, items]
        scores[tuple(map(torch.from_numpy, excluded.pairs(start, stop)))] = -torch.inf
        scores[rows, items] = wanted
        best = best_items(scores, depth)  # [b, depth], less where there are fewer items
        places = torch.arange(best.shape[1])
        is_target = best[rows] == items.unsqueeze(1)  # [p, depth]
        ranks.append(torch.where(is_target, places, depth).amin(dim=1).numpy())
        is_left = scores.gather(1, best) > -torch.inf
        for k in ks:
            shown[k] += np.bincount(best[:, :k][is_left[:, :k]].numpy(), minlength=num_items)
    return Ranking(targets.pairs()[0], np.concatenate(ranks), shown)


def rank_answers(
    answers: Sequence[NDArray[np.int64]], targets: ItemLists, num_items: int, ks: Sequence[int]
) -> Ranking:
    """Ranks targets by what somebody else returned for each query.

    Args:
        answers: Items of each query, best first, at least as many as the largest k where there are so many; -1 is an
            item that is not among ours and takes a place all the same.
        targets: Items to be found for each query.
        num_items: I
        ks: The cut-offs.
    """
    depth = max(ks)
    queries, items = targets.pairs()
    padded = np.full((len(answers), depth), -1, dtype=np.int64)
    for row, answer in enumerate(answers):
        padded[row, : len(answer)] = answer[:depth]
    is_target = padded[queries] == items[:, None]  # [P, depth]
    ranks = np.where(is_target.any(axis=1), is_target.argmax(axis=1), depth)
    shown = {}
    for k in ks:
        best = padded[:, :k]
        shown[k] = np.bincount(best[best >= 0], minlength=num_items)
    return Ranking(queries, ranks, shown)


def best_items(scores: Tensor, k: int) -> Tensor:
    """Columns of the k highest scores of each row, highest first, equal scores in the order of the columns.

    Args:
        scores: `[B, I]`
        k: How many; all where there are fewer.

    Returns:
        `[B, k]`
    """
    values, items = torch.topk(scores, min(k + 1, scores.shape[1]))
    items, _ = items[:, :k].sort(dim=1)
    best = items.gather(1, scores.gather(1, items).argsort(dim=1, descending=True, stable=True))
    if values.shape[1] > k:
        # topk chooses freely among those that are level with the last one.
        is_open = values[:, k - 1] == values[:, k]
        best[is_open] = scores[is_open].sort(dim=1, descending=True, stable=True).indices[:, :k]
    return best


def query_figures(
    ranking: Ranking, ks: Sequence[int], chosen: NDArray[np.bool_] | None = None
) -> dict[str, NDArray[np.float64]]:
    """Recall, NDCG and MRR at each k, of each query.

    Recall: the share of a query's targets among its first k. NDCG: their discounted gain divided by that of the best
    possible order; gains are binary, rank r is discounted by 1 / log2(r + 2) (Järvelin and Kekäläinen 2002). MRR: one
    divided by the place of the first target, zero where none is among the first k.

    Args:
        ranking: The ranks.
        ks: The cut-offs, none deeper than the ranking.
        chosen: `[P]` targets to look at; all when left out. The others count neither as found nor as missed.

    Returns:
        `recall_at_<k>`, `ndcg_at_<k>` and `mrr_at_<k>`, one entry for each query with a chosen target.
    """
    queries, ranks = (
        (ranking.queries, ranking.ranks)
        if chosen is None
        else (
            ranking.queries[chosen],
            ranking.ranks[chosen],
        )
    )
    _, firsts, rows, counts = np.unique(queries, return_index=True, return_inverse=True, return_counts=True)
    best_ranks = np.minimum.reduceat(ranks, firsts)
    figures = {}
    for k in ks:
        gains = np.where(ranks < k, 1 / np.log2(ranks + 2), 0.0)
        ideals = np.cumsum(1 / np.log2(np.arange(k) + 2))
        figures[f"recall_at_{k}"] = np.bincount(rows, weights=ranks < k) / counts
        figures[f"ndcg_at_{k}"] = np.bincount(rows, weights=gains) / ideals[np.minimum(counts, k) - 1]
        figures[f"mrr_at_{k}"] = np.where(best_ranks < k, 1 / (best_ranks + 1), 0.0)
    return figures


def embedding_scores(query_embeddings: Tensor, item_embeddings: Tensor) -> ScoreRows:
    """Inner products of queries `[Q, D]` with all items `[I, D]`."""
    return lambda start, stop: query_embeddings[start:stop] @ item_embeddings.T
