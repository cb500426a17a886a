"""Hard negatives: items that stand near a query and that its user is not known to like.

Deliberately does not know towers, losses, nor when the index is made anew. FAISS is imported when an index is made.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from towers.errors import InvalidInputError
from trainer.likes import standing

_EXACT_ITEMS = 50_000
"""So many items are searched one by one; more in the cells nearest to the query."""
_CELLS_PER_ROOT = 4
_SEARCHED_SHARE = 1 / 16
_QUERIES_AT_ONCE = 1024


@dataclass(frozen=True)
class HardNegatives:
    """H items for each of Q queries, drawn evenly from a window of what is near to it.

    An item of the window may stand in a place that all queries share too. Divided by how often it is expected in both,
    what is drawn and what stands elsewhere estimate the sum over all items together, neither with a large weight where
    the other is frequent (Veach and Guibas 1995, "Optimally combining sampling techniques for Monte Carlo rendering",
    the balance heuristic).
    """

    ids: Tensor
    """`[Q, H]` those drawn; -1 where the window has fewer."""
    windows: Tensor
    """`[Q, W]` what they were drawn from; -1 where there is less."""

    def log_shares(self) -> Tensor:
        """`[Q]` log of the share of each window that was drawn: how often each item of it is expected among them."""
        drawn, there = (self.ids >= 0).sum(dim=1), (self.windows >= 0).sum(dim=1)
        return torch.log(drawn.clamp(min=1) / there.clamp(min=1))

    def log_counts(self, places: Tensor, log_elsewhere: Tensor) -> Tensor:
        """`[P, H]` log of how often what was drawn for the queries at places `[P]` is expected, here and elsewhere.

        Args:
            places: `[P]`
            log_elsewhere: `[P, H]` log of how often those items are expected in all places that queries share.
        """
        return torch.logaddexp(self.log_shares()[places].unsqueeze(1), log_elsewhere)

    def log_counts_elsewhere(
        self, places: Tensor, ids: Tensor, log_counts: Tensor, log_elsewhere: Tensor, num_items: int
    ) -> Tensor:
        """`[P, C]` the same of places that queries share, for those at places `[P]`: more where it is in the window.

        Args:
            places: `[P]`
            ids: `[C]` the items there.
            log_counts: `[C]` what is subtracted from their scores where nothing is drawn besides.
            log_elsewhere: `[C]` log of how often those items are expected in all places that queries share.
            num_items: I
        """
        windows = self.windows[places]
        rows, ranks = (windows >= 0).nonzero(as_tuple=True)
        in_window = standing(rows, windows[rows, ranks], ids, len(places), num_items)  # [P, C]
        more = functional.softplus(self.log_shares()[places].unsqueeze(1) - log_elsewhere)  # [P, C]
        return torch.where(in_window, log_counts + more, log_counts)


class ItemIndex:
    """The items as they were embedded at one step; queries are searched in it as they are now."""

    def __init__(self, embeddings: Tensor) -> None:
        """Indexes them; equal embeddings give an equal index.

        Args:
            embeddings: `[I, D]` unit embeddings.

        Raises:
            InvalidInputError: FAISS is not installed.
        """
        try:
            # Here, because most trainings mine nothing.
            import faiss
        except ImportError as error:
            raise InvalidInputError(
                "[training] hard_negatives: it needs FAISS; pip install 'twotower[index]', or leave it out"
            ) from error
        self.embeddings = embeddings
        num_items, dim = embeddings.shape
        num_cells = int(_CELLS_PER_ROOT * math.sqrt(num_items))
        kind = "Flat" if num_items <= _EXACT_ITEMS else f"IVF{num_cells},Flat"
        self._index = faiss.index_factory(dim, kind, faiss.METRIC_INNER_PRODUCT)
        vectors = embeddings.numpy()
        self._index.train(vectors)
        self._index.add(vectors)
        if num_items > _EXACT_ITEMS:
            self._index.nprobe = math.ceil(num_cells * _SEARCHED_SHARE)

    def nearest(self, queries: Tensor, k: int) -> Tensor:
        """The k items nearest to each query, best first.

        Args:
            queries: `[Q, D]`
            k: At least 1.

        Returns:
            `[Q, k]`, -1 where fewer were found.
        """
        k = min(k, self._index.ntotal)
        found = [self._index.search(part.numpy(), k)[1] for part in torch.split(queries, _QUERIES_AT_ONCE)]
        return torch.from_numpy(np.concatenate(found))


def mine(
    index: ItemIndex,
    queries: Tensor,
    is_liked: Callable[[Tensor, Tensor], Tensor],
    ranks: tuple[int, int],
    keys: Tensor,
    size: int,
) -> HardNegatives:
    """Draws hard negatives from a window of the ranks that the items have once those known to be liked are left out.

    Args:
        index: Of the items.
        queries: `[Q, D]`
        is_liked: Of queries at places `[P]`, which of items `[P, k]` are no negatives of their row's.
        ranks: The first and the last of the W ranks of the window, from 1.
        keys: `[Q, W]` random numbers; those whose are lowest are drawn.
        size: H, at most W.
    """
    first, last = ranks
    windows = torch.full((len(queries), last - first + 1), -1)
    places, depth = torch.arange(len(queries)), 2 * last
    # What is liked is mostly near; queries whose window it leaves short, and only those, are searched deeper.
    while len(places):
        found = index.nearest(queries[places], depth)  # [P, k]
        is_there = (found >= 0) & ~is_liked(places, found)
        rank = is_there.cumsum(dim=1)
        rows, columns = (is_there & (rank >= first) & (rank <= last)).nonzero(as_tuple=True)
        windows[places[rows], rank[rows, columns] - first] = found[rows, columns]
        is_all = (found[:, -1] < 0) | (found.shape[1] < depth)
        places, depth = places[(rank[:, -1] < last) & ~is_all], 2 * depth
    order = keys.masked_fill(windows < 0, torch.inf).topk(size, largest=False).indices  # [Q, H]
    return HardNegatives(windows.gather(1, order), windows)
