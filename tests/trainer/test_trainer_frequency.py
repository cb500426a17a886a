import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.frequency import StreamingFrequency

NUM_ITEMS = 6


@given(
    batches=st.lists(st.lists(st.integers(0, NUM_ITEMS - 1), max_size=9), max_size=6),
    rate=st.sampled_from([0.01, 0.3, 1.0]),
)
def test_a_batch_is_its_places_one_after_the_other(batches: list[list[int]], rate: float) -> None:
    """Algorithm 2 of the paper in a loop: items that come several times, items that never come, empty batches."""
    frequency = StreamingFrequency(NUM_ITEMS, rate)
    last_places, gaps, place = [0] * NUM_ITEMS, [float(NUM_ITEMS)] * NUM_ITEMS, 0
    for batch in batches:
        frequency.observe(torch.tensor(batch, dtype=torch.int64))
        for item in batch:
            place += 1
            gaps[item] = (1 - rate) * gaps[item] + rate * (place - last_places[item])
            last_places[item] = place
    q = frequency.log_q(torch.arange(NUM_ITEMS)).exp()
    assert q.tolist() == pytest.approx([1 / gap for gap in gaps], rel=1e-4)


def test_the_estimate_finds_the_popularity_and_follows_it() -> None:
    """Also of items that every batch holds several times; then all changes."""
    generator = torch.Generator().manual_seed(0)
    popularity = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.02, 0.01])
    frequency = StreamingFrequency(NUM_ITEMS, 0.01)
    for now in (popularity, popularity.flip(0)):
        for _ in range(1000):
            frequency.observe(torch.multinomial(now, 64, replacement=True, generator=generator))
        error = frequency.log_q(torch.arange(NUM_ITEMS)) - now.log()
        assert error.abs().max() < 0.35
        assert error.square().mean().sqrt() < 0.15


def test_a_restored_estimate_goes_on_and_leaves_its_state_alone() -> None:
    items = torch.tensor([0, 1, 1, 2])
    first, second = StreamingFrequency(NUM_ITEMS, 0.1), StreamingFrequency(NUM_ITEMS, 0.1)
    first.observe(items)
    state = {name: tensor.clone() for name, tensor in first.state().items()}
    second.restore(state)
    first.observe(items)
    second.observe(items)
    every = torch.arange(NUM_ITEMS)
    assert torch.equal(first.log_q(every), second.log_q(every))
    assert state["gaps"].tolist() != second.state()["gaps"].tolist()
    assert state["num_places"] == 4
