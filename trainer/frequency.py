"""How often a place of a batch holds each item, learned from the places as they come.

Deliberately does not know users, embeddings or losses, nor how often an item comes in the whole log.
"""

from collections.abc import Mapping

import torch
from torch import Tensor


class StreamingFrequency:
    """The mean gap between two places that hold an item; one over it is the probability that a place does.

    Yi et al. 2019, "Sampling-bias-corrected neural modeling for large corpus item recommendations", algorithm 2: its A
    are the last places, its B the gaps. Here each item has a row of its own, so that no two share a counter, and time
    is counted in places instead of batches, so that an item that each batch holds twice is told from one it holds once.
    """

    def __init__(self, num_items: int, rate: float) -> None:
        """Before the first place all items are taken for equally frequent.

        Args:
            num_items: I
            rate: Of the moving average, above 0 and at most 1: what a gap that has just ended counts for.
        """
        self._rate = rate
        self._num_places = torch.tensor(0)
        self._last_places = torch.zeros(num_items, dtype=torch.int64)
        self._gaps = torch.full((num_items,), float(num_items))

    def observe(self, items: Tensor) -> None:
        """Takes in the next places, as one after the other would be.

        Args:
            items: `[B]` the item in each.
        """
        ordered, order = torch.sort(items, stable=True)
        places = self._num_places + 1 + order  # [B]
        found, of, counts = torch.unique_consecutive(ordered, return_inverse=True, return_counts=True)
        ends = counts.cumsum(0)  # [F]
        is_first = of != torch.cat([of.new_tensor([-1]), of[:-1]])  # [B]
        gaps = places - torch.where(is_first, self._last_places[ordered], places.roll(1))  # [B]
        num_later = ends[of] - 1 - torch.arange(len(items))  # [B] places of the same item that come after
        shares = self._rate * (1 - self._rate) ** num_later  # [B]
        old = self._gaps[found] * (1 - self._rate) ** counts  # [F]
        self._gaps[found] = old.index_add(0, of, shares * gaps)
        self._last_places[found] = places[ends - 1]
        self._num_places = self._num_places + len(items)

    def log_q(self, items: Tensor) -> Tensor:
        """`[C]` log of the probability that a place holds an item, of items `[C]`."""
        return -self._gaps[items].log()

    def state(self) -> dict[str, Tensor]:
        """All that the estimates depend on."""
        return {"num_places": self._num_places, "last_places": self._last_places, "gaps": self._gaps}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from a state, which stays as it is."""
        self._num_places, self._last_places, self._gaps = (state[name].clone() for name in self.state())
