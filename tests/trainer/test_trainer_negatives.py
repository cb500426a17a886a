import math

import pytest
import torch
from torch import Tensor

from trainer import losses, negatives

COUNTS = (900 / torch.arange(1, 31)).long()
"""A skewed popularity: 900 interactions with the first item, 30 with the last."""


def test_sources_keep_their_own_q() -> None:
    log_q = losses.log_sampling_probabilities(torch.tensor([1, 3, 0, 4]))
    positives = torch.tensor([3, 0])
    candidates = negatives.joined([negatives.of_batch(positives, log_q), negatives.uniform(4, 3, 0, 0, 0)])
    assert candidates.ids[:2].tolist() == [3, 0]
    assert candidates.log_q.exp().tolist() == pytest.approx([0.5, 0.125, 0.25, 0.25, 0.25])


def test_uniform_draws_are_those_of_the_step_and_even() -> None:
    drawn = negatives.uniform(10, 10_000, 1, 2, 3).ids
    assert torch.equal(drawn, negatives.uniform(10, 10_000, 1, 2, 3).ids)
    for other in ((0, 2, 3), (1, 0, 3), (1, 2, 0)):
        assert not torch.equal(drawn, negatives.uniform(10, 10_000, *other).ids)
    assert torch.bincount(drawn).tolist() == pytest.approx([1000] * 10, rel=0.2)


def sum_over_all(scores: Tensor, candidates: negatives.Candidates) -> float:
    """The estimate of the log of the sum over all items, of one query."""
    corrected = losses.logq_corrected(scores[candidates.ids].unsqueeze(0), candidates.log_q)
    return corrected.logsumexp(dim=1).item() - math.log(len(candidates.ids))


def test_mixed_negatives_estimate_the_full_softmax_and_a_wrong_q_does_not() -> None:
    """Popular places as often as popularity says, uniform ones evenly, so that nothing is left to chance."""
    scores = torch.randn(len(COUNTS), generator=torch.Generator().manual_seed(0))
    popular = negatives.of_batch(
        torch.repeat_interleave(torch.arange(len(COUNTS)), COUNTS), losses.log_sampling_probabilities(COUNTS)
    )
    uniform = negatives.joined([negatives.all_items(len(COUNTS))] * 50)
    full = scores.logsumexp(dim=0).item()
    assert sum_over_all(scores, negatives.joined([popular, uniform])) == pytest.approx(full, abs=1e-4)
    alike = negatives.Candidates(uniform.ids, popular.log_q[: len(uniform.ids)])
    assert abs(sum_over_all(scores, negatives.joined([popular, alike])) - full) > 0.1
