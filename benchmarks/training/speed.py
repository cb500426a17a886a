"""Examples a second of a training step, beside its floor and a peer: `python -m benchmarks.training.speed`.

Deliberately keeps all processes up and asks each in turn for a short burst: ratios are of one round, their median
counts. TensorFlow Recommenders wants an environment of its own, whose Python `--peer-python` names:

    python -m venv tfrs && tfrs/bin/pip install tensorflow-cpu tf-keras tensorflow-recommenders
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.process import Process
from benchmarks.training.data import write_log
from benchmarks.training.steps import ADAMW, NONE, ROWWISE

TFRS = "TensorFlow Recommenders, Adagrad"
SLEEPING = f"{ROWWISE}, passive"
"""As `twotower train` waits unless told otherwise: slower alone on a machine, many times faster beside others."""
TARGETS: Mapping[str, float] = {TFRS: 1.0, ADAMW: 3.0, NONE: 0.6}
"""Examples a second with row-wise Adagrad, at least, as a share of each."""
MOST_FEEDING = 0.05
"""Share of a step that makes its batch."""
_TFRS_SCRIPT = Path(__file__).with_name("tfrs_steps.py")


@dataclass(frozen=True)
class Length:
    """How much is measured."""

    num_users: int
    num_items: int
    batch_sizes: Sequence[int]
    burst_examples: int
    """Of each burst, at least two steps."""
    rounds: int


FULL = Length(50_000, 50_000, (1024, 4096), burst_examples=32_768, rounds=9)
QUICK = Length(50_000, 50_000, (1024, 4096), burst_examples=8_192, rounds=3)


def measure(length: Length, num_threads: int, peer_python: Path | None, folder: Path) -> dict[str, Any]:
    """Writes a log, then lets all sides take bursts in turn.

    Args:
        length: Sizes and rounds.
        num_threads: Of each process.
        peer_python: That has TensorFlow Recommenders; None leaves it out.
        folder: Empty; takes the log.

    Returns:
        The figures by name.
    """
    write_log(50 * length.num_users, length.num_items, folder)
    ours = [sys.executable, "-m", "benchmarks.training.steps", str(folder), str(num_threads)]
    threads = {"OMP_NUM_THREADS": str(num_threads)}
    with ExitStack() as stack:

        def started(command: Sequence[str], environment: Mapping[str, str]) -> Process:
            process = Process(command, environment)
            stack.callback(process.close)
            return process

        waiting = {**threads, "OMP_WAIT_POLICY": "PASSIVE"}
        # Not for ever, as with the policy "active": that would take a core from all other sides.
        spinning, passive = started(ours, {**waiting, "GOMP_SPINCOUNT": "300000"}), started(ours, waiting)
        sides: dict[str, tuple[Process, str]] = {name: (spinning, name) for name in (ROWWISE, ADAMW, NONE)}
        sides[SLEEPING] = (passive, ROWWISE)
        versions, skipped = {"ours": spinning.version}, {}
        if peer_python is None:
            skipped[TFRS] = "no --peer-python"
        else:
            sizes = [str(size) for size in (length.num_users, length.num_items, num_threads)]
            try:
                peer = started([str(peer_python), str(_TFRS_SCRIPT), *sizes], threads)
            except (OSError, RuntimeError) as error:
                skipped[TFRS] = str(error)
            else:
                sides[TFRS] = (peer, TFRS)
                versions[TFRS] = peer.version
        rounds = {
            batch_size: [_round(sides, batch_size, length.burst_examples) for _ in range(length.rounds)]
            for batch_size in length.batch_sizes
        }
    return {
        "users": length.num_users,
        "items": length.num_items,
        "threads": num_threads,
        "versions": versions,
        "skipped": skipped,
        "batches": {str(batch_size): _figures(found) for batch_size, found in rounds.items()},
    }


def _round(sides: Mapping[str, tuple[Process, str]], batch_size: int, burst_examples: int) -> dict[str, Any]:
    """A burst of each side: examples a second, and what share of its time made batches."""
    num_steps = max(2, burst_examples // batch_size)
    found: dict[str, Any] = {}
    for name, (process, variant) in sides.items():
        took = process.ask(variant=variant, batch_size=batch_size, num_steps=num_steps)
        found[name] = {
            "examples_per_s": num_steps * batch_size / took["seconds"],
            "feeding_share": took["feeding_s"] / took["seconds"],
        }
    return found


def _figures(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds; of ratios, that of the rounds' ratios."""
    names = list(rounds[0])

    def median(name: str, figure: str) -> float:
        return float(statistics.median(found[name][figure] for found in rounds))

    ratios = {
        name: sorted(found[ROWWISE]["examples_per_s"] / found[name]["examples_per_s"] for found in rounds)
        for name in names
        if name != ROWWISE
    }
    return {
        "examples_per_s": {name: median(name, "examples_per_s") for name in names},
        "feeding_share": median(ROWWISE, "feeding_share"),
        "ratios": {name: statistics.median(values) for name, values in ratios.items()},
        "worst_ratios": {name: values[0] for name, values in ratios.items()},
    }


def shown(figures: Mapping[str, Any]) -> Table:
    """The figures as a table, beside the targets."""
    versions = "; ".join(f"{name}: {version}" for name, version in figures["versions"].items())
    table = Table(
        title=f"{figures['users']:,} users, {figures['items']:,} items, histories of 50, {figures['threads']} threads",
        caption="\n".join([versions, *(f"{name}: left out, {why}" for name, why in figures["skipped"].items())]),
    )
    for column in ("batch", "step", "examples/s", "row-wise is", "worst round", "target", ""):
        table.add_column(column, justify="left" if column in ("step", "") else "right")
    for batch_size, found in figures["batches"].items():
        for name, rate in found["examples_per_s"].items():
            ratio, target = found["ratios"].get(name), TARGETS.get(name)
            table.add_row(
                f"{int(batch_size):,}",
                name,
                f"{rate:,.0f}",
                "" if ratio is None else f"{ratio:.2f} x",
                "" if ratio is None else f"{found['worst_ratios'][name]:.2f} x",
                "" if target is None else f"{target:.1f} x",
                "" if target is None or ratio is None else _judged(ratio >= target),
            )
        share = found["feeding_share"]
        reached = _judged(share < MOST_FEEDING)
        table.add_row(
            f"{int(batch_size):,}", "making the batch", f"{share:.1%} of it", "", "", f"< {MOST_FEEDING:.0%}", reached
        )
        table.add_section()
    return table


def _judged(is_reached: bool) -> str:
    return "reached" if is_reached else "missed"


def main() -> None:
    """Runs from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK.rounds} short rounds instead of {FULL.rounds}")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--threads", type=int, default=2, help="of each process")
    parser.add_argument(
        "--peer-python", type=Path, help="a Python that has tensorflow, tensorflow-recommenders, tf-keras"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="log-") as folder:
        figures = measure(QUICK if options.quick else FULL, options.threads, options.peer_python, Path(folder))
    Console().print(shown(figures))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
