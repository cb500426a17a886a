import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trainer import losses

SCORES = torch.tensor([[2.0, 1.0, 0.0], [0.5, 1.5, -1.0], [0.0, 0.0, 1.0]])


def naive_loss(
    queries: list[list[float]],
    items: list[list[float]],
    log_q: list[float],
    positives: list[int],
    is_liked: list[list[bool]],
    temperature: float,
    margin: float | None,
) -> float:
    total = 0.0
    for i, query in enumerate(queries):
        scores = [sum(a * b for a, b in zip(query, item, strict=True)) for item in items]
        own = positives[i]
        logits = {}
        for j, score in enumerate(scores):
            is_above = margin is not None and score > scores[own] + margin
            if j == own or not (is_liked[i][j] or is_above):
                logits[j] = score / temperature - log_q[j]
        total += math.log(sum(math.exp(logit - logits[own]) for logit in logits.values()))
    return total / len(queries)


def test_cross_entropy_by_hand() -> None:
    rows = [
        -2.0 + math.log(math.exp(2) + math.exp(1) + 1),
        -0.5 + math.log(math.exp(0.5) + math.exp(1.5) + math.exp(-1)),
        -1.0 + math.log(2 + math.exp(1)),
    ]
    loss = losses.cross_entropy(SCORES, torch.tensor([0, 0, 2]))
    assert loss.item() == pytest.approx(sum(rows) / 3, abs=1e-6)


def test_weights_multiply_the_loss_of_their_rows() -> None:
    positives = torch.tensor([0, 0, 2])
    rows = [losses.cross_entropy(SCORES, positives, torch.eye(3)[i]).item() * 3 for i in range(3)]
    assert sum(rows) / 3 == pytest.approx(losses.cross_entropy(SCORES, positives).item(), abs=1e-6)
    weighted = losses.cross_entropy(SCORES, positives, torch.tensor([0.5, 0.0, 4.0])).item()
    assert weighted == pytest.approx((0.5 * rows[0] + 4 * rows[2]) / 3, abs=1e-6)


def test_temperature_divides() -> None:
    assert torch.equal(losses.scaled(SCORES, 0.5), SCORES * 2)


def test_a_fixed_temperature_has_no_gradient_and_a_learned_one_keeps_above_its_limit() -> None:
    assert not losses.Temperature(0.2, is_learned=False)().requires_grad
    learned = losses.Temperature(0.2, is_learned=True)
    assert learned().item() == pytest.approx(0.2)
    learned().backward()
    assert learned.log.grad is not None
    assert learned.log.grad.item() == pytest.approx(0.2)
    with torch.no_grad():
        learned.log -= 10
    learned.keep_in_range()
    assert learned().item() == pytest.approx(0.01)


def test_accidental_hits_are_masked_and_positives_are_not() -> None:
    items = torch.tensor([7, 8, 7])
    hits = losses.accidental_hits(items, items)
    masked = losses.masked(SCORES, losses.false_negatives(hits, torch.arange(3)))
    infinity = math.inf
    assert masked.tolist() == [[2.0, 1.0, -infinity], [0.5, 1.5, -1.0], [-infinity, 0.0, 1.0]]


def test_negatives_far_above_the_positive_are_probably_liked() -> None:
    scores = torch.tensor([[0.5, 0.61, 0.4], [0.9, 0.0, 0.05]])
    positives = torch.tensor([0, 1])
    assert losses.above_margin(scores, positives, 0.1).tolist() == [[False, True, False], [True, False, False]]
    assert losses.above_margin(scores, positives, -0.2).tolist() == [[True, True, True], [True, True, True]]


@given(seed=st.integers(0, 10_000), size=st.integers(1, 12), margin=st.sampled_from([None, -2.0, 0.0]))
def test_the_positive_is_never_masked(seed: int, size: int, margin: float | None) -> None:
    """Whatever is liked, whatever the margin: with all else masked the loss is zero, never infinite."""
    generator = torch.Generator().manual_seed(seed)
    queries, items = torch.randn(size, 3, generator=generator), torch.randn(size + 4, 3, generator=generator)
    positives = torch.randint(size + 4, (size,), generator=generator)
    everything = torch.ones(size, size + 4, dtype=torch.bool)
    own = losses.OwnNegatives(
        torch.randn(size, 2, 3, generator=generator), torch.zeros(size, 2), torch.ones(size, 2, dtype=torch.bool)
    )
    for negatives in (None, own):
        loss = losses.softmax_loss(
            queries, items, torch.zeros(size + 4), positives, everything, 0.1, margin, own=negatives
        )
        assert loss.item() == 0.0


