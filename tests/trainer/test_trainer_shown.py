"""What users were shown and did not choose, from the file to the gradients."""

import io
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from taken_steps import take_steps
from toy_runs import assert_equal_states, run

from towers.errors import InvalidInputError
from towers.schema import parse_schema
from trainer import data, state
from trainer.config import DataConfig, TrainerConfig
from trainer.shown import Shown, keys_of

Configure = Callable[..., TrainerConfig]
SHOWN = {"data__label_column": "label", "training__shown_negatives": 3, "model__dropout": 0.0}
SCHEMA = parse_schema(
    [
        {"name": "user_id", "owner": "query", "kind": "categorical"},
        {"name": "item_id", "owner": "item", "kind": "categorical"},
    ]
)


def labelled(world: Path, shown: list[tuple[int, int]]) -> None:
    """The world's interactions are chosen; before them users were shown other items."""
    table = pq.read_table(world / "interactions.parquet")
    users, items = zip(*shown, strict=True)
    others = pa.table({"user_id": users, "item_id": items, "timestamp": [0] * len(shown)})
    others = others.select(table.schema.names).cast(table.schema)
    labels = [1] * len(table) + [0] * len(others)
    table = pa.concat_tables([table, others]).append_column("label", pa.array(labels))
    pq.write_table(table, world / "interactions.parquet")


def test_draws_are_even_and_none_comes_twice() -> None:
    shown = Shown.of(torch.tensor([0, 2, 2, 2, 2, 2]), torch.tensor([4, 9, 1, 5, 7, 1]), num_users=4, num_items=10)
    users = torch.tensor([0, 1, 2, 3])
    assert shown.drawn(users, torch.tensor([0.9, 0.9, 0.8, 0.0]), 3).tolist() == [
        [4, -1, -1],
        [-1, -1, -1],
        [9, 1, 5],
        [-1, -1, -1],
    ]
    keys = (torch.arange(400) + 0.5) / 400
    found = Counter(shown.drawn(torch.full((400,), 2), keys, 2).flatten().tolist())
    assert found == {1: 200, 5: 200, 7: 200, 9: 200}
    nothing = Shown.of(torch.tensor([], dtype=torch.int64), torch.tensor([], dtype=torch.int64), 4, 10)
    assert nothing.drawn(users, torch.zeros(4), 2).tolist() == [[-1, -1]] * 4


def test_the_keys_of_a_step_are_its_own() -> None:
    assert torch.equal(keys_of(8, 1, 2, 3), keys_of(8, 1, 2, 3))
    different = [keys_of(8, 1, 2, 3), keys_of(8, 1, 2, 4), keys_of(8, 1, 3, 3), keys_of(8, 2, 2, 3)]
    assert len({tuple(keys.tolist()) for keys in different}) == 4


def read(folder: Path, label: Any) -> data.TrainingData:
    """User 1 chooses 10 to 13, the last two for validation and test; 14 is shown before that, 10 and 15 besides."""
    columns = {
        "user_id": [1, 1, 1, 1, 1, 1, 1],
        "item_id": [14, 10, 10, 11, 12, 15, 13],
        "timestamp": [0, 1, 2, 3, 4, 5, 6],
        "shown": label,
    }
    others = {"user_id": [2, 2], "item_id": [11, 14], "timestamp": [0, 1], "shown": [label[1], label[0]]}
    pq.write_table(pa.concat_tables([pa.table(columns), pa.table(others)]), folder / "log.parquet")
    pq.write_table(pa.table({"item_id": [10, 11, 12, 13, 14, 15]}), folder / "items.parquet")
    config = DataConfig(interactions="log.parquet", items="items.parquet", label_column="shown")
    return data.read_data(config, SCHEMA, folder)


@pytest.mark.parametrize("label", [[0, 1, 0, 1, 1, 0, 1], [False, True, False, True, True, False, True]])
def test_what_was_not_chosen_is_no_interaction_and_the_future_is_not_known(tmp_path: Path, label: Any) -> None:
    found = read(tmp_path, label)
    chosen = [(found.users.ids[u], found.items.ids[i]) for u, i in zip(found.log.users, found.log.items, strict=True)]
    assert chosen == [("1", "10"), ("1", "11"), ("1", "12"), ("1", "13"), ("2", "11")]
    assert found.impressions is not None
    pairs = zip(found.impressions.users.tolist(), found.impressions.items.tolist(), strict=True)
    # Training ends with item 11 at 3 for user 1, with item 11 at 0 for user 2: 15 and 14 come after.
    assert [(found.users.ids[user], found.items.ids[item]) for user, item in pairs] == [("1", "14"), ("1", "10")]
    assert found.notes == (
        f"{tmp_path / 'log.parquet'}: column 'shown': 2 rows that say 0 are not of the time, or the part of the split, "
        "that is trained on and were left out",
    )


