from pathlib import Path

from benchmarks.training import data


def test_a_short_log_is_written_read_and_trained_on(tmp_path: Path) -> None:
    figures = data.measure(20_000, 200, 3, tmp_path)
    assert figures["interactions"] == 20_000
    assert figures["peak_mb"] >= figures["imports_mb"] > 0
    assert figures["examples_per_s"] > 0
    assert 0 < figures["feeding_share"] < 1
