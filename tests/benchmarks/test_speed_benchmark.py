"""The speed benchmark on a tiny log: all sides take their steps, and a peer that is not there is left out."""

from pathlib import Path

from rich.console import Console

from benchmarks.training import speed
from benchmarks.training.speed import SLEEPING, TFRS, Length
from benchmarks.training.steps import ADAMW, NONE, ROWWISE


def test_every_side_takes_steps_in_turn(tmp_path: Path) -> None:
    length = Length(num_users=40, num_items=60, batch_sizes=(16, 32), burst_examples=64, rounds=2)
    figures = speed.measure(length, num_threads=1, peer_python=tmp_path / "none", folder=tmp_path)
    assert set(figures["batches"]) == {"16", "32"}
    for found in figures["batches"].values():
        assert set(found["examples_per_s"]) == {ROWWISE, ADAMW, NONE, SLEEPING}
        assert min(found["examples_per_s"].values()) > 0
        assert 0 < found["feeding_share"] < 1
        assert found["worst_ratios"][ADAMW] <= found["ratios"][ADAMW]
    assert "No such file" in figures["skipped"][TFRS]

    console = Console(record=True, width=160)
    console.print(speed.shown(figures))
    printed = console.export_text()
    assert "left out" in printed
