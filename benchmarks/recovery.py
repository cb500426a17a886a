"""What clients see when the cache or a shard dies: `python -m benchmarks.recovery`, after `make demo`.

Deliberately uses the demonstration's data and towers, and judges every answer by exact search.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from cli.demo import movielens
from cli.demo.exact import ExactSearch
from cli.demo.run import K, clients_calling, demo_queries
from cli.local_stack import LocalStack
from retrieval_client import RetrievalClient
from towers.catalogue import Catalogue
from towers.checkpoint import CheckpointStore
from towers.deployment import DeploymentStore
from towers.errors import DeadlineError
from towers.store import Store

_WAIT_S = 60.0


def measure(folder: Path, quiet_s: float) -> dict[str, Any]:
    """Kills Valkey, then a shard, under load, and brings both back.

    Args:
        folder: The demonstration's folder.
        quiet_s: Seconds between two events.

    Returns:
        The figures by name.
    """
    store = Store(str(folder / "store"))
    version = DeploymentStore(store).current().live_version
    assert version is not None, "run make demo first"
    tables = movielens.fetch(folder / "data")
    queries = list(demo_queries(tables).values())
    with LocalStack(store=store.url, folder=folder, query_port=0) as stack:
        stack.wait_ready(_WAIT_S)
        with (
            clients_calling(stack.query_address, queries, folder) as answers_path,
            RetrievalClient(stack.query_address) as client,
        ):
            time.sleep(quiet_s)
            stack.kill("valkey")
            time.sleep(quiet_s)
            stack.restart("valkey")
            time.sleep(quiet_s)
            killed_s = time.monotonic()
            stack.kill("shard-1")
            time.sleep(quiet_s)
            restarted_s = time.monotonic()
            stack.restart("shard-1")
            while client.retrieve(queries[0], k=K).shards_answered < 2:
                if time.monotonic() > restarted_s + _WAIT_S:
                    raise DeadlineError(f"the shard does not answer {_WAIT_S:.0f} s after its restart")
                time.sleep(0.01)
            recovered_s = time.monotonic()
            time.sleep(quiet_s)
    oracle = ExactSearch(CheckpointStore(store), version, Catalogue(store).read().items, queries)
    return _figures(pq.read_table(answers_path), oracle, version, killed_s, restarted_s, recovered_s)


def _figures(
    answers: pa.Table, oracle: ExactSearch, version: int, killed_s: float, restarted_s: float, recovered_s: float
) -> dict[str, Any]:
    rows = answers.to_pylist()
    served = [row for row in rows if not row["error"]]
    full = [row for row in served if row["shards_answered"] == row["shards_total"]]
    # Answers sent within half a second of its going or coming may be either.
    without_shard = [row for row in served if row["sent_s"] > killed_s + 0.5 and row["done_s"] < restarted_s]
    with_shard = [row for row in served if row["done_s"] < killed_s or row["sent_s"] > recovered_s + 0.5]
    return {
        "answers": len(served),
        "errors": len(rows) - len(served),
        "wrong_full_answers": sum(
            row["version"] != version or bool(oracle.fault(row["query"], row["item_ids"], row["scores"], K))
            for row in full
        ),
        "answers_without_the_shard": len(without_shard),
        "wrong_flags": sum(row["shards_answered"] != 1 for row in without_shard)
        + sum(row["shards_answered"] != 2 for row in with_shard),
        "back_to_two_shards_s": recovered_s - restarted_s,
    }


def main() -> None:
    """Runs from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("var/demo"), help="folder of the demonstration")
    parser.add_argument("--quick", action="store_true", help="shorter pauses")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    figures = measure(options.folder, quiet_s=2.0 if options.quick else 5.0)
    table = Table(title="Valkey killed and restarted, then a shard, under load")
    table.add_column("")
    table.add_column("", justify="right")
    for name, value in figures.items():
        table.add_row(name.replace("_", " "), f"{value:.2f}" if isinstance(value, float) else f"{value:,}")
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
