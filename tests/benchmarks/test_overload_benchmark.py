"""The benchmark of overload, on a catalogue that is small enough to be exact."""

from pathlib import Path

from rich.console import Console

from benchmarks.serving.overload import Length, measure, shown


def test_the_benchmark_of_overload_measures_a_flood(tmp_path: Path) -> None:
    figures = measure(Length(num_items=2000, rounds=1, burst_s=0.4), tmp_path, Console(quiet=True))
    assert figures["echo_per_s"] > 0
    for kind in ("Retrieve", "BatchRetrieve of 64"):
        mine = figures["kinds"][kind]
        assert mine["offered_per_s"] > mine["peak_per_s"] > 0
        assert mine["goodput_per_s"] > 0
        assert mine["rejected_share"] or not mine["rejection_reached"]
        assert mine["goodput_reached"] == (mine["goodput_share"] >= 0.8)
    assert [table.row_count for table in shown(figures)] == [11, 11]
