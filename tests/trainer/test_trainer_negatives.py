import math

import pytest
import torch
from torch import Tensor

from trainer import losses, negatives
from trainer.config import TrainingConfig

COUNTS = (900 / torch.arange(1, 31)).long()
"""A skewed popularity: 900 interactions with the first item, 30 with the last."""


def test_sources_keep_their_own_q() -> None:
    log_q = losses.log_sampling_probabilities(torch.tensor([1, 3, 0, 4]))
    positives = torch.tensor([3, 0])
    sources = negatives.Sources(log_q, 2, TrainingConfig(uniform_negatives=3))
    candidates, columns = sources.candidates(positives, 0, 0)
    assert candidates.ids[:2].tolist() == [3, 0]
    assert columns.tolist() == [0, 1]
    assert candidates.log_q.exp().tolist() == pytest.approx([0.5, 0.125, 0.25, 0.25, 0.25])


def test_streaming_q_is_that_of_the_batches_so_far() -> None:
    options = TrainingConfig(logq="streaming", logq_rate=0.5)
    sources = negatives.Sources(losses.log_sampling_probabilities(torch.tensor([1, 1, 1, 1])), 2, options)
    candidates, _ = sources.candidates(torch.tensor([3, 0]), 0, 0)
    # Gaps of 1 and 2 places, averaged with the 4 that all items start from.
    assert (1 / candidates.log_q.exp()).tolist() == pytest.approx([2.5, 3.0])
    candidates, _ = sources.candidates(torch.tensor([0]), 0, 1)
    assert (1 / candidates.log_q.exp()).tolist() == pytest.approx([2.0])


def test_the_memory_holds_the_newest_items_of_the_batches_before() -> None:
    log_q = losses.log_sampling_probabilities(torch.tensor([1, 3, 0, 4]))
    sources = negatives.Sources(log_q, 2, TrainingConfig(memory=3))
    assert len(sources.remembered()[0].ids) == 0
    for batch in ([0, 1], [3, 3]):
        items = torch.tensor(batch)
        sources.remember(items, torch.stack([items, items * 10], dim=1).float())
    remembered, embeddings = sources.remembered()
    assert remembered.ids.tolist() == [3, 3, 0]
    assert remembered.log_q.exp().tolist() == pytest.approx([0.5, 0.5, 0.125])
    assert embeddings.tolist() == [[3.0, 30.0], [3.0, 30.0], [0.0, 0.0]]


def test_uniform_draws_are_those_of_the_step_and_even() -> None:
    drawn = negatives.uniform(10, 10_000, 1, 2, 3).ids
    assert torch.equal(drawn, negatives.uniform(10, 10_000, 1, 2, 3).ids)
    for other in ((0, 2, 3), (1, 0, 3), (1, 2, 0)):
        assert not torch.equal(drawn, negatives.uniform(10, 10_000, *other).ids)
    assert torch.bincount(drawn).tolist() == pytest.approx([1000] * 10, rel=0.2)


def sum_over_all(scores: Tensor, candidates: negatives.Candidates) -> float:
    """The estimate of the log of the sum over all items, of one query."""
    corrected = scores[candidates.ids] - candidates.log_q
    return corrected.logsumexp(dim=0).item() - math.log(len(candidates.ids))


def test_mixed_negatives_estimate_the_full_softmax_and_a_wrong_q_does_not() -> None:
    """Popular places as often as popularity says, uniform ones evenly, so that nothing is left to chance."""
    scores = torch.randn(len(COUNTS), generator=torch.Generator().manual_seed(0))
    places = torch.repeat_interleave(torch.arange(len(COUNTS)), COUNTS)
    sources = negatives.Sources(losses.log_sampling_probabilities(COUNTS), 2, TrainingConfig())
    popular, _ = sources.candidates(places, 0, 0)
    uniform = negatives.joined([negatives.all_items(len(COUNTS))] * 50)
    full = scores.logsumexp(dim=0).item()
    assert sum_over_all(scores, negatives.joined([popular, uniform])) == pytest.approx(full, abs=1e-4)
    alike = negatives.Candidates(uniform.ids, popular.log_q[: len(uniform.ids)])
    assert abs(sum_over_all(scores, negatives.joined([popular, alike])) - full) > 0.1
