"""A step in parts is the step in one piece."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from taken_steps import take_steps
from torch import Tensor, nn

from trainer.caching import Embedded
from trainer.config import TrainerConfig

Configure = Callable[..., TrainerConfig]
NUM_ROWS = 61
HARD: Mapping[str, Any] = {"training__hard_negatives": 2, "training__hard_negatives_ranks": [1, 7]}

SHOWN: Mapping[str, Any] = {"data__label_column": "label", "training__shown_negatives": 3}
OTHER_ITEMS = {
    "training__uniform_negatives",
    "training__hard_negatives",
    "training__shown_negatives",
    "training__negatives",
}
"""Sources that have others than the items of batches."""


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"training__symmetric": True},
        {"training__uniform_negatives": 16},
        {"training__logq": "streaming", "training__memory": 40},
        {"training__negatives": "all", "training__mask_known_positives": False},
        {"training__score_margin": 0.05, "training__symmetric": True},
        {"data__weight_column": "weight"},
        {"training__history_share": 0.5, "history__max_length": 20, "data__weight_column": "weight"},
        {"training__history_share": 0.5, "training__memory": 40},
        {"training__history_share": 0.5, **HARD},
        {"training__mask_known_positives": False, "training__symmetric": True, **HARD},
        {"training__score_margin": 0.05, "training__memory": 40, "training__logq": "none", **HARD},
        {"history__pooling": "transformer", "model__transformer_dropout": 0.0, **HARD},
        {"model__matryoshka_dims": [3, 6], "training__memory": 40, "training__symmetric": True, **HARD},
        {"model__matryoshka_dims": [3], "training__history_share": 0.5, **HARD},
        {**SHOWN, "training__symmetric": True, "model__matryoshka_dims": [3], **HARD},
        {**SHOWN, "training__history_share": 0.5},
        {"history__pooling": "transformer", "item_id__min_count": 1, "model__transformer_dropout": 0.0},
    ],
)
def test_chunks_give_the_gradients_of_the_whole(world: Path, configure: Configure, changes: dict[str, Any]) -> None:
    table = pq.read_table(world / "interactions.parquet")
    weights = pa.array([1.0 + number % 3 for number in range(len(table))])
    labels = pa.array([int(number % 4 > 0) for number in range(len(table))])
    table = table.append_column("weight", weights).append_column("label", labels)
    pq.write_table(table, world / "interactions.parquet")
    changes = {"model__dropout": 0.0, **changes}
    whole, expected = take_steps(configure(**changes), world)
    assert sum(float(gradient.abs().sum()) for gradient in expected.values()) > 0
    for chunk_size in (1, 20, 1000):
        in_chunks, gradients = take_steps(configure(**changes, training__chunk_size=chunk_size), world)
        assert in_chunks.loss == pytest.approx(whole.loss, rel=1e-5), chunk_size
        assert (in_chunks.masked, in_chunks.left) == (whole.masked, whole.left), chunk_size
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(
                gradient, expected[name], atol=5e-6, rtol=1e-4, msg=lambda text, n=name, c=chunk_size: f"{c} {n} {text}"
            )


def test_users_who_ask_for_all_of_theirs_at_once_lose_what_they_would_one_by_one(
    world: Path, configure: Configure
) -> None:
    """From the user's own features alone, so that no sample of a history stands between the two."""
    toml = configure(training__negatives="all", model__dropout=0.0, training__batch_size=480).model_dump(mode="json")
    toml["features"] = [feature for feature in toml["features"] if feature["name"] != "history"]
    one_by_one, expected = take_steps(TrainerConfig.model_validate_json(json.dumps(toml)), world, num_rows=480)
    toml["training"]["history_share"] = 0.5
    at_once, gradients = take_steps(TrainerConfig.model_validate_json(json.dumps(toml)), world, num_rows=480)
    assert at_once.loss == pytest.approx(one_by_one.loss, rel=1e-5)
    assert (at_once.masked, at_once.left) == (one_by_one.masked, one_by_one.left)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-4, msg=lambda text, n=name: n + text)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"training__uniform_negatives": 16, "training__score_margin": 0.1},
        {"training__memory": 40, "training__logq": "streaming"},
        {"training__mask_known_positives": False, "training__symmetric": True, **HARD},
        {"training__history_share": 0.5, "training__memory": 40, **HARD},
        {"training__negatives": "all"},
        {"training__logq": "none", **HARD},
    ],
)
@pytest.mark.parametrize("chunk_size", [None, 7])
def test_batches_of_one_item_only_stay_finite(
    world: Path, configure: Configure, changes: dict[str, Any], chunk_size: int | None
) -> None:
    """With the batch's own places alone there is nothing to learn from them; with others it is learned."""
    table = pq.read_table(world / "interactions.parquet")
    same = pa.array([3] * (len(table) - 1) + [4])
    pq.write_table(table.set_column(1, "item_id", same), world / "interactions.parquet")
    figures, gradients = take_steps(configure(**changes, training__chunk_size=chunk_size), world, num_rows=40)
    assert math.isfinite(figures.loss)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    is_alone = not OTHER_ITEMS & changes.keys()
    assert (figures.masked == 1, figures.loss == 0) == (is_alone, is_alone)


