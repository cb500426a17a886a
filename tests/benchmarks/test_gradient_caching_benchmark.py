import sys
from pathlib import Path

import pytest

from benchmarks.training import gradient_caching
from benchmarks.training.gradient_caching import Length, Step


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a step is read from /proc, which Linux alone has")
def test_steps_are_taken_and_compared(tmp_path: Path) -> None:
    length = Length(plain=Step(64, None), same=Step(64, 16), large=Step(512, 64))
    figures = gradient_caching.measure(length, 300, tmp_path)
    assert list(figures["steps"]) == ["64", "64 in chunks of 16", "512 in chunks of 64"]
    assert figures["gradient_difference"] < 1e-4
    losses = [step["loss"] for step in figures["steps"].values()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[2] != losses[0]
    assert gradient_caching.shown(figures).row_count == 3
