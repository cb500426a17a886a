"""The benchmark of overload, on a catalogue that is small enough to be exact."""

from pathlib import Path

from rich.console import Console

from benchmarks.serving.overload import Length, measure, shown


def test_the_benchmark_of_overload_measures_a_flood(tmp_path: Path) -> None:
    figures = measure(Length(num_items=2000, rounds=1, burst_s=0.4), tmp_path, Console(quiet=True))
    assert figures["offered_per_s"] > figures["peak_per_s"] > 0
    assert figures["goodput_per_s"] > 0
    assert 0 <= figures["rejected_share"] < 1
    assert figures["rejected_share"] or not figures["rejection_reached"]
    assert figures["goodput_reached"] == (figures["goodput_share"] >= 0.8)
    assert shown(figures).row_count == 9
