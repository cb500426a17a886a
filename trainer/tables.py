"""Embedding tables: rows, and means of rows, whose gradients cost what a batch reads of a table.

Deliberately does not know features, towers or optimisers.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional


class Table(nn.Embedding):
    """An embedding table, whose gradient is a sparse tensor where `sparse` says so, and a dense one else.

    Both are made by sorting what the batch reads: a hot row's gradient is summed in one place, and nothing of the size
    of all entries `[B, L, E]` is ever written. While a tower is exported, tables are plain gathers.
    """

    def forward(self, ids: Tensor) -> Tensor:
        """Rows.

        Args:
            ids: `[…]`

        Returns:
            `[…, E]`
        """
        if torch.compiler.is_exporting():
            return super().forward(ids)
        rows: Tensor = _Rows.apply(self.weight, ids, self.sparse)  # type: ignore[no-untyped-call]
        return rows

    def mean(self, ids: Tensor) -> Tensor:
        """The mean of the rows of each list; zero where there is none.

        Args:
            ids: `[B, L]`, 0 where there is no entry.

        Returns:
            `[B, E]`
        """
        shares = _shares(ids, self.weight.dtype)
        if torch.compiler.is_exporting():
            # ONNX Runtime runs a gather faster than an EmbeddingBag.
            return (super().forward(ids) * shares.unsqueeze(-1)).sum(dim=1)
        means: Tensor = _Means.apply(self.weight, ids, shares, self.sparse)  # type: ignore[no-untyped-call]
        return means


def _shares(ids: Tensor, dtype: torch.dtype) -> Tensor:
    """`[B, L]` what each entry counts for in the mean of its list."""
    is_present = (ids != 0).to(dtype)
    return is_present / is_present.sum(dim=1, keepdim=True).clamp(min=1.0)


class _Rows(torch.autograd.Function):
    """Rows of a table."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor, is_sparse: bool) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shape, ctx.is_sparse = table.shape, is_sparse
        return functional.embedding(ids, table)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradients: Tensor) -> tuple[Tensor, None, None]:
        [ids] = ctx.saved_tensors
        flat = ids.flatten()
        bags = torch.arange(len(flat))
        return _gradient(flat, bags, gradients.reshape(len(flat), -1), ctx.shape, ctx.is_sparse), None, None


class _Means(torch.autograd.Function):
    """Weighted means of rows of a table, by weights that are all alike within a list, and 0 where there is no entry."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor, shares: Tensor, is_sparse: bool) -> Tensor:
        ctx.save_for_backward(ids, shares)
        ctx.shape, ctx.is_sparse = table.shape, is_sparse
        return functional.embedding_bag(ids.long(), table, per_sample_weights=shares, mode="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradients: Tensor) -> tuple[Tensor, None, None, None]:
        ids, shares = ctx.saved_tensors
        bags, places = (ids != 0).nonzero(as_tuple=True)
        of_entries = gradients * shares.amax(dim=1, keepdim=True)  # [B, E]
        return _gradient(ids[bags, places], bags, of_entries, ctx.shape, ctx.is_sparse), None, None, None


def summed_rows(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """A sparse gradient `[R, E]` of a table as rows `[U]`, each once and rising, and what each has, `[U, E]`."""
    [rows], values = gradient._indices(), gradient._values()
    return _sums(rows, torch.arange(len(rows)), values)


def sparse(rows: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    """The gradient `[R, E]` of a table that has values `[n, E]` at rows `[n]`, some of which may be the same."""
    return torch.sparse_coo_tensor(rows.unsqueeze(0), values, shape, check_invariants=False)


def _gradient(ids: Tensor, bags: Tensor, gradients: Tensor, shape: torch.Size, is_sparse: bool) -> Tensor:
    """The gradient of a table `[R, E]`: for each row that was read, the sum over the bags that read it.

    Args:
        ids: `[n]` rows that were read.
        bags: `[n]` by which bag.
        gradients: `[G, E]` of each entry of a bag.
        shape: R, E.
        is_sparse: Whether rows that were not read are left out.
    """
    rows, sums = _sums(ids, bags, gradients)
    return sparse(rows, sums, shape) if is_sparse else gradients.new_zeros(shape).index_copy_(0, rows, sums)


def _sums(ids: Tensor, bags: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The different ids `[U]`, rising, and for each the sum `[U, E]` of the values of its bags.

    Sums over bags are what torch has a fast kernel for; all that is left to do is to sort.

    Args:
        ids: `[n]`
        bags: `[n]` the bag that each id is in.
        values: `[G, E]` of each bag.
    """
    # Both numbers in one, because NumPy sorts values several times faster than torch sorts them with their places.
    shift = len(values).bit_length()
    keys = torch.from_numpy(np.sort((ids.long() << shift | bags).numpy()))
    different, counts = torch.unique_consecutive(keys >> shift, return_counts=True)  # [U]
    starts = counts.cumsum(0) - counts
    return different, functional.embedding_bag(keys & ((1 << shift) - 1), values, starts, mode="sum")
