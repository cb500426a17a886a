"""Callers that go away: `python -m benchmarks.serving.cancel`.

Deliberately nothing but the real service and its shards: half of the calls, chosen at random, are given up at a random
moment. What the processes hold afterwards is compared with what they held before, after as many calls that were not.
"""

import argparse
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.serving.load import OK, Closed, Generators, Load
from benchmarks.serving.services import (
    RETRIEVE,
    QueryProcess,
    World,
    num_descriptors,
    resident_bytes,
    retrieve_requests,
    shards_with,
)

K = 100
CANCELLED_SHARE = 0.5
GROWTH = 0.05
"""Of memory, that an allocator may keep."""
_NUM_SHARDS = 2
_DIM = 64
_NUM_QUERIES = 2000
_IN_FLIGHT = 64
_BURST_S = 2.0
_PATIENCE_S = 10.0
_POLL_S = 0.1


@dataclass(frozen=True)
class Length:
    """How much is measured."""

    num_items: int
    num_calls: int
    burst_s: float = _BURST_S


FULL = Length(num_items=100_000, num_calls=100_000)
QUICK = Length(num_items=100_000, num_calls=10_000)


def measure(length: Length, folder: Path, console: Console) -> dict[str, Any]:
    """Calls, compares and tells.

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
        Generators(1) as generators,
        Progress(console=console) as progress,
    ):
        requests = [request.SerializeToString() for request in retrieve_requests(world.features, K)]

        def call(description: str, num_calls: int, cancelled_share: float) -> dict[str, int]:
            task = progress.add_task(description, total=num_calls)
            statuses: dict[str, int] = {}
            while sum(statuses.values()) < num_calls:
                load = Load(
                    service.address,
                    RETRIEVE,
                    requests,
                    Closed(_IN_FLIGHT),
                    length.burst_s,
                    cancelled_share=cancelled_share,
                )
                for status, count in generators.run(load).num_by_status.items():
                    statuses[status] = statuses.get(status, 0) + count
                progress.update(task, completed=sum(statuses.values()))
            return statuses

        # Caches, arenas and learnt times are full before anything is compared.
        call("calls that are not given up", max(1, length.num_calls // 5), 0.0)
        call("warming", max(1, length.num_calls // 10), CANCELLED_SHARE)
        before = _held(world, service)
        statuses = call("calls, half of them given up", length.num_calls, CANCELLED_SHARE)
        give_up_s = time.monotonic() + _PATIENCE_S
        while (after := _held(world, service)) and _grown(before, after) and time.monotonic() < give_up_s:
            time.sleep(_POLL_S)
        answered = call("and they are answered", 1, 0.0)
    return {
        "items": length.num_items,
        "statuses": statuses,
        "answered_afterwards": set(answered) == {OK},
        "before": before,
        "after": after,
        "grown": _grown(before, after),
    }


def _held(world: World, service: QueryProcess) -> dict[str, int]:
    """What the processes hold, by name."""
    vitals = service.vitals()
    held = {
        "query service, tasks": vitals.num_tasks,
        "query service, descriptors": vitals.num_descriptors,
        "query service, memory": vitals.resident_bytes,
    }
    for number in range(_NUM_SHARDS):
        pid = world.stack.pid(f"shard-{number}")
        held[f"shard {number}, descriptors"] = num_descriptors(pid)
        held[f"shard {number}, memory"] = resident_bytes(pid)
    return held


def _grown(before: dict[str, int], after: dict[str, int]) -> list[str]:
    """What there is more of."""
    return [
        name for name, count in after.items() if count > before[name] * (1 + GROWTH if name.endswith("memory") else 1)
    ]


def shown(figures: dict[str, Any]) -> Table:
    """The figures as a table."""
    calls = ", ".join(f"{count:,} {status}" for status, count in figures["statuses"].items())
    table = Table(
        title=f"{figures['items']:,} x {_DIM}, k = {K}, {_NUM_SHARDS} shards, {_IN_FLIGHT} in flight: {calls}"
    )
    for column in ("", "before", "after", "target", ""):
        table.add_column(column, justify="left" if column == "" else "right")
    for name, count in figures["after"].items():
        is_memory = name.endswith("memory")
        cells = [f"{value / 1e6:,.1f} MB" if is_memory else f"{value:,}" for value in (figures["before"][name], count)]
        target = f"{GROWTH:.0%} more at most" if is_memory else "no more"
        table.add_row(name, *cells, target, "missed" if name in figures["grown"] else "reached")
    return table


def main() -> None:
    """Runs from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK.num_calls:,} calls")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory(prefix="cancel-") as folder:
        figures = measure(QUICK if options.quick else FULL, Path(folder), console)
    console.print(shown(figures))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