def test_a_given_split_says_which_impressions_are_trained_on(tmp_path: Path) -> None:
    """Whatever their time: 12 is shown last, but to train on."""
    columns = {
        "user_id": [1, 1, 1, 1, 1, 1],
        "item_id": [10, 11, 12, 13, 14, 15],
        "timestamp": [1, 5, 9, 0, 0, 0],
        "shown": [1, 1, 0, 0, 0, 0],
        "part": ["train", "test", "train", "history", "validation", "test"],
    }
    others = {"user_id": [2], "item_id": [11], "timestamp": [0], "shown": [1], "part": ["train"]}
    pq.write_table(pa.concat_tables([pa.table(columns), pa.table(others)]), tmp_path / "log.parquet")
    pq.write_table(pa.table({"item_id": [10, 11, 12, 13, 14, 15]}), tmp_path / "items.parquet")
    config = DataConfig(interactions="log.parquet", items="items.parquet", label_column="shown", split_column="part")
    found = data.read_data(config, SCHEMA, tmp_path).impressions
    assert found is not None
    assert (found.users.tolist(), found.items.tolist(), found.num_left_out) == ([0], [2], 3)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ([0, 1, 2, 1, 1, 0, 1], "1 of 9 rows hold no label or one such as 2; write 1 for chosen"),
        ([0, 1, None, 1, 1, 0, 1], "1 of 9 rows hold no label"),
        (["0", "1", "0", "1", "1", "0", "1"], r"is string; \[data\] label_column must hold 0 and 1"),
        ([0] * 7, r"'shown' \(\[data\] label_column\): no row says 1"),
    ],
)
def test_wrong_labels(tmp_path: Path, label: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        read(tmp_path, label)


def test_what_is_liked_is_never_pushed_away(world: Path, configure: Configure) -> None:
    """Of what users chose later nothing changes where training knows it, and what is held out it cannot know."""
    table = pq.read_table(world / "interactions.parquet")
    plain, expected = take_steps(configure(model__dropout=0.0), world)
    labelled(world, list(zip(table["user_id"].to_pylist(), table["item_id"].to_pylist(), strict=True)))
    held_out = take_steps(configure(**SHOWN), world)[0]
    assert held_out.loss > plain.loss
    log = data.order_by_time(*(table[name].to_numpy() for name in ("user_id", "item_id", "timestamp")))
    train = data.split_by_time(log).train
    pq.write_table(table, world / "interactions.parquet")
    labelled(world, list(zip(log.users[train].tolist(), log.items[train].tolist(), strict=True)))
    found, gradients = take_steps(configure(**SHOWN), world)
    assert found.loss == pytest.approx(plain.loss, rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-7, rtol=1e-5, msg=lambda text, n=name: n + text)


def test_what_was_shown_is_in_the_sum_once(world: Path, configure: Configure) -> None:
    """A batch of one row has no other negatives: with all items shown, its loss is the softmax over all items."""
    labelled(world, [(user, item) for user in range(60) for item in range(40)])
    options = {"model__dropout": 0.0, "data__label_column": "label"}
    full, expected = take_steps(configure(**options, training__negatives="all"), world, num_rows=1, num_steps=1)
    shown = configure(**options, training__shown_negatives=40, training__logq="none")
    found, gradients = take_steps(shown, world, num_rows=1, num_steps=1)
    assert found.loss == pytest.approx(full.loss, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-4, msg=lambda text, n=name: n + text)


def test_a_resumed_run_draws_what_an_undisturbed_one_does(world: Path, configure: Configure, tmp_path: Path) -> None:
    labelled(world, [(user, (7 * user + 3 * place) % 40) for user in range(60) for place in range(9)])
    config = configure(training__epochs=2, **SHOWN)
    undisturbed = run(config, world, tmp_path / "undisturbed", console=Console(file=io.StringIO()))
    with pytest.raises(KeyboardInterrupt):
        run(config, world, tmp_path / "interrupted", interrupt_at=20)
    saved = state.load_state(tmp_path / "interrupted")
    assert not saved.progress.is_finished
    assert_equal_states(run(config, world, tmp_path / "interrupted", resumed=saved), undisturbed)


def test_without_any_that_training_may_know_they_are_refused(world: Path, configure: Configure) -> None:
    table = pq.read_table(world / "interactions.parquet")
    pq.write_table(table.append_column("label", pa.array([1] * len(table))), world / "interactions.parquet")
    with pytest.raises(
        InvalidInputError, match=r"^\[training\] shown_negatives: no row of what is trained on says 0 .* give some"
    ):
        run(configure(**SHOWN), world, world / "state")


def test_what_nobody_chooses_is_learned_from_its_impressions(world: Path, configure: Configure, tmp_path: Path) -> None:
    """Users choose the first half of their own kind's items and decline the other half, which no batch holds.

    What nobody chooses, uniform negatives tell too.
    """
    table = pq.read_table(world / "interactions.parquet")
    pq.write_table(table.filter(pc.field("item_id") < 20), world / "interactions.parquet")
    labelled(world, [(user, item) for user in range(60) for item in range(20 + user % 2, 40, 2)])
    found = {}
    for num_shown, num_uniform in ((0, 0), (2, 0), (0, 16)):
        config = configure(
            **(SHOWN | {"training__shown_negatives": num_shown}),
            training__uniform_negatives=num_uniform,
            item_id__min_count=1,
            training__epochs=8,
            training__patience=8,
            evaluation__metric="recall_at_5",
        )
        features = [entry for entry in config.features if entry["name"] in ("user_id", "item_id", "tags", "title")]
        config = config.model_copy(update={"features": tuple(features)})
        state_file = tmp_path / f"{num_shown} {num_uniform}"
        found[num_shown, num_uniform] = run(config, world, state_file).progress.best_metric
    assert min(found[2, 0], found[0, 16]) > found[0, 0] + 0.2