def test_windows_of_all_that_is_not_liked_give_the_softmax_over_all_items(world: Path, configure: Configure) -> None:
    """Of 40 items a user likes 8. One batch of all interactions holds each as often as it is expected to."""
    shared = {"training__history_share": 0.5, "history__max_length": 20, "model__dropout": 0.0}
    full, expected = take_steps(configure(**shared, training__negatives="all"), world, num_steps=1)
    ranks = {"training__hard_negatives": 32, "training__hard_negatives_ranks": [1, 32]}
    hard, gradients = take_steps(configure(**shared, **ranks), world, num_steps=1)
    assert hard.loss == pytest.approx(full.loss, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-4, msg=lambda text, n=name: n + text)


@pytest.mark.parametrize(
    "changes",
    [
        {"model__query_hidden": [16], "model__item_hidden": [16]},
        {"history__pooling": "attention", "training__history_share": 0.5, **HARD},
        {"history__pooling": "transformer", "model__transformer_dropout": 0.0, "training__chunk_size": 20},
    ],
)
def test_bfloat16_gives_the_gradients_of_float32_but_for_its_rounding(
    world: Path, configure: Configure, changes: dict[str, Any]
) -> None:
    """It rounds by a share of 1/512 at most, here in products one behind the other."""
    changes = {"item_id__min_count": 1, "model__dropout": 0.0, **changes}
    exact, expected = take_steps(configure(**changes), world)
    rounded, gradients = take_steps(configure(**changes, training__precision="bfloat16"), world)
    assert rounded.loss != exact.loss
    assert rounded.loss == pytest.approx(exact.loss, rel=0.01)
    assert gradients.keys() == expected.keys()
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
    of_all = [torch.cat([named[name].flatten() for name in sorted(named)]) for named in (gradients, expected)]
    assert (of_all[0] - of_all[1]).norm() < 0.05 * of_all[1].norm()


def test_the_second_pass_drops_what_the_first_one_dropped() -> None:
    torch.manual_seed(0)
    tower = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5))
    inputs, seen = torch.randn(10, 4), []

    def embed(rows: Tensor) -> Tensor:
        seen.append(tower(inputs[rows]))
        return seen[-1]

    embedded = Embedded(embed, torch.arange(10), 3)
    random_state = torch.get_rng_state()
    (embedded.embeddings**2).sum().backward()  # type: ignore[no-untyped-call]
    embedded.backward()
    assert len(seen) == 8
    assert torch.equal(torch.cat(seen[:4]), torch.cat(seen[4:]))
    assert torch.equal(torch.get_rng_state(), random_state)
