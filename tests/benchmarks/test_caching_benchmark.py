"""The benchmark of the caches, in bursts that are too short to mean anything."""

from pathlib import Path

from benchmarks.serving.caching import BATCH_SIZES, Length, measure, shown


def test_the_benchmark_of_the_caches_measures_every_side(tmp_path: Path) -> None:
    figures = measure(Length(rounds=1, queries=64), tmp_path)
    for by_side in figures.values():
        assert len(by_side) == 6
        for by_size in by_side.values():
            assert [by_size[str(size)]["cpu_us"] > 0 for size in BATCH_SIZES] == [True, True]
    assert shown(figures).row_count == 12
