import pytest
import torch
from torch import Tensor, nn

from trainer.tables import Table, summed_rows

IDS = torch.tensor([[3, 1, 3, 0], [0, 0, 0, 0], [5, 0, 0, 0], [1, 2, 3, 6]])
"""Repeated within a list and between lists, an empty list, and row 4 in none."""


def table(is_sparse: bool) -> Table:
    torch.manual_seed(0)
    made = Table(7, 3)
    made.sparse = is_sparse
    return made


def naive_mean(weight: Tensor, ids: Tensor) -> Tensor:
    """List by list."""
    means = []
    for row in ids:
        present = [weight[place] for place in row.tolist() if place != 0]
        means.append(sum(present, torch.zeros(weight.shape[1])) / max(1, len(present)))
    return torch.stack(means)


def gradients(found: Tensor, weight: Tensor) -> Tensor:
    """Of a loss that each entry has another part in."""
    torch.manual_seed(1)
    (found * torch.randn(found.shape)).sum().backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    return weight.grad


@pytest.mark.parametrize("is_sparse", [False, True])
def test_means_and_their_gradients_are_those_of_a_naive_loop(is_sparse: bool) -> None:
    own, expected = table(is_sparse), nn.Parameter(table(is_sparse).weight.detach().clone())
    means, naive = own.mean(IDS), naive_mean(expected, IDS)
    torch.testing.assert_close(means, naive)
    gradient = gradients(means, own.weight)
    assert gradient.is_sparse == is_sparse
    torch.testing.assert_close(gradient.to_dense() if is_sparse else gradient, gradients(naive, expected))


@pytest.mark.parametrize("is_sparse", [False, True])
@pytest.mark.parametrize("ids", [IDS, IDS[:, 0], IDS[:, 0].int()])
def test_rows_and_their_gradients_are_those_of_an_embedding(is_sparse: bool, ids: Tensor) -> None:
    own, embedding = table(is_sparse), nn.Embedding(7, 3)
    embedding.weight.data.copy_(own.weight)
    torch.testing.assert_close(own(ids), embedding(ids), rtol=0, atol=0)
    gradient = gradients(own(ids), own.weight)
    assert gradient.is_sparse == is_sparse
    expected = gradients(embedding(ids), embedding.weight)
    torch.testing.assert_close(gradient.to_dense() if is_sparse else gradient, expected)


def test_a_sparse_gradient_holds_the_rows_that_were_read_once_each() -> None:
    own = table(is_sparse=True)
    (own.mean(IDS).sum() + own(torch.tensor([2, 5, 5])).sum()).backward()  # type: ignore[no-untyped-call]
    assert own.weight.grad is not None
    rows, values = summed_rows(own.weight.grad)
    assert rows.tolist() == [1, 2, 3, 5, 6]
    torch.testing.assert_close(values, own.weight.grad.to_dense()[rows])


@pytest.mark.parametrize("is_sparse", [False, True])
def test_lists_without_an_entry_give_no_gradient(is_sparse: bool) -> None:
    own = table(is_sparse)
    means = own.mean(torch.zeros(2, 4, dtype=torch.int64))
    assert not means.any()
    gradient = gradients(means, own.weight)
    assert not (gradient.to_dense() if is_sparse else gradient).any()


def test_the_gradient_is_the_same_whatever_the_number_of_threads() -> None:
    found = []
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        own = Table(1000, 16)
        nn.init.ones_(own.weight)
        ids = torch.randint(0, 1000, (256, 50), generator=torch.Generator().manual_seed(0))
        found.append(gradients(own.mean(ids), own.weight))
    torch.set_num_threads(1)
    assert torch.equal(*found)
