"""What users were shown and did not choose: negatives of their own queries, beside all that others are.

Deliberately does not know towers, losses, nor what users like.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_OF_SHOWN = 3
"""Behind the step in their seed; other draws have other numbers there."""


@dataclass(frozen=True)
class Shown:
    """The different items that each user was shown and did not choose, one user's after the other's."""

    starts: Tensor
    """`[U + 1]` where each user's items start."""
    items: Tensor
    """`[M]`"""

    @classmethod
    def of(cls, users: Tensor, items: Tensor, num_users: int, num_items: int) -> "Shown":
        """Gathers them from impressions.

        Args:
            users: `[N]` the user of each.
            items: `[N]` its item.
            num_users: U
            num_items: I
        """
        pairs = torch.unique(users * num_items + items)
        return cls(torch.searchsorted(pairs, torch.arange(num_users + 1) * num_items), pairs % num_items)

    def drawn(self, users: Tensor, keys: Tensor, size: int) -> Tensor:
        """So many of each user's, all equally likely, none twice: those from a random place on, around the end.

        Args:
            users: `[Q]`
            keys: `[Q]` random numbers from 0 to below 1.
            size: S

        Returns:
            `[Q, S]` items; -1 where there are fewer.
        """
        if not len(self.items):
            return torch.full((len(users), size), -1)
        starts = self.starts[users].unsqueeze(1)
        counts = self.starts[users + 1].unsqueeze(1) - starts
        turn = torch.arange(size)  # [S]
        first = (keys.unsqueeze(1) * counts).long()  # [Q, 1]
        within = (first + turn) % counts.clamp(min=1)  # [Q, S]
        # Of users without any, all places are missing: any item will do.
        items = self.items[(starts + within).clamp(max=len(self.items) - 1)]
        return items.masked_fill(turn >= counts, -1)


def keys_of(num_queries: int, seed: int, epoch: int, step: int) -> Tensor:
    """`[Q]` random numbers of a step: a resumed run has nothing to restore, and all processes draw the same."""
    random = np.random.default_rng([seed, epoch, step + 1, _OF_SHOWN])
    return torch.from_numpy(random.random(num_queries))
