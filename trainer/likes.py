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
    pairs: Tensor
    """`[N]` user times I plus item, rising."""
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
        return cls(torch.searchsorted(pairs, torch.arange(num_users + 1) * num_items), pairs, num_items)

    def among(self, users: Tensor, ids: Tensor) -> Tensor:
        """Which candidates each user is known to like.

        Takes time by what the users like and by the answer's size, never by their product.

        Args:
            users: `[B]`
            ids: `[C]` the item in each place.

        Returns:
            `[B, C]` booleans.
        """
        counts = self.starts[users + 1] - self.starts[users]
        rows = torch.repeat_interleave(torch.arange(len(users)), counts)  # [P]
        within = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]  # [P]
        items = self.pairs[self.starts[users][rows] + within] % self.num_items  # [P]
        return standing(rows, items, ids, len(users), self.num_items)

    def each(self, users: Tensor, ids: Tensor) -> Tensor:
        """Which of candidates of its own each user is known to like.

        Args:
            users: `[B]`
            ids: `[B, H]` items; -1 is nobody's.

        Returns:
            `[B, H]` booleans.
        """
        if not len(self.pairs):
            return torch.zeros_like(ids, dtype=torch.bool)
        pairs = users.unsqueeze(1) * self.num_items + ids
        places = torch.searchsorted(self.pairs, pairs).clamp(max=len(self.pairs) - 1)
        return (self.pairs[places] == pairs) & (ids >= 0)


def standing(rows: Tensor, items: Tensor, ids: Tensor, num_rows: int, num_items: int) -> Tensor:
    """Which candidates hold an item of each row.

    Args:
        rows: `[P]` the row of each pair.
        items: `[P]` its item.
        ids: `[C]` the item in each place.
        num_rows: B
        num_items: I

    Returns:
        `[B, C]` booleans.
    """
    different, places = torch.unique(ids, return_inverse=True)
    columns = torch.full((num_items,), -1).scatter_(0, different, torch.arange(len(different)))[items]  # [P]
    is_here = columns >= 0
    found = torch.zeros(num_rows, len(different), dtype=torch.bool)
    found[rows[is_here], columns[is_here]] = True
    return found[:, places]  # [B, C]
