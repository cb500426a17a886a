"""What evaluation asks: the held-out items of each user, to be found from what the user did before them.

Deliberately does not know who answers, nor how answers are judged.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.data import InteractionLog


@dataclass(frozen=True)
class ItemLists:
    """A list of items for each of Q queries, as stretches of one array: histories cost no memory of their own."""

    items: NDArray[np.int64]
    starts: NDArray[np.int64]
    """`[Q]` where each list begins in `items`."""
    stops: NDArray[np.int64]
    """`[Q]` where it ends."""

    def __len__(self) -> int:
        return len(self.starts)

    def pairs(self, start: int = 0, stop: int | None = None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """All entries of the lists from start to stop: the list of each, counted from start, and its item, `[P]`."""
        starts, lengths = self.starts[start:stop], (self.stops - self.starts)[start:stop]
        lists = np.repeat(np.arange(len(starts)), lengths)
        within = np.arange(len(lists)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return lists, self.items[starts[lists] + within]


@dataclass(frozen=True)
class Questions:
    """Q queries, one for each user with held-out items."""

    positions: NDArray[np.int64]
    """`[Q]` positions in the log: of each user's first held-out interaction. What is before it is known."""
    targets: ItemLists
    """The items to be found, each once."""
    excluded: ItemLists
    """Items that leave the ranking, targets aside."""


def item_lists(lists: Sequence[Sequence[int]]) -> ItemLists:
    """Lists of items as one array."""
    stops = np.cumsum([len(items) for items in lists], dtype=np.int64)
    items = np.array([item for items in lists for item in items], dtype=np.int64)
    return ItemLists(items, np.concatenate(([0], stops[:-1])).astype(np.int64), stops)


def ask(log: InteractionLog, held_out: NDArray[np.int64], exclude_seen: bool) -> Questions:
    """Questions about held-out interactions.

    Args:
        log: All interactions.
        held_out: Rising positions in it; of a user, none but the newest.
        exclude_seen: Whether items of the user's history leave the ranking.
    """
    is_first = np.diff(log.users[held_out], prepend=-1) != 0
    positions = held_out[is_first]
    # Sorted by query, then item; each pair once.
    pairs = np.unique(np.stack([np.cumsum(is_first) - 1, log.items[held_out]], axis=1), axis=0)
    counts = np.bincount(pairs[:, 0], minlength=len(positions))
    stops = np.cumsum(counts)
    targets = ItemLists(pairs[:, 1], stops - counts, stops)
    histories = ItemLists(log.items, log.starts[positions], positions if exclude_seen else log.starts[positions])
    return Questions(positions, targets, histories)
