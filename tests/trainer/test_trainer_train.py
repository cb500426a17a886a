import dataclasses
import io
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from torch import Tensor
from toy_runs import ORIGIN, assert_equal_states, run

from towers.errors import InvalidInputError
from trainer import state
from trainer.config import TrainerConfig, TrainingConfig
from trainer.encode import EncodedQueries, Tensors
from trainer.model import TwoTowers
from trainer.run import prepare
from trainer.step import TrainingExamples
from trainer.train import learning_rate, train_towers

Configure = Callable[..., TrainerConfig]
HARD = {"training__hard_negatives": 2, "training__hard_negatives_ranks": [1, 7], "training__hard_negatives_every": 7}
"""20 steps end between two of its indexes."""


@pytest.mark.parametrize(("pooling", "interrupt_at"), [("mean", 1), ("mean", 20), ("mean", 30), ("transformer", 20)])
def test_a_resumed_run_equals_an_undisturbed_one(
    world: Path, configure: Configure, tmp_path: Path, pooling: str, interrupt_at: int
) -> None:
    """15 steps an epoch: after the first step, in the middle of the second epoch, and after its last step."""
    config = configure(training__epochs=3, history__pooling=pooling, item_id__min_count=1)
    undisturbed = run(config, world, tmp_path / "undisturbed")
    with pytest.raises(KeyboardInterrupt):
        run(config, world, tmp_path / "interrupted", interrupt_at)
    saved = state.load_state(tmp_path / "interrupted")
    assert (saved.progress.epoch, saved.progress.step) == divmod(interrupt_at, 15) if interrupt_at != 30 else (1, 15)
    resumed = run(config, world, tmp_path / "interrupted", resumed=saved)
    assert_equal_states(resumed, undisturbed)
    # The files hold the last parameters, the returned states the best.
    assert_equal_states(state.load_state(tmp_path / "interrupted"), state.load_state(tmp_path / "undisturbed"))
    assert config.model.dropout > 0


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"training__chunk_size": 20},
        {"training__precision": "bfloat16", "history__pooling": "transformer", "item_id__min_count": 1},
    ],
)
def test_with_rowwise_adagrad_a_resumed_run_equals_an_undisturbed_one(
    world: Path, configure: Configure, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = configure(
        training__epochs=2, training__table_optimiser="adagrad", training__table_learning_rate=0.05, **changes
    )
    undisturbed = run(config, world, tmp_path / "undisturbed")
    with pytest.raises(KeyboardInterrupt):
        run(config, world, tmp_path / "interrupted", interrupt_at=20)
    saved = state.load_state(tmp_path / "interrupted")
    assert not saved.progress.is_finished
    assert {parameter.dtype for parameter in saved.parameters.values()} == {torch.float32}
    assert_equal_states(run(config, world, tmp_path / "interrupted", resumed=saved), undisturbed)
    assert_equal_states(run(config, world, tmp_path / "again"), undisturbed)


def test_in_chunks_a_resumed_run_equals_an_undisturbed_one(world: Path, configure: Configure, tmp_path: Path) -> None:
    config = configure(training__epochs=2, training__chunk_size=20)
    undisturbed = run(config, world, tmp_path / "undisturbed")
    with pytest.raises(KeyboardInterrupt):
        run(config, world, tmp_path / "interrupted", interrupt_at=30)
    saved = state.load_state(tmp_path / "interrupted")
    assert 0 < saved.progress.step < 15
    assert_equal_states(run(config, world, tmp_path / "interrupted", resumed=saved), undisturbed)


@pytest.mark.parametrize(
    ("schedule", "warmup_steps", "expected"),
    [
        ("constant", 0, [8, 8, 8, 8]),
        ("linear", 0, [8, 6, 4, 2]),
        ("cosine", 0, [8, 4 + 8**0.5, 4, 4 - 8**0.5]),
        ("linear", 2, [4, 6, 4, 2]),
    ],
)
def test_the_learning_rate_falls_over_all_steps(schedule: str, warmup_steps: int, expected: list[float]) -> None:
    options = TrainingConfig.model_validate({"learning_rate": 8.0, "schedule": schedule, "warmup_steps": warmup_steps})
    assert [learning_rate(options, step, 4) for step in range(4)] == pytest.approx(expected)


def test_a_finished_run_is_not_trained_again(world: Path, configure: Configure, tmp_path: Path) -> None:
    config = configure(training__epochs=2)
    finished = run(config, world, tmp_path / "state")
    assert finished.progress.is_finished
    output = io.StringIO()
    again = run(
        config,
        world,
        tmp_path / "state",
        resumed=state.load_state(tmp_path / "state"),
        console=Console(file=output),
    )
    assert "epoch" not in output.getvalue()
    assert_equal_parameters(again, finished)


def assert_equal_parameters(first: state.RunState, second: state.RunState) -> None:
    for name, tensor in first.parameters.items():
        assert torch.equal(tensor, second.parameters[name]), name


def test_the_handler_of_ctrl_c_is_put_back(world: Path, configure: Configure, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    run(configure(training__epochs=1), world, tmp_path / "state")
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(KeyboardInterrupt):
        run(configure(training__epochs=1), world, tmp_path / "state", interrupt_at=2)
    assert signal.getsignal(signal.SIGINT) is before


def test_training_learns_and_keeps_the_best_epoch(world: Path, configure: Configure, tmp_path: Path) -> None:
    output = io.StringIO()
    finished = run(configure(training__epochs=6), world, tmp_path / "state", console=Console(file=output, width=200))
    lines = [line.split() for line in output.getvalue().splitlines()]
    assert [line[:2] for line in lines] == [["epoch", str(epoch)] for epoch in range(1, 7)]
    recalls = [float(line[6]) for line in lines]
    losses = [float(line[3]) for line in lines]
    assert losses[-1] < losses[0]
    assert finished.progress.best_metric == pytest.approx(max(recalls), abs=1e-4)
    assert finished.progress.best_epoch == 1 + recalls.index(max(recalls))
    assert [line[7] == "*" for line in lines] == [
        recall > max(recalls[:epoch], default=-1) for epoch, recall in enumerate(recalls)
    ]
    assert all(line[-1] == "examples/s" for line in lines)


def test_training_stops_when_validation_gets_no_better(world: Path, configure: Configure, tmp_path: Path) -> None:
    config = configure(training__epochs=50, training__patience=2, training__learning_rate=1e-12)
    finished = run(config, world, tmp_path / "state")
    assert (finished.progress.epoch, finished.progress.best_epoch) == (3, 1)


def test_without_validation_the_last_epoch_is_kept(world: Path, configure: Configure, tmp_path: Path) -> None:
    table = pq.read_table(world / "interactions.parquet")
    split = ["test" if row % 10 == 9 else "train" for row in range(len(table))]
    pq.write_table(table.append_column("split", [split]), world / "interactions.parquet")
    config = configure(training__epochs=3, training__patience=1, data__split_column="split")
    output = io.StringIO()
    finished = run(config, world, tmp_path / "state", console=Console(file=output, width=200))
    assert (finished.progress.epoch, finished.progress.best_epoch) == (3, 3)
    assert "validation" not in output.getvalue()
    for name, tensor in finished.parameters.items():
        assert torch.equal(tensor, finished.best_parameters[name]), name


def test_progress_on_a_terminal(world: Path, configure: Configure, tmp_path: Path) -> None:
    output = io.StringIO()
    run(configure(training__epochs=1), world, tmp_path / "state", console=Console(file=output, force_terminal=True))
    assert "epoch 1/1" in output.getvalue()
    assert "best recall_at_10" in output.getvalue()


def test_a_loss_that_is_not_finite_ends_training(world: Path, configure: Configure, tmp_path: Path) -> None:
    config = configure(training__learning_rate=1e30)
    with pytest.raises(
        InvalidInputError, match=r"the loss is nan in epoch \d+, step \d+; lower \[training\] learning_rate"
    ):
        run(config, world, tmp_path / "state")


def test_logq_and_temperature_reach_the_loss(world: Path, configure: Configure, tmp_path: Path) -> None:
    first_losses = []
    for changes in ({}, {"training__logq": "none"}, {"training__temperature": 0.5}):
        output = io.StringIO()
        config = configure(training__epochs=1, **changes)
        run(config, world, tmp_path / "state", console=Console(file=output, width=200))
        first_losses.append(output.getvalue().split()[3])
    assert len(set(first_losses)) == 3


def test_each_epoch_takes_every_example_once(world: Path, configure: Configure, tmp_path: Path) -> None:
    config = configure(training__epochs=1)
    seen: list[int] = []

    class Noting(EncodedQueries):
        def batch(self, rows: Tensor) -> Tensors:
            seen.extend(rows.tolist())
            return super().batch(rows)

    prepared = prepare(config, world)
    queries = prepared.examples.queries
    examples: TrainingExamples = dataclasses.replace(
        prepared.examples, queries=Noting(queries.users, queries.user_features, queries.histories)
    )
    model = TwoTowers(prepared.fitted.schema, prepared.encoder.query, prepared.encoder.item, config.model)
    console = Console(file=io.StringIO())
    train_towers(model, prepared.items, examples, prepared.validation, config, ORIGIN, tmp_path / "state", console)
    assert sorted(seen) == list(range(480))
    assert seen != sorted(seen)


def lines_of(config: TrainerConfig, world: Path, state_file: Path) -> list[list[str]]:
    output = io.StringIO()
    run(config, world, state_file, console=Console(file=output, width=200))
    return [line.split() for line in output.getvalue().splitlines()]


@pytest.mark.parametrize(
    "changes",
    [
        {"training__symmetric": True},
        {"training__learn_temperature": True},
        {"training__mask_known_positives": False},
        {"training__score_margin": 0.05},
        {"training__uniform_negatives": 16},
        {"training__logq": "streaming", "training__uniform_negatives": 16},
        {"training__memory": 70},
        {**HARD, "training__chunk_size": 20},
        {"training__memory": 70, "training__logq": "streaming"},
        {"training__negatives": "all"},
        {"model__matryoshka_dims": [4], "training__memory": 70},
        {"training__schedule": "linear", "training__warmup_steps": 20},
        {"training__history_share": 0.5, "history__max_length": 20},
    ],
)
def test_every_setting_of_the_loss_learns_and_resumes(
    world: Path, configure: Configure, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """15 steps an epoch: interrupted in the middle of the second."""
    [plain] = lines_of(configure(training__epochs=1), world, tmp_path / "plain")
    config = configure(training__epochs=2, **changes)
    lines = lines_of(config, world, tmp_path / "undisturbed")
    assert lines[0][3] != plain[3]
    assert float(lines[-1][3]) < float(lines[0][3])
    with pytest.raises(KeyboardInterrupt):
        run(config, world, tmp_path / "interrupted", interrupt_at=20)
    run(config, world, tmp_path / "interrupted", resumed=state.load_state(tmp_path / "interrupted"))
    assert_equal_states(state.load_state(tmp_path / "interrupted"), state.load_state(tmp_path / "undisturbed"))


def test_a_fixed_temperature_stays_and_a_learned_one_moves(world: Path, configure: Configure, tmp_path: Path) -> None:
    fixed = run(configure(training__epochs=1), world, tmp_path / "state")
    assert "temperature.log" not in fixed.parameters
    learned = run(configure(training__epochs=1, training__learn_temperature=True), world, tmp_path / "state")
    assert abs(learned.parameters["temperature.log"].exp().item() - 0.1) > 1e-4


def figure(line: list[str], name: str) -> float:
    return float(line[line.index(name) + 1].rstrip("%")) / 100


def test_each_epoch_says_what_was_masked_and_what_was_left(world: Path, configure: Configure, tmp_path: Path) -> None:
    """Users like 8 of 40 items in training and one more at validation."""
    [line] = lines_of(configure(training__epochs=1, training__negatives="all"), world, tmp_path / "state")
    assert figure(line, "masked") == pytest.approx(7 / 39, abs=1e-4)
    assert figure(line, "left") == pytest.approx(1 / 39, abs=1e-5)
    own_only = configure(training__epochs=1, training__negatives="all", training__mask_known_positives=False)
    [line] = lines_of(own_only, world, tmp_path / "state")
    assert figure(line, "masked") == 0


def test_hard_negatives_are_among_what_is_said_of_them(world: Path, configure: Configure, tmp_path: Path) -> None:
    """Beside the other 31 places of a batch a window of all that 8 liked items leave of 40: it holds the one left."""
    ranks = {"training__hard_negatives": 32, "training__hard_negatives_ranks": [1, 32]}
    [line] = lines_of(configure(training__epochs=1, **ranks), world, tmp_path / "state")
    [plain] = lines_of(configure(training__epochs=1), world, tmp_path / "plain")
    assert figure(line, "left") == pytest.approx((1 + 31 * figure(plain, "left")) / 63, abs=2e-5)
    assert figure(line, "masked") == pytest.approx(figure(plain, "masked") * 31 / 63, abs=2e-4)


def test_equal_weights_change_nothing_and_others_do(world: Path, configure: Configure, tmp_path: Path) -> None:
    table = pq.read_table(world / "interactions.parquet")
    plain = run(configure(training__epochs=1), world, tmp_path / "plain")
    trained = []
    for name, weights in (("equal", np.full(600, 2.0)), ("halves", np.arange(600) % 2 * 1.0)):
        pq.write_table(table.append_column("weight", pa.array(weights)), world / f"{name}.parquet")
        config = configure(training__epochs=1, data__interactions=f"{name}.parquet", data__weight_column="weight")
        trained.append(run(config, world, tmp_path / name))
    for name, tensor in trained[0].parameters.items():
        # Means are summed in another order.
        torch.testing.assert_close(tensor, plain.parameters[name], atol=1e-5, rtol=1e-4)
    assert any((plain.parameters[name] - value).abs().max() > 1e-2 for name, value in trained[1].parameters.items())


def test_one_pass_over_histories_learns(world: Path, configure: Configure, tmp_path: Path) -> None:
    output = io.StringIO()
    config = configure(training__epochs=6, history__pooling="transformer", item_id__min_count=1)
    run(config, world, tmp_path / "state", console=Console(file=output, width=200))
    lines = [line.split() for line in output.getvalue().splitlines()]
    assert float(lines[-1][3]) < float(lines[0][3])
    # A popularity ranking finds 8 of 40 unseen items at 10 about as often as chance: 10 / 32.
    assert max(float(line[6]) for line in lines) > 0.5