@given(
    seed=st.integers(0, 10_000),
    size=st.integers(1, 9),
    num_candidates=st.integers(1, 12),
    temperature=st.floats(0.2, 2.0),
    margin=st.sampled_from([None, 0.3, -0.3]),
)
def test_the_whole_loss_equals_a_naive_loop(
    seed: int, size: int, num_candidates: int, temperature: float, margin: float | None
) -> None:
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(size, 3, generator=generator)
    items = torch.randn(num_candidates, 3, generator=generator)
    log_q = torch.randn(num_candidates, generator=generator)
    positives = torch.randint(num_candidates, (size,), generator=generator)
    is_liked = torch.rand(size, num_candidates, generator=generator) < 0.3
    loss = losses.softmax_loss(queries, items, log_q, positives, is_liked, temperature, margin)
    naive = naive_loss(
        queries.tolist(), items.tolist(), log_q.tolist(), positives.tolist(), is_liked.tolist(), temperature, margin
    )
    assert loss.item() == pytest.approx(naive, rel=1e-4, abs=1e-5)


@given(seed=st.integers(0, 10_000), size=st.integers(1, 9), num_queries=st.integers(1, 4))
def test_positives_that_share_a_query_lose_what_each_would_lose_alone(seed: int, size: int, num_queries: int) -> None:
    """Where every item is a candidate once, positives and negatives have the same correction: none."""
    generator = torch.Generator().manual_seed(seed)
    queries, items = torch.randn(num_queries, 3, generator=generator), torch.randn(12, 3, generator=generator)
    askers = torch.randint(num_queries, (size,), generator=generator)
    positives = torch.randint(12, (size,), generator=generator)
    is_liked = torch.rand(num_queries, 12, generator=generator) < 0.3
    is_liked[askers, positives] = True
    weights = torch.rand(size, generator=generator)
    alone = losses.softmax_loss(
        queries[askers], items, torch.zeros(12), positives, is_liked[askers], 0.5, weights=weights
    )
    shared = losses.shared_softmax_loss(
        queries, items, torch.zeros(12), askers, positives, is_liked, 0.5, weights=weights
    )
    assert shared.item() == pytest.approx(alone.item(), rel=1e-5)


@given(
    seed=st.integers(0, 10_000),
    size=st.integers(1, 6),
    num_own=st.integers(1, 4),
    margin=st.sampled_from([None, 0.3, -0.3]),
)
def test_negatives_of_a_row_alone_are_columns_that_no_other_row_has(
    seed: int, size: int, num_own: int, margin: float | None
) -> None:
    """Also of queries that several positives share, with and without a margin, some missing."""
    generator = torch.Generator().manual_seed(seed)
    queries, items = torch.randn(size, 3, generator=generator), torch.randn(5, 3, generator=generator)
    own_embeddings = torch.randn(size, num_own, 3, generator=generator)
    log_q, own_log_q = torch.randn(5, generator=generator), torch.randn(size, num_own, generator=generator)
    is_missing = torch.rand(size, num_own, generator=generator) < 0.3
    is_liked = torch.rand(size, 5, generator=generator) < 0.3
    positives = torch.randint(5, (size,), generator=generator)
    own = losses.OwnNegatives(own_embeddings, own_log_q, is_missing)
    loss = losses.softmax_loss(queries, items, log_q, positives, is_liked, 0.5, margin, own=own)
    naive = [
        naive_loss(
            queries[[row]].tolist(),
            torch.cat([items, own_embeddings[row]]).tolist(),
            torch.cat([log_q, own_log_q[row]]).tolist(),
            positives[[row]].tolist(),
            torch.cat([is_liked, is_missing], dim=1)[[row]].tolist(),
            0.5,
            margin,
        )
        for row in range(size)
    ]
    assert loss.item() == pytest.approx(sum(naive) / size, rel=1e-4, abs=1e-5)
    if margin is None:
        is_liked[torch.arange(size), positives] = True
        shared = losses.shared_softmax_loss(
            queries, items, torch.zeros(5), torch.arange(size), positives, is_liked, 0.5, own=own
        )
        alone = losses.softmax_loss(queries, items, torch.zeros(5), positives, is_liked, 0.5, own=own)
        assert shared.item() == pytest.approx(alone.item(), rel=1e-4)


