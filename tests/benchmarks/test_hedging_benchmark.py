"""The benchmark of hedging, on a catalogue that is small enough to be exact."""

from pathlib import Path

from rich.console import Console

from benchmarks.serving.hedging import DELAY_S, Length, measure, shown


def test_the_benchmark_of_hedging_slows_one_replica(tmp_path: Path) -> None:
    length = Length(num_items=2000, rounds=1, rate_per_s=60.0, burst_s=1.0)
    figures = measure(length, tmp_path, Console(quiet=True))
    # Half of the first shard's calls go the slow way where nobody hedges.
    assert figures["plain_p99_s"] > DELAY_S
    assert figures["plain_extra_share"] == 0
    assert figures["hedging_num_failed"] == figures["plain_num_failed"] == 0
    assert figures["p99_reached"] == (figures["p99_share"] <= 0.5)
    assert shown(figures).row_count == 6
