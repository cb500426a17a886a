"""Models that need no training, or little: what the towers have to be better than, on the same questions.

Deliberately does not know towers, features, or how a ranking is judged.
"""

import importlib.util

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.bm25 import Texts, bm25_scores
from trainer.data import InteractionLog
from trainer.evaluate import ScoreRows
from trainer.questions import ItemLists

NUM_NEIGHBOURS = 100
_LARGEST_BASKET = 500
"""Newest items of a user that are taken to go together: who did everything would cost the square of it."""
_ALS_FACTORS = 64
_ALS_ROWS_PER_FACTOR = 10
"""Users, and items, that each factor stands for at least: with as many factors as items all that a user did not choose
is reconstructed as such, in small worlds too."""


def baselines(
    log: InteractionLog,
    train: NDArray[np.int64],
    positions: NDArray[np.int64],
    num_items: int,
    texts: Texts | None = None,
) -> dict[str, ScoreRows]:
    """All baselines, by name; `als` and, for texts, `bm25` where the packages `implicit` and `bm25s` are installed.

    Args:
        log: All interactions.
        train: Positions of the interactions to learn from.
        positions: `[Q]` positions of the queries; the history of each is what is before it.
        num_items: I.
        texts: Of users and items, where both have some.
    """
    counts = np.bincount(log.items[train], minlength=num_items)
    found = {
        "popularity": popularity_scores(counts),
        "item_knn": item_knn_scores(log, train, positions, num_items),
    }
    if importlib.util.find_spec("implicit") is not None:
        found["als"] = als_scores(log, train, positions, num_items)
    if texts is not None and importlib.util.find_spec("bm25s") is not None:
        found["bm25"] = bm25_scores(texts, log.users[positions])
    return found


def popularity_scores(item_counts: NDArray[np.int64]) -> ScoreRows:
    """Every query ranks items by their number of training interactions `[I]`."""
    # Places instead of counts, because no two of them are level.
    places = np.empty(len(item_counts))
    places[np.lexsort((-np.arange(len(item_counts)), item_counts))] = np.arange(len(item_counts))
    scores = torch.from_numpy(places)
    return lambda start, stop: scores.expand(stop - start, -1)


def item_knn_scores(
    log: InteractionLog, train: NDArray[np.int64], positions: NDArray[np.int64], num_items: int
) -> ScoreRows:
    """The cosines between an item and those of the history that it is a neighbour of, summed.

    (Deshpande and Karypis, "Item-based top-N recommendation algorithms", 2004.)

    Args:
        log: All interactions.
        train: Positions of the interactions that neighbours are learned from.
        positions: `[Q]` positions of the queries; the history of each is what is before it.
        num_items: I.
    """
    neighbours, cosines = map(torch.from_numpy, nearest_items(log, train, num_items))  # [I, n], [I, n]
    histories = ItemLists(log.items, log.starts[positions], positions)

    def score_rows(start: int, stop: int) -> torch.Tensor:
        rows, items = map(torch.from_numpy, histories.pairs(start, stop))
        scores = torch.zeros((stop - start) * num_items)
        cells = rows.unsqueeze(1) * num_items + neighbours[items]  # [p, n]
        scores.index_add_(0, cells.flatten(), cosines[items].flatten())
        return scores.view(stop - start, num_items)

    return score_rows


def nearest_items(
    log: InteractionLog, train: NDArray[np.int64], num_items: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The items that most often share users with each item, and the cosines of their sets of users.

    Args:
        log: All interactions.
        train: Rising positions of the interactions to learn from.
        num_items: I.

    Returns:
        `[I, n]` rows of the neighbours, and their cosines; zero where there are fewer.
    """
    _, firsts, rows, counts = np.unique(log.users[train], return_index=True, return_inverse=True, return_counts=True)
    newest = train[np.arange(len(train)) >= (firsts + counts - _LARGEST_BASKET)[rows]]
    users, items = np.unique(np.stack([log.users[newest], log.items[newest]]), axis=1)
    _, firsts, rows, counts = np.unique(users, return_index=True, return_inverse=True, return_counts=True)
    item_counts = np.bincount(items, minlength=num_items)
    # Baskets that hold each item, item after item.
    holders = rows[np.argsort(items, kind="stable")]
    stops = np.cumsum(item_counts)
    num_neighbours = min(NUM_NEIGHBOURS, num_items)
    neighbours = np.zeros((num_items, num_neighbours), dtype=np.int64)
    cosines = np.zeros((num_items, num_neighbours), dtype=np.float32)
    for item in np.flatnonzero(item_counts).tolist():
        chosen = holders[stops[item] - item_counts[item] : stops[item]]
        _, beside = ItemLists(items, firsts[chosen], (firsts + counts)[chosen]).pairs()
        together = np.bincount(beside, minlength=num_items)
        together[item] = 0
        others = np.flatnonzero(together)
        similarity = together[others] / np.sqrt(item_counts[item] * item_counts[others])
        best = np.lexsort((others, -similarity))[:num_neighbours]
        neighbours[item, : len(best)] = others[best]
        cosines[item, : len(best)] = similarity[best]
    return neighbours, cosines


def als_scores(
    log: InteractionLog, train: NDArray[np.int64], positions: NDArray[np.int64], num_items: int
) -> ScoreRows:
    """Implicit-feedback matrix factorisation (Hu, Koren and Volinsky 2008) by the package `implicit`.

    Args:
        log: All interactions.
        train: Positions of the interactions to learn from.
        positions: `[Q]` positions of the queries; their users are what counts.
        num_items: I.
    """
    from implicit.als import AlternatingLeastSquares
    from scipy.sparse import csr_matrix
    from threadpoolctl import threadpool_limits

    users, items = log.users[train], log.items[train]
    shape = (int(log.users.max()) + 1, num_items)
    liked = csr_matrix((np.ones(len(train), dtype=np.float32), (users, items)), shape=shape)
    factors = max(1, min(_ALS_FACTORS, min(shape) // _ALS_ROWS_PER_FACTOR))
    # Its own threads are enough: those of BLAS beside them cost more than they save, of which it warns.
    with threadpool_limits(1, "blas"):
        model = AlternatingLeastSquares(factors=factors, random_state=0, use_gpu=False)
        model.fit(liked, show_progress=False)
    query_factors = torch.from_numpy(np.asarray(model.user_factors)[log.users[positions]])  # [Q, F]
    item_factors = torch.from_numpy(np.asarray(model.item_factors))  # [I, F]
    return lambda start, stop: query_factors[start:stop] @ item_factors.T
