"""Five times more than can be answered: `python -m benchmarks.serving.overload`.

Deliberately one service, the real shards, and load that does not wait for answers, all on this machine: what the load
generators take of the processors is taken from the service, so their share is told too. Goodput is what is answered
in full and in time. Single queries cost little more than gRPC itself: where an echo that does nothing answers fewer
calls than are offered, no service can refuse them all in time. Batches show what admission does where a call costs
more than its refusal.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.bar import Bar
from rich.console import Console
from rich.table import Table

from benchmarks.serving.floors import ECHO, EchoServer, Sizes
from benchmarks.serving.load import OK, Closed, Generators, Load, Measured, Open
from benchmarks.serving.services import (
    BATCH_RETRIEVE,
    RETRIEVE,
    QueryProcess,
    batch_requests,
    retrieve_requests,
    shards_with,
)

K = 100
TIMES_CAPACITY = 5
GOODPUT_SHARE = 0.8
REJECTION_S = 0.01
RECOVERY_S = 5.0
_REJECTED = "RESOURCE_EXHAUSTED"
_NUM_SHARDS = 2
_DIM = 64
_NUM_QUERIES = 2000
_BATCH_SIZE = 64
_IN_FLIGHT = 32
_BATCHES_IN_FLIGHT = 4
_RESPONSE_BYTES = 1200
"""About what 100 items take."""
_TIMEOUT_S = 1.0
_NUM_GENERATORS = 2
_LOOK_S = 0.2
_NORMAL = 2.0
"""Times the quiet median that an answer may take when all is back to normal."""
_BAR_WIDTH = 24


@dataclass(frozen=True)
class Length:
    """How much is measured."""

    num_items: int
    rounds: int
    burst_s: float


FULL = Length(num_items=100_000, rounds=5, burst_s=6.0)
QUICK = Length(num_items=100_000, rounds=2, burst_s=3.0)


def measure(length: Length, folder: Path, console: Console) -> dict[str, Any]:
    """Runs all rounds; both kinds of calls take turns.

    Args:
        length: How much.
        folder: Empty; takes the store and the logs.
        console: Where progress is told.

    Returns:
        The figures by name.
    """
    console.print(f"building {length.num_items:,} items on {_NUM_SHARDS} shards", highlight=False)
    with (
        shards_with(length.num_items, _DIM, _NUM_QUERIES, folder, num_shards=_NUM_SHARDS) as world,
        QueryProcess(world) as service,
        Generators(_NUM_GENERATORS) as generators,
    ):
        singles = [request.SerializeToString() for request in retrieve_requests(world.features, K)]
        batches = [request.SerializeToString() for request in batch_requests(world.features, K, _BATCH_SIZE)]
        kinds = {
            "Retrieve": Load(service.address, RETRIEVE, singles, Closed(_IN_FLIGHT), length.burst_s, _TIMEOUT_S),
            f"BatchRetrieve of {_BATCH_SIZE}": Load(
                service.address, BATCH_RETRIEVE, batches, Closed(_BATCHES_IN_FLIGHT), length.burst_s, _TIMEOUT_S
            ),
        }
        with EchoServer(Sizes(len(singles[0]), _RESPONSE_BYTES)) as echo:
            load = Load(echo.address, ECHO, singles, Closed(_IN_FLIGHT), length.burst_s, _TIMEOUT_S)
            echo_per_s = generators.run(load).ok_per_s
        rounds: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
        for number in range(length.rounds):
            console.print(f"round {number + 1} of {length.rounds}", highlight=False)
            for kind, load in kinds.items():
                rounds[kind].append(_round(load, generators))
    return {
        "items": length.num_items,
        "times_capacity": TIMES_CAPACITY,
        "echo_per_s": echo_per_s,
        "kinds": {kind: _judged(each) for kind, each in rounds.items()},
    }


def _judged(rounds: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Medians of the rounds, and whether the targets are reached."""
    figures = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
    return {
        "rounds": list(rounds),
        **figures,
        "longest_recovery_s": max(each["recovery_s"] for each in rounds),
        "goodput_reached": figures["goodput_share"] >= GOODPUT_SHARE,
        "rejection_reached": figures["rejected_share"] > 0 and figures["rejection_p99_s"] < REJECTION_S,
        "recovery_reached": max(each["recovery_s"] for each in rounds) < RECOVERY_S,
    }


