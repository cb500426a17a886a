"""The benchmark of the path, on a catalogue that is small enough to be exact."""

from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.serving import path
from benchmarks.serving.path import TARGETS, Length, measure, shown


def test_the_benchmark_of_the_path_measures_every_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(path, "_WARM_UP_S", 0.1)
    figures = measure(Length(num_items=2000, rounds=1, burst_s=0.05), tmp_path, Console(quiet=True))
    assert all(median > 0 for by_side in figures["medians"].values() for median in by_side.values())
    assert figures["recall"] == {"Retrieve": 1.0, "in process": 1.0}
    assert len(figures["ratios"]) == sum(map(len, TARGETS.values()))
    for row in figures["ratios"]:
        assert row["reached"] == (row["ratio"] <= row["bound"] if row["is_most"] else row["ratio"] >= row["bound"])
    medians, ratios = shown(figures)
    assert ratios.row_count == len(figures["ratios"])
    assert medians.row_count > len(figures["medians"])
