import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.pooling import AttentionPooling, CausalTransformer


def histories(*lengths: int, longest: int = 5, width: int = 4) -> tuple[Tensor, Tensor]:
    """Random rows `[B, L, E]`, padding included, so that what is read of it shows; and which of them count."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(len(lengths), longest, width, generator=generator)
    return rows, torch.arange(longest) < torch.tensor(lengths).unsqueeze(1)


def attention(max_length: int = 5) -> AttentionPooling:
    torch.manual_seed(0)
    pooling = AttentionPooling(4, max_length)
    torch.nn.init.normal_(pooling.score_by_age.weight)
    return pooling


def transformer(dropout: float = 0.0) -> CausalTransformer:
    """Of random weights, so that nothing is hidden by a zero or a one."""
    torch.manual_seed(0)
    pooling = CausalTransformer(4, max_length=5, blocks=2, heads=2, dropout=dropout)
    for parameter in pooling.parameters():
        nn.init.normal_(parameter, std=0.5)
    return pooling


def test_attention_weighs_each_entry_by_what_it_is_and_by_its_age() -> None:
    pooling = attention()
    rows, is_present = histories(3, 5, 1)
    pooled = pooling(rows, is_present)
    for row, length, found in zip(rows, (3, 5, 1), pooled, strict=True):
        weights = []
        for position in range(length):
            hidden = torch.tanh(pooling.hidden.weight @ row[position] + pooling.hidden.bias)
            age = length - 1 - position
            score = pooling.score.weight[0] @ hidden + pooling.score_by_age.weight[age, 0]
            weights.append(math.exp(score.item()))
        expected = sum(weight * entry for weight, entry in zip(weights, row, strict=False)) / sum(weights)
        assert torch.allclose(found, torch.as_tensor(expected), atol=1e-6)


def test_attention_over_nothing_is_zero_and_its_gradient_finite() -> None:
    pooling = attention()
    rows, is_present = histories(0, 2)
    rows.requires_grad_()
    pooled = pooling(rows, is_present)
    assert pooled[0].tolist() == [0.0] * 4
    pooled.square().sum().backward()
    assert rows.grad is not None
    assert torch.isfinite(rows.grad).all()
    assert not rows.grad[0].any()
    assert all(torch.isfinite(parameter.grad).all() for parameter in pooling.parameters() if parameter.grad is not None)


def test_attention_stays_finite_with_scores_of_any_size() -> None:
    pooling = attention()
    with torch.no_grad():
        pooling.score.weight.mul_(1e6)
        pooling.score_by_age.weight.sub_(1e6)
    rows, is_present = histories(3, 5)
    pooled = pooling(rows, is_present)
    assert torch.isfinite(pooled).all()
    assert (pooled.abs().sum(dim=1) > 0).all()


def test_a_transformer_answers_after_each_entry_as_if_it_were_the_newest() -> None:
    pooling = transformer()
    rows, is_present = histories(5, 3, 0)
    states = pooling.after_each(rows)
    assert states.shape == (3, 6, 4)
    assert torch.equal(pooling(rows, is_present), states[[0, 1, 2], [5, 3, 0]])
    for length in range(6):
        prefix, is_prefix = rows[:, : max(1, length)], torch.arange(max(1, length)).expand(3, -1) < length
        assert torch.allclose(pooling(prefix, is_prefix), states[:, length], atol=1e-5)


def test_a_transformer_sees_nothing_that_comes_later() -> None:
    pooling = transformer()
    rows, _ = histories(5)
    rows.requires_grad_()
    for place in range(6):
        [gradient] = torch.autograd.grad(pooling.after_each(rows)[0, place].square().sum(), rows)
        assert gradient[0].abs().sum(dim=1).gt(0).tolist() == [entry < place for entry in range(5)]


def test_a_transformer_is_what_the_paper_says() -> None:
    """One place at a time, in loops over heads and over the places before it."""
    pooling = transformer()
    rows, _ = histories(5)
    states = torch.cat([pooling.start.unsqueeze(0), rows[0]]) + pooling.positions.weight
    states = states * 2  # the root of the width
    for block in pooling.blocks:
        assert isinstance(block.attention_in, nn.Linear)
        queries, keys, values = block.attention_in(block.attention_norm(states)).chunk(3, dim=1)
        seen = torch.zeros(6, 4)
        for place in range(6):
            for head in (slice(0, 2), slice(2, 4)):
                scores = torch.stack([queries[place, head] @ keys[other, head] for other in range(place + 1)])
                seen[place, head] = functional.softmax(scores / math.sqrt(2), dim=0) @ values[: place + 1, head]
        states = states + block.attention_out(seen)
        states = states + block.layers(states)
    assert torch.allclose(pooling.after_each(rows)[0], pooling.norm(states), atol=1e-5)


def test_a_transformer_drops_out_in_training_only() -> None:
    pooling = transformer(dropout=0.5)
    rows, is_present = histories(5)
    assert not torch.equal(pooling(rows, is_present), pooling(rows, is_present))
    pooling.eval()
    assert torch.equal(pooling(rows, is_present), pooling(rows, is_present))


@pytest.mark.parametrize("pooling", [attention(), transformer()], ids=["attention", "transformer"])
def test_padding_is_never_read(pooling: nn.Module) -> None:
    rows, is_present = histories(2, 0, 4)
    expected = pooling(rows, is_present)
    rows = rows.masked_fill(~is_present.unsqueeze(-1), 1e6)
    assert torch.equal(pooling(rows, is_present), expected)
    assert torch.allclose(pooling(rows[:, :4], is_present[:, :4]), expected, atol=1e-6)