@pytest.mark.parametrize("is_shared", [False, True])
def test_items_are_pushed_for_remembered_places_too(is_shared: bool) -> None:
    """What is remembered are the places of the batch once more, so that it is known what they would have given."""
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(6, 3, generator=generator)
    items = torch.randn(6, 3, generator=generator, requires_grad=True)
    places, log_q = torch.arange(6), torch.randn(6, generator=generator).repeat(2)
    is_liked = (torch.rand(6, 6, generator=generator) < 0.2).fill_diagonal_(True).repeat(1, 2)

    def loss_and_gradient(remembered: Tensor, push: float) -> tuple[float, Tensor]:
        columns = torch.cat([items, remembered])
        if is_shared:
            loss = losses.shared_softmax_loss(queries, columns, log_q, places, places, is_liked, 0.5, push=push)
        else:
            loss = losses.softmax_loss(queries, columns, log_q, places, is_liked, 0.5, push=push)
        return loss.item(), torch.autograd.grad(loss, items)[0]

    full, expected = loss_and_gradient(items, 1.0)
    balanced, gradient = loss_and_gradient(items.detach(), 2.0)
    assert balanced == pytest.approx(full, rel=1e-6)
    torch.testing.assert_close(gradient, expected)
    unbalanced, gradient = loss_and_gradient(items.detach(), 1.0)
    assert unbalanced == pytest.approx(full, rel=1e-6)
    assert (gradient - expected).abs().max() > 0.01


def test_negatives_of_a_shared_query_count_as_often_as_they_are_expected() -> None:
    """A negative that the places hold twice on average counts half in each; the positive is there once."""
    queries, items = torch.eye(2)[:1], torch.tensor([[0.5, 0.0], [0.2, 0.0], [0.2, 0.0]])
    loss = losses.shared_softmax_loss(
        queries,
        items,
        torch.tensor([0.7, math.log(2), math.log(2)]),
        torch.tensor([0]),
        torch.tensor([0]),
        torch.tensor([[True, False, False]]),
        0.1,
    )
    assert loss.item() == pytest.approx(math.log(1 + math.exp(2 - 5)))


def test_a_shared_query_that_likes_all_candidates_stays_finite() -> None:
    queries = torch.ones(1, 2, requires_grad=True)
    one = torch.tensor([0])
    loss = losses.shared_softmax_loss(
        queries, torch.ones(1, 2), torch.zeros(1), one, one, torch.tensor([[True]]), torch.tensor(0.05)
    )
    loss.backward()
    assert loss.item() == 0.0
    assert queries.grad is not None
    assert torch.equal(queries.grad, torch.zeros(1, 2))


@pytest.mark.parametrize("log_q", [0.0, -1.5])
def test_a_batch_of_one_item_only_has_nothing_to_learn_and_stays_finite(log_q: float) -> None:
    queries = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    items = torch.full((5,), 3)
    loss = losses.softmax_loss(
        queries,
        queries.detach(),
        torch.full((5,), log_q),
        torch.arange(5),
        losses.accidental_hits(items, items),
        torch.tensor(0.05),
        0.1,
    )
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
    queries, items = torch.ones(len(batch), 1), item_scores[batch].unsqueeze(1)  # One dimension: the score.
    nothing_liked = torch.zeros(len(batch), len(batch), dtype=torch.bool)
    losses.softmax_loss(queries, items, log_q, torch.arange(len(batch)), nothing_liked, 1.0).backward()
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

    assert distance(log_q) < 1e-4
    assert distance(torch.zeros_like(log_q)) > 0.5
    assert distance(-log_q) > 0.5


def test_logq_gives_the_log_sum_of_the_full_softmax() -> None:
    """The value too, up to log B: the batch's sum estimates the sum over all items."""
    scores, batch, log_q = skewed_batch()
    estimate = (scores[batch] - log_q).logsumexp(dim=0) - math.log(len(batch))
    assert estimate.item() == pytest.approx(scores.logsumexp(dim=0).item(), abs=1e-4)
