import io
from collections.abc import Callable
from pathlib import Path

import pytest
import taken_steps
import torch
from rich.console import Console
from torch import Tensor, nn

from trainer import losses, state
from trainer.config import TrainerConfig
from trainer.model import TwoTowers
from trainer.optimisers import Optimisers, RowwiseAdagrad
from trainer.run import prepare
from trainer.tables import Table
from trainer.train import train_towers

Configure = Callable[..., TrainerConfig]
ROWWISE = {
    "training__table_optimiser": "adagrad",
    "training__table_learning_rate": 0.05,
}


def sparse_table() -> Table:
    torch.manual_seed(0)
    table = Table(6, 3)
    table.sparse = True
    return table


def test_a_step_is_that_of_a_dense_reference() -> None:
    """Three steps, whose rows come once, twice and never, against a loop over all rows."""
    table = sparse_table()
    optimiser = RowwiseAdagrad([table.weight])
    expected, sums = table.weight.detach().clone().tolist(), [0.0] * 6
    for step, ids in enumerate(([1, 2, 2], [2, 4], [5, 1])):
        table.weight.grad = None
        target = torch.randn(len(ids), 3, generator=torch.Generator().manual_seed(step))
        (table(torch.tensor(ids)) * target).sum().backward()  # type: ignore[no-untyped-call]
        dense = [[0.0] * 3 for _ in range(6)]
        for row, values in zip(ids, target.tolist(), strict=True):
            dense[row] = [total + value for total, value in zip(dense[row], values, strict=True)]
        for row, gradient in enumerate(dense):
            sums[row] += sum(value**2 for value in gradient) / 3
            if any(gradient):
                rate = 0.5 / (sums[row] ** 0.5 + 1e-8)
                expected[row] = [old - rate * value for old, value in zip(expected[row], gradient, strict=True)]
        optimiser.step(0.5)
        torch.testing.assert_close(table.weight.detach(), torch.tensor(expected))
        torch.testing.assert_close(optimiser.state[table.weight]["sum"], torch.tensor(sums))


def test_rows_that_no_batch_reads_stay_as_they_are() -> None:
    table = sparse_table()
    optimiser, before = RowwiseAdagrad([table.weight]), table.weight.detach().clone()
    for _ in range(3):
        table.weight.grad = None
        table.mean(torch.tensor([[1, 3, 0]])).sum().backward()  # type: ignore[no-untyped-call]
        optimiser.step(0.1)
    is_changed = (table.weight != before).any(dim=1)
    assert is_changed.tolist() == [False, True, False, True, False, False]


def test_a_gradient_of_zero_changes_nothing() -> None:
    table = sparse_table()
    optimiser, before = RowwiseAdagrad([table.weight]), table.weight.detach().clone()
    (table(torch.tensor([1])) * 0.0).sum().backward()  # type: ignore[no-untyped-call]
    optimiser.step(0.1)
    assert torch.equal(table.weight, before)


def towers(config: TrainerConfig, world: Path) -> TwoTowers:
    prepared = prepare(config, world)
    torch.manual_seed(0)
    return TwoTowers(prepared.fitted.schema, prepared.encoder.query, prepared.encoder.item, config.model)


def tables_of(model: TwoTowers) -> set[Tensor]:
    return {table.weight for table in model.modules() if isinstance(table, Table)}


def test_tables_have_adagrad_and_all_else_adamw(world: Path, configure: Configure) -> None:
    config = configure(history__pooling="attention", training__learn_temperature=True, **ROWWISE)
    model = towers(config, world)
    temperature = losses.Temperature(0.1, is_learned=True)
    optimisers = Optimisers(model, temperature, config.training)
    assert all(table.sparse for table in model.modules() if isinstance(table, Table))
    for parameter in [*model.parameters(), *temperature.parameters()]:
        gradient = torch.ones_like(parameter)
        parameter.grad = gradient.to_sparse(1) if parameter in tables_of(model) else gradient
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimisers.step(0.01)
    for name, parameter in model.named_parameters():
        # The first step of either is the learning rate, whatever the gradient's size.
        expected = 0.05 if parameter in tables_of(model) else 0.01
        torch.testing.assert_close(before[name] - parameter, torch.full_like(parameter, expected), msg=name)
    moments = optimisers.moments()
    of_tables = {name for name, parameter in model.named_parameters() if parameter in tables_of(model)}
    assert len(of_tables) > 5
    for name, kept in moments.items():
        is_table = name.removeprefix("towers.") in of_tables
        assert kept.keys() == ({"sum"} if is_table else {"step", "exp_avg", "exp_avg_sq"}), name
    assert moments.keys() == {f"towers.{name}" for name in before} | {"temperature.log"}


def test_tables_under_adamw_have_their_own_learning_rate_too(world: Path, configure: Configure) -> None:
    config = configure(training__table_learning_rate=0.05)
    model = towers(config, world)
    optimisers = Optimisers(model, losses.Temperature(0.1, is_learned=False), config.training)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimisers.step(0.02)
    for name, parameter in model.named_parameters():
        # Configured are 0.05 for tables and 0.01 for all else; a schedule that doubles one doubles the other.
        expected = 0.1 if parameter in tables_of(model) else 0.02
        torch.testing.assert_close(before[name] - parameter, torch.full_like(parameter, expected), msg=name)


@pytest.mark.parametrize("changes", [{}, {"training__chunk_size": 7}, {"training__history_share": 0.5}])
def test_gradients_are_those_of_dense_tables(world: Path, configure: Configure, changes: dict[str, object]) -> None:
    found = []
    for optimiser in ("adamw", "adagrad"):
        config = configure(training__table_optimiser=optimiser, **changes)
        found.append(taken_steps.take_steps(config, world)[1])
    dense, sparse = found
    assert dense.keys() == sparse.keys()
    for name, gradient in sparse.items():
        torch.testing.assert_close(gradient, dense[name], msg=name)


def test_rowwise_training_learns_and_keeps_rows_that_are_never_read(
    world: Path, configure: Configure, tmp_path: Path
) -> None:
    config = configure(training__epochs=6, **ROWWISE)
    prepared, model = prepare(config, world), towers(config, world)
    start = {
        name: parameter.detach().clone() for name, parameter in nn.ModuleDict({"towers": model}).named_parameters()
    }
    output = io.StringIO()
    finished = train_towers(
        model,
        prepared.items,
        prepared.examples,
        prepared.validation,
        config,
        {},
        tmp_path / "state",
        Console(file=output, width=200),
    )
    losses_by_epoch = [float(line.split()[3]) for line in output.getvalue().splitlines()]
    assert losses_by_epoch[-1] < losses_by_epoch[0]
    assert finished.progress.best_metric > 0.4
    # Of eight hash buckets four segments take up four at most; no row is the missing one's but user 3's.
    name = "towers.query.tables.feature_segment.weight"
    read = torch.unique(prepared.examples.queries.user_features["segment"][prepared.examples.queries.users])
    is_changed = (finished.parameters[name] != start[name]).any(dim=1)
    assert is_changed.nonzero().squeeze(1).tolist() == read.tolist()
    assert not is_changed.all()
    assert state.load_state(tmp_path / "state").moments[name]["sum"].gt(0).equal(is_changed)
