import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from towers.errors import InvalidInputError
from trainer import losses, mining, negatives
from trainer.config import TrainingConfig

DIM = 4
TEMPERATURE = 0.1


def unit_vectors(num_rows: int, seed: int, dim: int = DIM) -> Tensor:
    return functional.normalize(torch.randn(num_rows, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


@given(
    seed=st.integers(0, 10_000),
    num_items=st.integers(1, 40),
    num_queries=st.integers(1, 5),
    first=st.integers(1, 5),
    length=st.integers(1, 6),
    size=st.integers(1, 6),
    share=st.sampled_from([0.0, 0.4, 0.9]),
)
def test_hard_negatives_are_drawn_from_the_ranks_that_unliked_items_have(
    seed: int, num_items: int, num_queries: int, first: int, length: int, size: int, share: float
) -> None:
    """Against a loop; windows beyond the last item, queries that like everything."""
    size = min(size, length)
    items, queries = unit_vectors(num_items, seed), unit_vectors(num_queries, seed + 1)
    is_liked = torch.rand(num_queries, num_items, generator=torch.Generator().manual_seed(seed)) < share
    keys = torch.rand(num_queries, length, generator=torch.Generator().manual_seed(seed))
    hard = mining.mine(
        mining.ItemIndex(items),
        queries,
        lambda places, found: is_liked[places].gather(1, found.clamp(min=0)),
        (first, first + length - 1),
        keys,
        size,
    )
    assert hard.ids.shape == (num_queries, size)
    every, zeros = torch.arange(num_queries), torch.zeros(num_items)
    in_windows = hard.log_counts_elsewhere(every, torch.arange(num_items), zeros, zeros, num_items) > 0
    for row in range(num_queries):
        order = [item for item in (items @ queries[row]).argsort(descending=True).tolist() if not is_liked[row, item]]
        window = order[first - 1 : first - 1 + length]
        assert [item for item in hard.windows[row].tolist() if item >= 0] == window
        assert in_windows[row].nonzero().squeeze(1).tolist() == sorted(window)
        drawn = [item for item in hard.ids[row].tolist() if item >= 0]
        assert len(set(drawn)) == len(drawn) == min(size, len(window))
        assert set(drawn) <= set(window)
        if window:
            assert math.exp(hard.log_shares()[row]) == pytest.approx(len(drawn) / len(window))
        else:
            assert hard.log_shares()[row] == 0


def test_draws_from_a_window_are_even() -> None:
    items, queries = unit_vectors(30, 0), unit_vectors(1, 1).expand(3000, DIM).contiguous()
    keys = torch.rand(3000, 6, generator=torch.Generator().manual_seed(0))
    index = mining.ItemIndex(items)
    hard = mining.mine(index, queries, lambda places, found: found < 0, (3, 8), keys, 2)
    counts = torch.bincount(hard.ids.flatten())
    assert (counts > 0).sum() == 6
    assert counts[counts > 0].tolist() == pytest.approx([1000] * 6, rel=0.1)


def test_large_catalogues_are_searched_in_cells_and_alike_from_equal_embeddings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    items, queries = unit_vectors(25_000, 0, 16), unit_vectors(50, 1, 16)
    exact = mining.ItemIndex(items).nearest(queries, 20)
    monkeypatch.setattr(mining, "_EXACT_ITEMS", 1000)
    found = mining.ItemIndex(items).nearest(queries, 20)
    assert torch.equal(found, mining.ItemIndex(items.clone()).nearest(queries, 20))
    assert not torch.equal(found, exact)
    recalls = [len(set(a) & set(b)) / 20 for a, b in zip(found.tolist(), exact.tolist(), strict=True)]
    assert np.mean(recalls) > 0.8


def test_without_faiss_the_key_and_the_fix_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(InvalidInputError, match=r"\[training\] hard_negatives: it needs FAISS; pip install"):
        mining.ItemIndex(unit_vectors(3, 0))


@pytest.mark.parametrize("num_uniform", [0, 60])
def test_hard_negatives_and_the_places_estimate_the_full_softmax_and_a_wrong_q_does_not(num_uniform: int) -> None:
    """Places exactly as often as their sources say, every draw of the window once: nothing is left to chance."""
    counts = (900 / torch.arange(1, 31)).long()
    query, items = unit_vectors(1, 0), unit_vectors(30, 1)
    options = TrainingConfig(uniform_negatives=num_uniform)
    sources = negatives.Sources(losses.log_sampling_probabilities(counts), DIM, options)
    batch = torch.repeat_interleave(torch.arange(30), counts)
    uniform = torch.arange(30).repeat(num_uniform // 30)
    places = torch.cat([batch, uniform])
    candidates, _ = sources.candidates(batch, 0, 0)
    log_counts = candidates.log_q + math.log(len(places))
    window = (items @ query[0]).topk(7).indices
    elsewhere = sources.log_expected(places, len(places))
    one, positive, sums, wrong_sums = torch.tensor([0]), torch.tensor([0]), [], []
    for item in window.unsqueeze(1):
        hard = mining.HardNegatives(item.unsqueeze(0), window.unsqueeze(0))
        own_counts = hard.log_counts(one, sources.log_expected(hard.ids, len(places)))
        shared_counts = hard.log_counts_elsewhere(one, places, log_counts, elsewhere, 30)
        for found, own, shared in ((sums, own_counts, shared_counts), (wrong_sums, torch.zeros(1, 1), log_counts)):
            of_own = losses.OwnNegatives(items[item].unsqueeze(0), own, torch.zeros(1, 1, dtype=torch.bool))
            nobody = torch.zeros(1, len(places), dtype=torch.bool)
            loss = losses.softmax_loss(query, items[places], shared, positive, nobody, TEMPERATURE, own=of_own)
            score = items[places[positive]] @ query[0] / TEMPERATURE - shared.expand(1, -1)[0, positive]
            found.append((loss + score).exp().item())
    full = ((items @ query[0]) / TEMPERATURE).exp().sum().item()
    assert np.mean(sums) == pytest.approx(full, rel=1e-4)
    assert np.mean(wrong_sums) > 1.1 * full