def _round(peak: Load, generators: Generators) -> dict[str, float]:
    """Quiet, as much as can be answered, five times as much, and how long it takes to calm down."""

    def run(pace: Closed | Open, seconds: float) -> Measured:
        return generators.run(replace(peak, pace=pace, seconds=seconds))

    run(peak.pace, peak.seconds / 4)
    quiet_s = run(Closed(1), peak.seconds / 4).ok.quantile_s(0.5)
    peak_per_s = run(peak.pace, peak.seconds).ok_per_s
    busy_s, start_s = _cpu_s(generators), time.monotonic()
    flood = run(Open(TIMES_CAPACITY * peak_per_s), peak.seconds)
    took_s = time.monotonic() - start_s
    share = (_cpu_s(generators) - busy_s) / took_s / (os.cpu_count() or 1)
    calm_s = time.monotonic()
    while run(Closed(1), _LOOK_S).ok.quantile_s(0.5) > _NORMAL * quiet_s:
        if time.monotonic() > calm_s + 10 * RECOVERY_S:
            break
    rejected = flood.latencies.get(_REJECTED)
    num_calls = sum(flood.num_by_status.values())
    return {
        "quiet_p50_s": quiet_s,
        "peak_per_s": peak_per_s,
        "offered_per_s": num_calls / peak.seconds,
        # Answers that come after the last call was sent took longer than the flood.
        "goodput_per_s": flood.ok.num_calls / took_s,
        "goodput_share": flood.ok.num_calls / took_s / peak_per_s,
        "answer_p99_s": flood.ok.quantile_s(0.99),
        "rejected_share": (rejected.num_calls if rejected else 0) / max(num_calls, 1),
        "rejection_p50_s": rejected.quantile_s(0.5) if rejected else 0.0,
        "rejection_p99_s": rejected.quantile_s(0.99) if rejected else 0.0,
        "other_errors": num_calls - flood.num_by_status.get(OK, 0) - (rejected.num_calls if rejected else 0),
        "generator_share": share,
        "recovery_s": time.monotonic() - calm_s,
    }


def _cpu_s(generators: Generators) -> float:
    """Processor seconds that the generators have taken."""
    ticks = 0
    for pid in generators.pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def shown(figures: Mapping[str, Any]) -> list[Table]:
    """The figures as one table for each kind of call."""
    return [_table(figures, kind) for kind in figures["kinds"]]


def _table(figures: Mapping[str, Any], kind: str) -> Table:
    mine = figures["kinds"][kind]
    table = Table(
        title=f"{kind}: {figures['items']:,} x {_DIM}, k = {K}, {_NUM_SHARDS} shards; {TIMES_CAPACITY} times as many "
        f"calls as can be answered; medians of {len(mine['rounds'])} rounds"
    )
    for column in ("", "", " " * _BAR_WIDTH, "target", ""):
        table.add_column(column, justify="right" if column == "target" else "left")
    rates = {
        "peak": mine["peak_per_s"],
        "offered": mine["offered_per_s"],
        "an echo's peak": figures["echo_per_s"],
        "goodput": mine["goodput_per_s"],
    }
    for name, rate in rates.items():
        table.add_row(f"{name}, calls a second", f"{rate:,.0f}", Bar(max(rates.values()), 0, rate, width=_BAR_WIDTH))
    rejection = f"{1000 * mine['rejection_p99_s']:.1f}" if mine["rejected_share"] else "none was made"
    rows = (
        ("goodput of peak", f"{mine['goodput_share']:.0%}", f"at least {GOODPUT_SHARE:.0%}", "goodput_reached"),
        ("a rejection takes, p99 ms", rejection, f"under {1000 * REJECTION_S:.0f}", "rejection_reached"),
        (
            "back to normal after, s, longest",
            f"{mine['longest_recovery_s']:.1f}",
            f"under {RECOVERY_S:.0f}",
            "recovery_reached",
        ),
    )
    for name, value, target, reached in rows:
        table.add_row(name, value, "", target, "reached" if mine[reached] else "missed")
    table.add_row("an answer takes, p99 ms", f"{1000 * mine['answer_p99_s']:.0f}")
    table.add_row("rejected", f"{mine['rejected_share']:.0%}")
    table.add_row("other errors", f"{mine['other_errors']:.0f}")
    table.add_row("of the processors, the load generators take", f"{mine['generator_share']:.0%}")
    return table


def main() -> None:
    """Runs from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer, shorter rounds")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory(prefix="overload-") as folder:
        figures = measure(QUICK if options.quick else FULL, Path(folder), console)
    for table in shown(figures):
        console.print(table)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
