"""The gates of a publication, on rankings and embeddings with known answers."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from towers.errors import GateRefusedError, InvalidInputError
from towers.schema import parse_schema
from trainer import gates
from trainer.config import TrainerConfig
from trainer.evaluate import Ranking
from trainer.run import prepare
from trainer.slices import Slice

NUM_QUERIES = 400


def ranking(is_found: NDArray[np.bool_]) -> Ranking:
    """One target for each query, first or not among the first."""
    return Ranking(np.arange(len(is_found)), np.where(is_found, 0, 10), {})


def found(share: float) -> NDArray[np.bool_]:
    """Of 400 queries the first ones are answered."""
    return np.arange(NUM_QUERIES) < round(share * NUM_QUERIES)


@pytest.mark.parametrize(
    ("share", "max_loss", "is_passed"),
    [
        (0.5, 0.0, True),  # The same answers.
        (0.55, 0.0, True),  # More of them, and none lost.
        (0.49, 0.0, False),  # A loss, and none is allowed.
        (0.49, 0.1, True),  # 2 % lost, surely less than 10.
        (0.455, 0.1, False),  # 9 % lost: perhaps more than 10.
        (0.1, 0.1, False),
        (0.1, 1.0, True),
    ],
)
def test_towers_pass_where_a_larger_loss_than_allowed_is_ruled_out(
    share: float, max_loss: float, is_passed: bool
) -> None:
    [judgement] = gates.judge(ranking(found(share)), ranking(found(0.5)), "recall_at_10", max_loss, [], {})
    assert judgement.is_passed is is_passed
    assert (judgement.value, judgement.live_value) == (pytest.approx(share), 0.5)
    assert judgement.low <= share - 0.5 <= judgement.high


def test_gains_elsewhere_do_not_make_up_for_losses_that_are_not_paired() -> None:
    """As many answers, but others: what is lost may as well be more than what is won."""
    [judgement] = gates.judge(ranking(~found(0.5)), ranking(found(0.5)), "ndcg_at_10", 0.1, [], {})
    assert judgement.value == judgement.live_value
    assert not judgement.is_passed


def test_a_slice_is_judged_by_its_own_share() -> None:
    first, last = (
        Slice("segment=first", np.arange(NUM_QUERIES) < 100),
        Slice("segment=last", np.arange(NUM_QUERIES) >= 300),
    )
    live, new = found(1.0), found(1.0)
    new[350:] = False
    shares = {"segment=first": 0.0, "segment=last": 0.2}
    everything, on_first, on_last = gates.judge(ranking(new), ranking(live), "mrr_at_10", 0.2, [first, last], shares)
    assert (everything.is_passed, on_first.is_passed, on_last.is_passed) == (True, True, False)
    assert on_last.refusal.startswith("mrr_at_10, segment=last: 0.5000, of the live checkpoint 1.0000; difference -0.5")
    assert on_last.refusal.endswith("lose no more than 20% of it")


def test_names_of_slices(world: Path, configure: Callable[..., TrainerConfig]) -> None:
    limits = {"segment=segment 2": 0.1, "tags=calm": 0.2, "segment=none such": 0.1, "cold-items": 0.1}
    prepared = prepare(configure(evaluation__max_slice_loss=limits), world)
    assert [part.name for part in prepared.gated_slices] == ["segment=segment 2", "tags=calm"]
    assert [part.chosen.shape for part in prepared.gated_slices] == [(60,), (60,)]
    assert ["'segment=none such'" in note or "'cold-items'" in note for note in prepared.notes] == [True, True]
    with pytest.raises(InvalidInputError, match=r"no slice 'user_id=1'; use one of \['item-popularity=1', "):
        prepare(configure(evaluation__max_slice_loss={"user_id=1": 0.1}), world)


def test_ids_give_no_slices() -> None:
    schema = parse_schema(
        [
            {"name": "who", "owner": "query", "kind": "categorical", "column": "user_id"},
            {"name": "brand", "owner": "item", "kind": "categorical"},
            {"name": "price", "owner": "item", "kind": "number"},
        ]
    )
    assert gates.slice_kinds(schema) == ["cold-items", "item-popularity", "history-length", "brand"]


def test_weights_that_are_not_finite_are_refused() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    gates.check_finite(model)
    with torch.no_grad():
        model[1].bias[1] = torch.inf
    with pytest.raises(GateRefusedError, match=r"the trained parameter 1\.bias is not finite"):
        gates.check_finite(model)


def test_the_mean_cosine_is_that_of_all_pairs() -> None:
    rows = torch.nn.functional.normalize(torch.randn(7, 3, generator=torch.Generator().manual_seed(0)))
    pairs = [float(rows[i] @ rows[j]) for i in range(7) for j in range(7) if i != j]
    assert gates.mean_cosine(rows) == pytest.approx(np.mean(pairs))
    assert gates.mean_cosine(rows[:1]) == 0.0


def test_a_tower_whose_embeddings_are_all_alike_has_collapsed() -> None:
    spread = torch.eye(4)
    alike = torch.nn.functional.normalize(torch.ones(4, 4) + 0.01 * spread)
    assert gates.collapse_refusals({"query": spread, "item": spread}) == []
    [refusal] = gates.collapse_refusals({"query": spread, "item": alike})
    assert refusal.startswith("the item tower has collapsed: the mean cosine of its embeddings is 1.0000")
    [refusal] = gates.collapse_refusals({"query": torch.full((2, 4), torch.nan), "item": spread})
    assert refusal.startswith("the query tower has collapsed")
