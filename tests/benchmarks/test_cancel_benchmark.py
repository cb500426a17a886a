"""The benchmark of callers that go away, on a catalogue that is small enough to be exact."""

from pathlib import Path

from rich.console import Console

from benchmarks.serving.cancel import Length, measure, shown


def test_the_benchmark_of_cancelling_leaves_nothing_behind(tmp_path: Path) -> None:
    figures = measure(Length(num_items=2000, num_calls=400, burst_s=0.3), tmp_path, Console(quiet=True))
    assert figures["statuses"]["CANCELLED"] > 0
    assert set(figures["statuses"]) == {"OK", "CANCELLED"}
    assert figures["answered_afterwards"]
    # Memory may still grow with so few calls.
    assert [name for name in figures["grown"] if not name.endswith("memory")] == []
    assert shown(figures).row_count == 7
