"""Every process restarted in turn while clients call: shards, query services with workers, cache, controller."""

from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.serving.rolling_restart import Sizes, measure

pytestmark = pytest.mark.timeout(300)  # Nine processes start, then one after another.


def test_no_call_fails_while_every_process_is_restarted(tmp_path: Path) -> None:
    figures = measure(Sizes(rounds=1, num_items=500, rate_per_s=20.0), tmp_path, Console(quiet=True))
    assert figures["restarts"] == figures["processes"] == 8
    assert figures["exit_codes_not_0"] == 0
    assert (figures["errors"], figures["wrong"], figures["first_fault"]) == (0, 0, "")
    assert figures["answers"] > 0
