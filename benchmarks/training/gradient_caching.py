"""A batch of 65,536 in the memory of one of 4,096: `python -m benchmarks.training.gradient_caching`.

Deliberately takes one step of each kind, in a process of its own each: memory that one left would be the next one's.
"""

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.training.data import configuration, write_log
from trainer import losses
from trainer.likes import Likes
from trainer.model import TwoTowers
from trainer.negatives import Sources
from trainer.run import prepare
from trainer.step import backward

MOST_MEMORY = 1.5
"""Times that of the process of the plain step, which itself holds few of its scores at a time."""
_TOLERANCE = 1e-4
"""Of the gradients, as a share of the largest."""
_NUM_ITEMS = 50_000


@dataclass(frozen=True)
class Step:
    """One step, in a process of its own."""

    batch_size: int
    chunk_size: int | None

    @property
    def name(self) -> str:
        """Of its row."""
        return f"{self.batch_size:,}" + (f" in chunks of {self.chunk_size:,}" if self.chunk_size else "")


@dataclass(frozen=True)
class Length:
    """How much is measured."""

    plain: Step
    same: Step
    large: Step


FULL = Length(plain=Step(4096, None), same=Step(4096, 512), large=Step(65_536, 4096))
QUICK = Length(plain=Step(1024, None), same=Step(1024, 128), large=Step(16_384, 1024))


def measure(length: Length, num_items: int, folder: Path) -> dict[str, Any]:
    """Takes each step, and compares the gradients of the first two.

    Args:
        length: The steps.
        num_items: I.
        folder: Empty; takes the log.

    Returns:
        The figures by name.
    """
    spawning = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawning) as writer:
        writer.submit(write_log, 2 * length.large.batch_size, num_items, folder).result()
    steps = {}
    for step in (length.plain, length.same, length.large):
        with ProcessPoolExecutor(1, spawning) as process:
            steps[step.name] = process.submit(_taken, step, folder).result()
    plain, same, large = (steps[step.name] for step in (length.plain, length.same, length.large))
    largest = max(gradient.abs().max().item() for gradient in plain["gradients"].values())
    difference = max(
        (gradient - same["gradients"][name]).abs().max().item() for name, gradient in plain["gradients"].items()
    )
    return {
        "steps": {
            name: {key: value for key, value in step.items() if key != "gradients"} for name, step in steps.items()
        },
        "gradient_difference": difference / largest,
        "step_memory_ratio": large["step_mb"] / plain["step_mb"],
        "memory_ratio": large["process_mb"] / plain["process_mb"],
        "reached": large["process_mb"] <= MOST_MEMORY * plain["process_mb"] and difference <= _TOLERANCE * largest,
    }


def _taken(step: Step, folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    config = configuration(seed=0)
    options = config.training.model_copy(update={"batch_size": step.batch_size, "chunk_size": step.chunk_size})
    prepared = prepare(config, folder)
    model = TwoTowers(prepared.fitted.schema, prepared.encoder.query, prepared.encoder.item, config.model)
    temperature = losses.Temperature(options.temperature, options.learn_temperature)
    users, positives = prepared.examples.queries.users, prepared.examples.positives
    likes = Likes.of(users, positives, int(users.max()) + 1, len(prepared.item_counts))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    sources = Sources(prepared.examples.log_q, config.model.dim, options)
    rows = torch.randperm(len(positives))[: step.batch_size]
    # Linux forgets the peak of what came before.
    Path("/proc/self/clear_refs").write_text("5")
    before_kb, started_s = _resident_kb("VmRSS"), time.perf_counter()
    figures = backward(
        model, temperature, prepared.items, prepared.examples, rows, sources, likes, None, options, epoch=0, step=0
    )
    seconds, peak_kb = time.perf_counter() - started_s, _resident_kb("VmHWM")
    return {
        "loss": figures.loss,
        "step_mb": (peak_kb - before_kb) / 1e3,
        "process_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        "examples_per_s": step.batch_size / seconds,
        "gradients": {name: parameter.grad for name, parameter in model.named_parameters()},
    }


def _resident_kb(name: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0])


def shown(figures: Mapping[str, Any]) -> Table:
    """The figures as a table."""
    table = Table(title=f"one step, {_NUM_ITEMS:,} items, histories of 50, 64 dimensions")
    for column in ("batch", "memory of the step, MB", "of the process, MB", "examples/s"):
        table.add_column(column, justify="left" if column == "batch" else "right")
    for name, step in figures["steps"].items():
        table.add_row(name, f"{step['step_mb']:,.0f}", f"{step['process_mb']:,.0f}", f"{step['examples_per_s']:,.0f}")
    table.caption = (
        f"memory of the process {figures['memory_ratio']:.2f} times the plain one's, at most {MOST_MEMORY} "
        f"(of the step {figures['step_memory_ratio']:.2f}); gradients of the same batch differ by "
        f"{figures['gradient_difference']:.1e} of the largest, at most {_TOLERANCE}: "
        f"{'reached' if figures['reached'] else 'missed'}"
    )
    return table


def main() -> None:
    """Runs from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a quarter of the sizes")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="log-") as folder:
        figures = measure(QUICK if options.quick else FULL, _NUM_ITEMS, Path(folder))
    Console().print(shown(figures))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
