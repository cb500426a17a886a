"""The items that queries are scored against: of the batch, of those before, uniform or hard draws, or all items.

Deliberately does not know towers, scores or losses.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trainer.config import TrainingConfig
from trainer.frequency import StreamingFrequency
from trainer.mining import HardNegatives, ItemIndex, mine

_OF_HARD_NEGATIVES = 1
"""Behind the step in their seed: their draws have nothing to do with the uniform ones."""


@dataclass(frozen=True)
class Candidates:
    """C places, one or several of which hold a query's own positive; all others are its negatives."""

    ids: Tensor
    """`[C]` the item in each place."""
    log_q: Tensor
    """`[C]` log of the probability that a place of this source holds this item."""


@dataclass(frozen=True)
class Memory:
    """The newest M items of the batches before, with the embeddings that they had there.

    Wang et al. 2020, "Cross-batch memory for embedding learning" (XBM): parameters move so slowly that those embeddings
    are still about right, and M negatives more cost no pass of the item tower.
    """

    ids: Tensor
    """`[M]`, the newest first."""
    embeddings: Tensor
    """`[M, D]`, without gradient."""

    def __len__(self) -> int:
        return len(self.ids)

    def after(self, ids: Tensor, embeddings: Tensor, size: int) -> "Memory":
        """With a batch `[B]` and its embeddings `[B, D]` besides; the oldest make room."""
        return Memory(torch.cat([ids, self.ids])[:size], torch.cat([embeddings, self.embeddings])[:size])


class Sources:
    """Where negatives come from, and what they depend on besides the number of the step."""

    def __init__(self, log_q: Tensor, dim: int, options: TrainingConfig) -> None:
        """Before the first step.

        Args:
            log_q: `[I]` log of the probability that a place of a batch holds an item, from exact counts.
            dim: D
            options: Say which sources there are.
        """
        self._log_q = log_q
        self._options = options
        is_streaming = options.logq == "streaming"
        self._frequency = StreamingFrequency(len(log_q), options.logq_rate) if is_streaming else None
        self._memory = Memory(torch.empty(0, dtype=torch.int64), torch.empty(0, dim))
        self._index: ItemIndex | None = None

    def candidates(self, positives: Tensor, epoch: int, step: int) -> tuple[Candidates, Tensor]:
        """The places whose items the tower embeds for the next batch, and the columns `[B]` of its positives.

        Args:
            positives: `[B]` the item of each query.
            epoch: Whole epochs done.
            step: Steps done of this one.
        """
        options, num_items = self._options, len(self._log_q)
        if options.negatives == "all":
            return all_items(num_items), positives
        if self._frequency is not None:
            self._frequency.observe(positives)
        sources = [self._drawn_by_popularity(positives)]
        if options.uniform_negatives:
            sources.append(uniform(num_items, options.uniform_negatives, options.seed, epoch, step))
        return joined(sources), torch.arange(len(positives))

    def log_expected(self, items: Tensor, num_places: int) -> Tensor:
        """`[…]` log of how often items `[…]` are expected in so many places that all queries share."""
        options, num_items = self._options, len(self._log_q)
        popular = self._drawn_by_popularity(items).log_q + math.log(num_places - options.uniform_negatives)
        if not options.uniform_negatives:
            return popular
        return torch.logaddexp(popular, torch.tensor(math.log(options.uniform_negatives / num_items)))

    def remembered(self) -> tuple[Candidates, Tensor]:
        """The places that need no tower, and their embeddings `[M, D]`."""
        return self._drawn_by_popularity(self._memory.ids), self._memory.embeddings

    def remember(self, positives: Tensor, embeddings: Tensor) -> None:
        """Takes in the items of a batch `[B]` and what the tower made of them, `[B, D]`."""
        if self._options.memory:
            self._memory = self._memory.after(positives, embeddings, self._options.memory)

    def is_index_due(self, num_steps: int) -> bool:
        """Whether the items are to be indexed before the next step.

        Args:
            num_steps: Steps done, of all epochs.
        """
        return self._options.hard_negatives > 0 and num_steps % self._options.hard_negatives_every == 0

    def index(self, embeddings: Tensor) -> None:
        """From now on hard negatives are searched among the items as embedded now, `[I, D]`."""
        self._index = ItemIndex(embeddings)

    def hard(
        self,
        queries: Tensor,
        places: Tensor,
        is_liked: Callable[[Tensor, Tensor], Tensor],
        epoch: int,
        step: int,
    ) -> HardNegatives | None:
        """Those of some queries of a batch; None where no hard negatives are asked for, or no query is.

        Args:
            queries: `[Q, D]` of the whole batch.
            places: `[P]` which of them.
            is_liked: Of queries at places `[p]`, which of items `[p, k]` are no negatives of their row's.
            epoch: Whole epochs done.
            step: Steps done of this one.
        """
        if self._index is None or not len(places):
            return None
        first, last = self._options.hard_negatives_ranks
        random = np.random.default_rng([self._options.seed, epoch, step + 1, _OF_HARD_NEGATIVES])
        keys = torch.from_numpy(random.random((len(queries), last - first + 1), dtype=np.float32))
        return mine(
            self._index,
            queries[places],
            lambda some, items: is_liked(places[some], items),
            (first, last),
            keys[places],
            self._options.hard_negatives,
        )

    def state(self) -> dict[str, Tensor]:
        """All that the next step's negatives depend on besides its number."""
        state = {"memory.ids": self._memory.ids, "memory.embeddings": self._memory.embeddings}
        if self._index is not None:
            state["indexed"] = self._index.embeddings
        return state | ({} if self._frequency is None else self._frequency.state())

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from the state of sources with the same options."""
        self._memory = Memory(state["memory.ids"], state["memory.embeddings"])
        if "indexed" in state:
            self.index(state["indexed"])
        if self._frequency is not None:
            self._frequency.restore(state)

    def _drawn_by_popularity(self, items: Tensor) -> Candidates:
        return Candidates(items, self._log_q[items] if self._frequency is None else self._frequency.log_q(items))


def joined(sources: Sequence[Candidates]) -> Candidates:
    """The places of several sources one after the other, each with the q of its own source.

    What stands in any place, divided by its q, is an estimate of the sum over all items, so the mean over all places
    is one too (mixed negatives: Yang et al. 2020, "Mixed negative sampling for learning two-tower neural networks in
    recommendations").
    """
    return Candidates(torch.cat([source.ids for source in sources]), torch.cat([source.log_q for source in sources]))


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
