"""What a long log costs a training: `python -m benchmarks.training.data`.

Deliberately trains a few hundred steps only: reading and encoding see the whole log, a step sees its batch.
"""

import argparse
import io
import json
import multiprocessing
import resource
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from trainer.config import TrainerConfig
from trainer.encode import EncodedQueries, Tensors
from trainer.model import TwoTowers
from trainer.questions import ask
from trainer.run import prepare
from trainer.train import HeldOut, train_towers

NUM_INTERACTIONS = 10_000_000
NUM_INTERACTIONS_QUICK = 1_000_000
NUM_ITEMS = 50_000
LENGTH = 50
NUM_STEPS = 200
BATCH_SIZE = 1024
TARGET_FEEDING = 0.05
_ROWS_PER_FILE = 1_000_000
_INTERACTIONS_PER_USER = 50
_NUM_HELD_OUT = 100


class _Timed(EncodedQueries):
    """Queries that note when each batch was asked for and what it took of the processor."""

    def __init__(self, queries: EncodedQueries) -> None:
        super().__init__(queries.users, queries.user_features, queries.histories)
        # Of each batch: moment, processor time of the process until then, and of making the batch.
        object.__setattr__(self, "noted", [])

    def batch(self, rows: Tensor) -> Tensors:
        started_s, cpu_s = time.monotonic(), time.process_time()
        features = super().batch(rows)
        self.noted.append((started_s, cpu_s, time.process_time() - cpu_s))  # type: ignore[attr-defined]
        return features


def write_log(num_interactions: int, num_items: int, folder: Path) -> None:
    """A log of string ids, a file a million rows, its items popular by a power law; and the table of the items."""
    random = np.random.default_rng(0)
    num_users = num_interactions // _INTERACTIONS_PER_USER
    (folder / "log").mkdir()
    for start in range(0, num_interactions, _ROWS_PER_FILE):
        size = min(_ROWS_PER_FILE, num_interactions - start)
        items = (num_items * random.random(size) ** 3).astype(np.int64)
        columns = {
            "user_id": pa.array(random.integers(num_users, size=size)).cast(pa.string()),
            "item_id": pa.array(items).cast(pa.string()),
            "timestamp": start + np.arange(size),
        }
        pq.write_table(pa.table(columns), folder / "log" / f"{start:012}.parquet")
    pq.write_table(pa.table({"item_id": [str(item) for item in range(num_items)]}), folder / "items.parquet")


def configuration(seed: int) -> TrainerConfig:
    """Histories of 50 items in the query tower, item ids in the item tower, 64 dimensions."""
    declared = {
        "data": {"interactions": "log", "items": "items.parquet"},
        "features": [
            {"name": "history", "owner": "query", "kind": "sequence", "items": "item_id", "max_length": LENGTH},
            {"name": "item_id", "owner": "item", "kind": "categorical"},
        ],
        "model": {"dim": 64, "embedding_dim": 64},
        "training": {"batch_size": BATCH_SIZE, "epochs": 1, "seed": seed},
    }
    return TrainerConfig.model_validate_json(json.dumps(declared))


def measure(num_interactions: int, num_items: int, num_steps: int, folder: Path) -> dict[str, Any]:
    """Writes a log in another process, then reads it here and trains on a random sample of it.

    Args:
        num_interactions: N.
        num_items: I.
        num_steps: Steps of 1,024 examples.
        folder: Empty; takes the log.

    Returns:
        The figures by name.
    """
    writer = multiprocessing.get_context("spawn").Process(target=write_log, args=(num_interactions, num_items, folder))
    writer.start()
    writer.join()
    config = configuration(seed=0)
    before_bytes, started_s = _peak_bytes(), time.monotonic()
    prepared = prepare(config, folder)
    prepared_s, prepared_bytes = time.monotonic() - started_s, _peak_bytes()

    questions = ask(prepared.log, prepared.split.validation[:_NUM_HELD_OUT], exclude_seen=True)
    validation = HeldOut(prepared.encoder.queries(questions.positions), questions)
    num_examples = len(prepared.examples.positives)
    sample = torch.from_numpy(np.random.default_rng(0).permutation(num_examples)[: num_steps * BATCH_SIZE])
    whole = prepared.examples.queries
    histories = {
        name: replace(history, starts=history.starts[sample], lengths=history.lengths[sample])
        for name, history in whole.histories.items()
    }
    queries = _Timed(EncodedQueries(whole.users[sample], whole.user_features, histories))
    examples = replace(prepared.examples, queries=queries, positives=prepared.examples.positives[sample])
    model = TwoTowers(prepared.fitted.schema, prepared.encoder.query, prepared.encoder.item, config.model)
    state_file = folder / "state.safetensors"
    train_towers(model, prepared.items, examples, validation, config, {}, state_file, Console(file=io.StringIO()))

    noted: list[tuple[float, float, float]] = queries.noted  # type: ignore[attr-defined]
    (first_s, first_cpu_s, _), (last_s, last_cpu_s, _) = noted[0], noted[-1]
    feeding_s = sum(taken_s for _, _, taken_s in noted[:-1])
    return {
        "interactions": num_interactions,
        "items": num_items,
        "log_mb": sum(file.stat().st_size for file in (folder / "log").iterdir()) / 1e6,
        "prepare_s": prepared_s,
        "imports_mb": before_bytes / 1e6,
        "peak_mb": prepared_bytes / 1e6,
        "peak_bytes_per_interaction": (prepared_bytes - before_bytes) / num_interactions,
        "examples_per_s": (len(noted) - 1) * BATCH_SIZE / (last_s - first_s),
        "feeding_share": feeding_s / (last_cpu_s - first_cpu_s),
    }


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Runs from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    quick = f"{NUM_INTERACTIONS_QUICK:,} interactions instead of {NUM_INTERACTIONS:,}"
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="log-") as folder:
        num_interactions = NUM_INTERACTIONS_QUICK if options.quick else NUM_INTERACTIONS
        figures = measure(num_interactions, NUM_ITEMS, NUM_STEPS, Path(folder))
    table = Table(
        title=f"{figures['interactions']:,} interactions with {figures['items']:,} items, histories of {LENGTH}"
    )
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row("log on disk, MB", f"{figures['log_mb']:,.0f}")
    table.add_row("reading, fitting, encoding, s", f"{figures['prepare_s']:.1f}")
    table.add_row("memory after imports, MB", f"{figures['imports_mb']:,.0f}")
    table.add_row("peak memory, MB", f"{figures['peak_mb']:,.0f}")
    table.add_row("the difference, bytes an interaction", f"{figures['peak_bytes_per_interaction']:.0f}")
    table.add_row("examples a second", f"{figures['examples_per_s']:,.0f}")
    table.add_row("processor time of a step that makes its batch", f"{figures['feeding_share']:.1%}")
    reached = figures["feeding_share"] < TARGET_FEEDING
    table.add_row(f"target: under {TARGET_FEEDING:.0%}", "reached" if reached else "missed")
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
