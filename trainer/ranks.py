"""Processes that train one model together: who takes what part of a batch, and what all of them need of it.

Deliberately does not know towers, losses or files. torchrun starts the processes and torch.distributed connects them:
by gloo for what lies in the memory of CPUs, by NCCL for what lies in that of GPUs.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn

from trainer.caching import Embed, Embedded
from trainer.tables import sparse, summed_rows


@dataclass(frozen=True)
class Ranks:
    """One of the processes; alone, it is the first of one, and nothing is sent to anyone."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether it is the one that validates, saves, publishes and speaks."""
        return self.rank == 0

    def share(self, rows: Tensor) -> Tensor:
        """Its part of some rows; where there are fewer rows than processes, a row that is another's.

        No tower takes an empty batch, and all must run, for all wait for the gradients of all.
        """
        own = torch.tensor_split(rows, self.size)[self.rank]
        return own if len(own) else rows[:1]

    def gathered(self, part: Tensor, sizes: Sequence[int]) -> Tensor:
        """The parts of all processes, one after the other.

        Args:
            part: `[n, …]` its own; what is more than its size is left out.
            sizes: Of each process's part.
        """
        if self.size == 1:
            return part
        padded = part.new_zeros(max(sizes), *part.shape[1:])
        padded[: sizes[self.rank]] = part[: sizes[self.rank]]
        parts = [torch.empty_like(padded) for _ in sizes]
        distributed.all_gather(parts, padded)
        return torch.cat([whole[:size] for whole, size in zip(parts, sizes, strict=True)])

    def summed(self, values: Tensor) -> Tensor:
        """The sum of what each process has."""
        if self.size > 1:
            distributed.all_reduce(values)
        return values

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Gives all processes the sum of their gradients; one that has none of a parameter adds nothing.

        Sparse ones are those of tables, of which each process has one, since each runs both towers.
        """
        if self.size > 1:
            for parameter in parameters:
                if not parameter.requires_grad:
                    continue
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self._rows_summed(gradient) if gradient.is_sparse else self.summed(gradient)

    def _rows_summed(self, gradient: Tensor) -> Tensor:
        """The same of a sparse gradient of which each process has other rows."""
        rows, values = summed_rows(gradient)
        sizes = torch.zeros(self.size, dtype=torch.int64)
        sizes[self.rank] = len(rows)
        all_sizes = self.summed(sizes).tolist()
        return sparse(self.gathered(rows, all_sizes), self.gathered(values, all_sizes), gradient.shape)

    def is_any(self, is_so: bool) -> bool:
        """Whether it is so in any process."""
        return bool(self.summed(torch.tensor(int(is_so))))

    def first_says(self, figure: float | None) -> float | None:
        """The first process's figure; others give None."""
        if self.size == 1:
            return figure
        said = torch.tensor([torch.nan if figure is None else figure], dtype=torch.float64)
        distributed.broadcast(said, src=0)
        return None if said.isnan() else said.item()

    def wait(self) -> None:
        """Until all processes are here."""
        self.summed(torch.zeros(1))


ALONE = Ranks()


@contextmanager
def joined() -> Iterator[Ranks]:
    """Connects with the other processes that torchrun started; without torchrun there are none."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    distributed.init_process_group()
    try:
        yield Ranks(distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()


class Everywhere:
    """Embeddings that each process makes a part of, all of them in each."""

    def __init__(
        self, embed: Embed, rows: Tensor, count: Callable[[Tensor], int], chunk_size: int | None, ranks: Ranks
    ) -> None:
        """Embeds its own part, and gets the others'.

        Args:
            embed: The tower.
            rows: `[R]` of all processes.
            count: How many embeddings some of the rows have.
            chunk_size: See `Embedded`.
            ranks: The processes.
        """
        self._ranks = ranks
        self._sizes = [count(share) for share in torch.tensor_split(rows, ranks.size)]
        self._own = Embedded(embed, ranks.share(rows), chunk_size)
        self.embeddings = ranks.gathered(self._own.embeddings.detach(), self._sizes).requires_grad_()
        """`[C, D]` a leaf, which gathers the gradients of all that is made of it here."""
        first = sum(self._sizes[: ranks.rank])
        self.own = torch.arange(first, first + self._sizes[ranks.rank])
        """`[n]` which of them are its own."""

    def backward(self) -> None:
        """Takes into the tower the gradients that its own embeddings have by now in any process."""
        gradients = torch.zeros_like(self.embeddings) if self.embeddings.grad is None else self.embeddings.grad
        own = self._own.embeddings
        # Of a row that is another's there is none.
        own.grad = torch.zeros_like(own)
        own.grad[: len(self.own)] = self._ranks.summed(gradients)[self.own]
        self._own.backward()
