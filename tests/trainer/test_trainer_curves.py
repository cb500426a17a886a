"""Curves are read back as TensorBoard reads them."""

import io
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from towers.checkpoint import CheckpointStore
from towers.store import Store
from trainer import curves
from trainer.run import train


def points(folder: Path, name: str) -> list[tuple[int, float]]:
    shown = EventAccumulator(str(folder)).Reload()
    return [(event.step, pytest.approx(event.value)) for event in shown.Scalars(name)]


def test_epochs_that_are_done_again_are_shown_once(tmp_path: Path) -> None:
    with curves.written(tmp_path, 0) as note:
        for epoch, loss in ((1, 3.0), (2, 2.0), (3, 1.0)):
            note(epoch, {"loss": loss})
    with curves.written(tmp_path, 1) as note:
        note(2, {"loss": 2.5})
    assert points(tmp_path, "loss") == [(1, 3.0), (2, 2.5)]


def test_a_training_writes_what_its_manifest_says(world: Path) -> None:
    (world / "toy.toml").write_text("tensorboard = true\n" + (world / "toy.toml").read_text())
    report = train(world / "toy.toml", store=str(world / "store"), resume=False, console=Console(file=io.StringIO()))
    assert report is not None
    epochs = CheckpointStore(Store(str(world / "store"))).manifest(report.version).epochs
    folder = report.run_folder / "tensorboard"
    assert points(folder, "loss") == [(epoch, figures.loss) for epoch, figures in enumerate(epochs, start=1)]
    assert points(folder, "validation/ndcg_at_10")
    assert points(folder, "learning_rate")
