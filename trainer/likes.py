"""Which items each user is known to like, and which of those stand among some candidates.

Deliberately does not know scores, nor why somebody asks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Likes:
    """The different items of each user, one user's after the other's."""

    starts: Tensor
    """`[U + 1]` where each user's items start."""
    items: Tensor
    """`[N]`"""
    num_items: int
    """I, of the catalogue."""

    @classmethod
    def of(cls, users: Tensor, items: Tensor, num_users: int, num_items: int) -> "Likes":
        """Gathers them from interactions.

        Args:
            users: `[N]` the user of each interaction.
            items: `[N]` its item.
            num_users: U
            num_items: I
        """
        pairs = torch.unique(users * num_items + items)
        starts = torch.searchsorted(pairs, torch.arange(num_users + 1) * num_items)
        return cls(starts, pairs % num_items, num_items)

    def among(self, users: Tensor, ids: Tensor) -> Tensor:
        """Which candidates each user is known to like.

        Takes time by what the users like and by the answer's size, never by their product.

        Args:
            users: `[B]`
            ids: `[C]` the item in each place.

        Returns:
            `[B, C]` booleans.
        """
        different, places = torch.unique(ids, return_inverse=True)
        column = torch.full((self.num_items,), -1).scatter_(0, different, torch.arange(len(different)))  # [I]
        first, counts = self.starts[users], self.starts[users + 1] - self.starts[users]
        rows = torch.repeat_interleave(torch.arange(len(users)), counts)  # [P]
        within = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]  # [P]
        columns = column[self.items[first[rows] + within]]  # [P]
        is_here = columns >= 0
        is_liked = torch.zeros(len(users), len(different), dtype=torch.bool)
        is_liked[rows[is_here], columns[is_here]] = True
        return is_liked[:, places]  # [B, C]
