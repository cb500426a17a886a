"""Exact ranking of all items: Recall@K and NDCG@K of held-out interactions.

Deliberately does not know how scores come about: towers and the popularity baseline are ranked by the same code.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from towers.errors import InvalidInputError

ScoreRows = Callable[[int, int], Tensor]
"""Scores `[stop - start, I]` of queries start to stop against all items."""

_ROWS_AT_ONCE = 256


def evaluate(
    score_rows: ScoreRows, targets: Sequence[Sequence[int]], excluded: Sequence[Sequence[int]], ks: Sequence[int]
) -> dict[str, float]:
    """Mean Recall@K and NDCG@K over queries.

    Args:
        score_rows: Gives the scores.
        targets: Items to be found for each query; at least one each.
        excluded: Items that leave each query's ranking. A target never does.
        ks: The cut-offs.

    Returns:
        `recall_at_<k>` and `ndcg_at_<k>`.

    Raises:
        InvalidInputError: a score is not finite, so there is no ranking.
    """
    ranks = target_ranks(score_rows, targets, excluded)
    metrics: dict[str, float] = {}
    for k in ks:
        metrics[f"recall_at_{k}"] = sum(recall_at_k(row, k) for row in ranks) / len(ranks)
        metrics[f"ndcg_at_{k}"] = sum(ndcg_at_k(row, k) for row in ranks) / len(ranks)
    return metrics


def embedding_scores(query_embeddings: Tensor, item_embeddings: Tensor) -> ScoreRows:
    """Inner products of queries `[Q, D]` with all items `[I, D]`."""
    return lambda start, stop: query_embeddings[start:stop] @ item_embeddings.T


def popularity_scores(item_counts: Tensor) -> ScoreRows:
    """The baseline: every query scores an item by its number of training interactions `[I]`."""
    # In double precision counts stay exact, so no two different ones tie.
    scores = item_counts.to(torch.float64)
    return lambda start, stop: scores.expand(stop - start, -1)


def target_ranks(
    score_rows: ScoreRows, targets: Sequence[Sequence[int]], excluded: Sequence[Sequence[int]]
) -> list[list[int]]:
    """Rank of each target among all items that are not excluded; 0 is best.

    Of items with equal scores the one with the lower row comes first, so a model that scores all alike gains nothing.

    Args:
        score_rows: Gives the scores.
        targets: Rows of the target items of each query.
        excluded: Rows of the items that leave each query's ranking, targets aside.

    Raises:
        InvalidInputError: a score is not finite.
    """
    ranks: list[list[int]] = []
    for start in range(0, len(targets), _ROWS_AT_ONCE):
        stop = min(start + _ROWS_AT_ONCE, len(targets))
        scores = score_rows(start, stop).clone()  # [b, I]
        if not torch.isfinite(scores).all():
            raise InvalidInputError("a score is not finite, so items cannot be ranked; lower [training] learning_rate")
        wanted = _pairs(targets[start:stop])
        wanted_scores = scores[wanted].unsqueeze(1)  # [P, 1]
        scores[_pairs(excluded[start:stop])] = -torch.inf
        scores[wanted] = wanted_scores.squeeze(1)
        rows, items = wanted
        others = scores[rows]  # [P, I]
        is_before = torch.arange(scores.shape[1]) < items.unsqueeze(1)  # [P, I]
        is_better = (others > wanted_scores) | ((others == wanted_scores) & is_before)
        found = iter(is_better.sum(dim=1).tolist())
        ranks.extend([next(found) for _ in row] for row in targets[start:stop])
    return ranks


def recall_at_k(ranks: Sequence[int], k: int) -> float:
    """Share of a query's targets that are among its first k."""
    return sum(rank < k for rank in ranks) / len(ranks)


def ndcg_at_k(ranks: Sequence[int], k: int) -> float:
    """Discounted gain of a query's targets, divided by that of the best possible order (Järvelin and Kekäläinen 2002).

    Gains are binary; rank r is discounted by 1 / log2(r + 2).
    """
    gain = sum(1 / math.log2(rank + 2) for rank in ranks if rank < k)
    ideal = sum(1 / math.log2(rank + 2) for rank in range(min(k, len(ranks))))
    return gain / ideal


def _pairs(items: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Row numbers and items `[P]` of all entries of ragged lists."""
    rows = [row for row, entries in enumerate(items) for _ in entries]
    flat = [item for entries in items for item in entries]
    return torch.tensor(rows, dtype=torch.int64), torch.tensor(flat, dtype=torch.int64)
