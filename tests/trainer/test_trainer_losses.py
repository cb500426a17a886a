import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trainer import losses

SCORES = torch.tensor([[2.0, 1.0, 0.0], [0.5, 1.5, -1.0], [0.0, 0.0, 1.0]])


def naive_loss(
    queries: list[list[float]], items: list[list[float]], ids: list[int], log_q: list[float] | None, temperature: float
) -> float:
    total = 0.0
    for i, query in enumerate(queries):
        logits = []
        for j, item in enumerate(items):
            if j != i and ids[j] == ids[i]:
                continue
            score = sum(a * b for a, b in zip(query, item, strict=True)) / temperature
            logits.append(score - (log_q[j] if log_q is not None else 0.0))
            if j == i:
                positive = logits[-1]
        total += math.log(sum(math.exp(logit - positive) for logit in logits))
    return total / len(queries)


def test_cross_entropy_by_hand() -> None:
    rows = [
        -2.0 + math.log(math.exp(2) + math.exp(1) + 1),
        -1.5 + math.log(math.exp(0.5) + math.exp(1.5) + math.exp(-1)),
        -1.0 + math.log(2 + math.exp(1)),
    ]
    assert losses.cross_entropy(SCORES).item() == pytest.approx(sum(rows) / 3, abs=1e-6)


def test_temperature_divides() -> None:
    assert torch.equal(losses.scaled(SCORES, 0.5), SCORES * 2)


def test_logq_is_subtracted_from_the_columns() -> None:
    log_q = torch.tensor([-1.0, -2.0, -3.0])
    assert losses.logq_corrected(SCORES, log_q).tolist() == [[3.0, 3.0, 3.0], [1.5, 3.5, 2.0], [1.0, 2.0, 4.0]]


def test_accidental_hits_are_masked_and_positives_are_not() -> None:
    masked = losses.accidental_hits_masked(SCORES, torch.tensor([7, 8, 7]))
    infinity = math.inf
    assert masked.tolist() == [[2.0, 1.0, -infinity], [0.5, 1.5, -1.0], [-infinity, 0.0, 1.0]]


@given(ids=st.lists(st.integers(0, 5), min_size=1, max_size=12))
def test_the_positive_is_never_masked_and_every_accidental_hit_is(ids: list[int]) -> None:
    masked = losses.accidental_hits_masked(torch.zeros(len(ids), len(ids)), torch.tensor(ids))
    for i, row_id in enumerate(ids):
        for j, column_id in enumerate(ids):
            assert (masked[i, j].item() == -math.inf) == (i != j and row_id == column_id)


@given(
    seed=st.integers(0, 10_000),
    size=st.integers(1, 9),
    num_items=st.integers(1, 6),
    is_corrected=st.booleans(),
    temperature=st.floats(0.2, 2.0),
)
def test_the_whole_loss_equals_a_naive_loop(
    seed: int, size: int, num_items: int, is_corrected: bool, temperature: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(size, 3, generator=generator)
    items = torch.randn(size, 3, generator=generator)
    ids = torch.randint(num_items, (size,), generator=generator)
    log_q = torch.randn(size, generator=generator) if is_corrected else None
    loss = losses.in_batch_softmax(queries, items, ids, log_q, temperature)
    naive = naive_loss(
        queries.tolist(), items.tolist(), ids.tolist(), None if log_q is None else log_q.tolist(), temperature
    )
    assert loss.item() == pytest.approx(naive, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("log_q", [None, torch.full((5,), -1.5)])
def test_a_batch_of_one_item_only_has_nothing_to_learn_and_stays_finite(log_q: Tensor | None) -> None:
    queries = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = losses.in_batch_softmax(queries, queries.detach(), torch.full((5,), 3), log_q, 0.05)
    loss.backward()
    assert loss.item() == 0.0
    assert queries.grad is not None
    assert torch.equal(queries.grad, torch.zeros(5, 4))


def test_sampling_probabilities_are_shares_of_the_counts() -> None:
    log_q = losses.log_sampling_probabilities(torch.tensor([1, 3, 0, 4]))
    assert log_q.exp().tolist() == pytest.approx([0.125, 0.375, 0.0, 0.5])


COUNTS = (900 / torch.arange(1, 31)).long()
"""A skewed popularity: 900 interactions with the first item, 30 with the last."""


def skewed_batch() -> tuple[Tensor, Tensor, Tensor]:
    """A batch that holds each item exactly as often as popularity says, so that nothing is left to chance.

    Returns:
        Score of each item `[N]`, the items of the batch `[B]`, and log q of each place's item `[B]`.
    """
    scores = torch.randn(len(COUNTS), generator=torch.Generator().manual_seed(0))
    batch = torch.repeat_interleave(torch.arange(len(COUNTS)), COUNTS)
    return scores, batch, losses.log_sampling_probabilities(COUNTS)[batch]


def gradient_of_item_scores(scores: Tensor, batch: Tensor, log_q: Tensor) -> Tensor:
    """Gradient `[N]` of the in-batch loss by the score of each item, all queries being alike."""
    item_scores = scores.clone().requires_grad_()
    matrix = item_scores[batch].expand(len(batch), -1)  # [B, B]
    losses.cross_entropy(losses.logq_corrected(matrix, log_q)).backward()
    assert item_scores.grad is not None
    return item_scores.grad


def test_logq_with_the_right_sign_gives_the_gradient_of_the_full_softmax_and_nothing_else_does() -> None:
    scores, batch, log_q = skewed_batch()
    full = scores.clone().requires_grad_()
    losses_of_all_items = -torch.log_softmax(full, dim=0)
    losses_of_all_items[batch].mean().backward()
    assert full.grad is not None

    def distance(columns: Tensor) -> float:
        return float((gradient_of_item_scores(scores, batch, columns) - full.grad).abs().sum())

    assert distance(log_q) < 1e-5
    assert distance(torch.zeros_like(log_q)) > 0.5
    assert distance(-log_q) > 0.5


def test_logq_gives_the_log_sum_of_the_full_softmax() -> None:
    """The value too, up to log B: the batch's sum estimates the sum over all items."""
    scores, batch, log_q = skewed_batch()
    corrected = losses.logq_corrected(scores[batch].unsqueeze(0), log_q)
    estimate = corrected.logsumexp(dim=1) - math.log(len(batch))
    assert estimate.item() == pytest.approx(scores.logsumexp(dim=0).item(), abs=1e-4)
