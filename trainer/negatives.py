"""The items that the queries of a batch are scored against: those of the batch, uniform draws, or all.

Deliberately does not know embeddings, scores or losses.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Candidates:
    """C places, one or several of which hold a query's own positive; all others are its negatives."""

    ids: Tensor
    """`[C]` the item in each place."""
    log_q: Tensor
    """`[C]` log of the probability that a place of this source holds this item."""


def joined(sources: Sequence[Candidates]) -> Candidates:
    """The places of several sources one after the other, each with the q of its own source.

    What stands in any place, divided by its q, is an estimate of the sum over all items, so the mean over all places
    is one too (mixed negatives: Yang et al. 2020, "Mixed negative sampling for learning two-tower neural networks in
    recommendations").
    """
    return Candidates(torch.cat([source.ids for source in sources]), torch.cat([source.log_q for source in sources]))


def of_batch(positives: Tensor, log_q: Tensor) -> Candidates:
    """The batch's own items, drawn by popularity.

    Args:
        positives: `[B]` the item of each interaction.
        log_q: `[I]` log of the probability that a batch place holds an item.
    """
    return Candidates(positives, log_q[positives])


def uniform(num_items: int, size: int, seed: int, epoch: int, step: int) -> Candidates:
    """Items drawn uniformly, the same for the same step: a resumed run has nothing to restore."""
    # Plus one, because NumPy takes a seed that ends in zero for the shorter one, which orders the epoch.
    random = np.random.default_rng([seed, epoch, step + 1])
    return Candidates(
        torch.from_numpy(random.integers(num_items, size=size)), torch.full((size,), -math.log(num_items))
    )


def all_items(num_items: int) -> Candidates:
    """Every item once."""
    return Candidates(torch.arange(num_items), torch.full((num_items,), -math.log(num_items)))
