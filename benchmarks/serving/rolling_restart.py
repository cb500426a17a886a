"""A rolling restart of every process under load: `python -m benchmarks.serving.rolling_restart`.

Deliberately uses the real processes (shards with replicas, query services with workers, Valkey, the controller), ends
each by SIGTERM as a deployment does, and judges every answer by exact search.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from benchmarks.index.checkpoints import USER_ID, ids, lookup_checkpoint, lookup_items
from benchmarks.index.vectors import clustered
from cli.demo.exact import ExactSearch
from cli.demo.run import K, clients_calling
from cli.local_stack import QUERY, LocalStack
from towers.catalogue import Catalogue
from towers.checkpoint import CheckpointStore
from towers.errors import DeadlineError
from towers.store import Store

NUM_SHARDS = 2
REPLICAS = 2
"""Of each shard, and of the query service."""
WORKERS = 2
"""Of each query service."""
_DIM = 64
_NUM_QUERIES = 200
_LIMIT_S = 120.0
_POLL_S = 0.05
_SETTLE_S = 0.5
"""Between two restarts. A process that is back is found within a second, for so long clients pause at most; its other
replica is restarted after several others."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    rounds: int
    """In each, every process is restarted."""
    num_items: int
    rate_per_s: float


FULL = Sizes(rounds=50, num_items=100_000, rate_per_s=100.0)
QUICK = Sizes(rounds=2, num_items=10_000, rate_per_s=100.0)


def measure(sizes: Sizes, folder: Path, console: Console) -> dict[str, Any]:
    """Restarts one process after another, again and again, while clients call.

    Args:
        sizes: How much.
        folder: Empty; takes the store, the logs and the answers.
        console: Where progress is told.

    Returns:
        The figures by name.
    """
    store = Store(str(folder / "store"))
    CheckpointStore(store).publish(lookup_checkpoint(*clustered(sizes.num_items, _DIM, _NUM_QUERIES)))
    catalogue = Catalogue(store)
    catalogue.upsert(lookup_items(sizes.num_items))
    catalogue.compact()
    queries = [{USER_ID: user} for user in ids(_NUM_QUERIES)]
    # Exact indexes, so that every score and every item of an answer can be told right from wrong.
    with LocalStack(
        store=store.url,
        folder=folder,
        num_shards=NUM_SHARDS,
        replicas=REPLICAS,
        query_services=REPLICAS,
        query_port=0,
        environment={"TWOTOWER_EXACT_BELOW": str(sizes.num_items + 1), "TWOTOWER_WORKERS": str(WORKERS)},
    ) as stack:
        stack.wait_ready(_LIMIT_S)
        address = f"ipv4:{','.join(stack.query_addresses)}"
        options = ("--clients", "8", "--connections", "4", "--rate", str(sizes.rate_per_s), "--limit", "86400")
        with clients_calling(address, queries, folder, *options) as answers_path:
            time.sleep(1.0)
            exit_codes = _restart_all(stack, sizes, console)
            time.sleep(1.0)
        names = stack.names
    oracle = ExactSearch(CheckpointStore(store), 1, catalogue.read().items, queries)
    figures = _judged(pq.read_table(answers_path), oracle)
    return {
        "processes": len(names),
        "restarts": len(exit_codes),
        "exit_codes_not_0": sum(code != 0 for code in exit_codes),
        **figures,
    }


def _restart_all(stack: LocalStack, sizes: Sizes, console: Console) -> Sequence[int]:
    """Ends each process by SIGTERM, starts it again, and goes on once it is ready; returns the exit codes."""
    exit_codes = []
    for number in range(sizes.rounds):
        for name in sorted(stack.names, key=_is_further_replica):
            exit_codes.append(stack.end(name))
            stack.restart(name)
            give_up_s = time.monotonic() + _LIMIT_S
            while not stack.is_ready(name):
                if time.monotonic() > give_up_s:
                    raise DeadlineError(f"waited {_LIMIT_S:.0f} s for {name}; see {stack.log_path(name)}")
                time.sleep(_POLL_S)
            time.sleep(_SETTLE_S)
        console.print(f"round {number + 1} of {sizes.rounds}", highlight=False)
    return exit_codes


def _is_further_replica(name: str) -> bool:
    return "-replica-" in name or name.startswith(f"{QUERY}-")


def _judged(answers: pa.Table, oracle: ExactSearch) -> dict[str, Any]:
    num_errors = num_partial = num_wrong = 0
    first = ""
    for batch in answers.to_batches(max_chunksize=10_000):
        for answer in batch.to_pylist():
            if answer["error"]:
                num_errors += 1
                first = first or answer["error"]
            elif answer["shards_answered"] != answer["shards_total"]:
                num_partial += 1
            elif fault := oracle.fault(answer["query"], answer["item_ids"], answer["scores"], K):
                num_wrong += 1
                first = first or fault
    milliseconds = (answers["done_s"].to_numpy() - answers["sent_s"].to_numpy()) * 1000
    return {
        "answers": answers.num_rows - num_errors,
        "errors": num_errors,
        "partial": num_partial,
        "wrong": num_wrong,
        "first_fault": first,
        "p50_ms": float(np.percentile(milliseconds, 50)),
        "p99_ms": float(np.percentile(milliseconds, 99)),
    }


def _report(figures: Mapping[str, Any], console: Console) -> None:
    table = Table(title=f"Each of {figures['processes']} processes restarted in turn, under load")
    for name in ("", "measured", "target"):
        table.add_column(name, justify="right" if name else "left")
    table.add_row("restarts", f"{figures['restarts']:,}")
    table.add_row("exit codes other than 0", str(figures["exit_codes_not_0"]), "0")
    table.add_row("answers", f"{figures['answers']:,}")
    table.add_row("errors", str(figures["errors"]), "0")
    table.add_row("wrong answers", str(figures["wrong"]), "0")
    table.add_row("partial answers", str(figures["partial"]))
    table.add_row("p50, p99, ms", f"{figures['p50_ms']:.1f}, {figures['p99_ms']:.1f}")
    console.print(table)
    if figures["first_fault"]:
        console.print(f"the first fault: {figures['first_fault']}", highlight=False, markup=False)


def main() -> None:
    """Runs from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK.rounds} rounds instead of {FULL.rounds}")
    parser.add_argument("--rounds", type=int, help="so many rounds, of the same size", metavar="COUNT")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: give at least 1")
    sizes = QUICK if options.quick else FULL
    sizes = replace(sizes, rounds=options.rounds or sizes.rounds)
    console = Console()
    with tempfile.TemporaryDirectory(prefix="rolling-restart-") as folder:
        figures = measure(sizes, Path(folder), console)
    _report(figures, console)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
