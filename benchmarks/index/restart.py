"""How soon a killed shard answers again from its stored index: `python -m benchmarks.index.restart`.

Deliberately starts the real process of a shard, and counts from before the interpreter starts until the shard says
that the live version is available.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from retrieval.index.v1 import index_service_pb2, index_service_pb2_grpc
from rich.console import Console
from rich.table import Table

from benchmarks.index.checkpoints import ids, lookup_checkpoint, lookup_items
from benchmarks.index.vectors import clustered
from cli import child
from towers import deployment
from towers.catalogue import Catalogue
from towers.checkpoint import CheckpointStore
from towers.deployment import DeploymentStore
from towers.errors import DeadlineError
from towers.store import Store

NUM_ITEMS = 1_000_000
NUM_ITEMS_QUICK = 50_000
DIM = 64
TARGET_S = 5.0
_NUM_QUERIES = 1000
_NUM_CHANGED = 1000
_ROUNDS = 5
_BUILD_LIMIT_S = 3600.0
_RESTART_LIMIT_S = 120.0


def measure(num_items: int, folder: Path) -> dict[str, Any]:
    """Builds an index once, then kills and restarts the shard.

    Args:
        num_items: N.
        folder: Empty; takes the store and the log.

    Returns:
        The figures by name.
    """
    store = Store(str(folder / "store"))
    items, queries = clustered(num_items, DIM, _NUM_QUERIES)
    CheckpointStore(store).publish(lookup_checkpoint(items, queries))
    catalogue = Catalogue(store)
    catalogue.upsert(lookup_items(num_items))
    catalogue.compact()
    deployments = DeploymentStore(store)
    deployments.write(deployment.staged(deployments.current(), 1, "benchmark"))
    deployments.write(deployment.promoted(deployments.current(), "benchmark"))
    port = _free_port()
    started_s = time.monotonic()
    with _shard(store, port, folder):
        status = _until_available(port, _BUILD_LIMIT_S)
        build_s = time.monotonic() - started_s
    # What changed since the build is caught up with as well.
    catalogue.delete(ids(_NUM_CHANGED))
    restarts_s, imports_s = [], []
    for _ in range(_ROUNDS):
        imports_s.append(_imports_s())
        started_s = time.monotonic()
        with _shard(store, port, folder):
            status = _until_available(port, _RESTART_LIMIT_S)
            restarts_s.append(time.monotonic() - started_s)
        assert status.loaded_from_store, "it was built again"
        assert status.catalogue_version == catalogue.version(), "it has not caught up"
    return {
        "items": num_items,
        "dim": DIM,
        "index_type": status.index_type,
        "size_mb": status.size_bytes / 1e6,
        "build_s": build_s,
        "restart_s": statistics.median(restarts_s),
        "slowest_restart_s": max(restarts_s),
        "imports_s": statistics.median(imports_s),
        "target_s": TARGET_S,
        "reached": max(restarts_s) < TARGET_S,
    }


@contextmanager
def _shard(store: Store, port: int, folder: Path) -> Iterator[None]:
    """A shard that is killed at the end of the block."""
    environment = {
        **os.environ,
        "TWOTOWER_STORE": store.url,
        "TWOTOWER_SHARD": "0/1",
        "TWOTOWER_ADDRESS": f"127.0.0.1:{port}",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-I", "-S", child.__file__, str(os.getpid())]
    with (folder / "shard.log").open("ab") as log:
        process = subprocess.Popen(
            [*command, sys.executable, "-m", "cli.main", "serve", "index"], env=environment, stderr=log
        )
        try:
            yield
        finally:
            process.kill()
            process.wait()


def _until_available(port: int, limit_s: float) -> Any:
    """The status of the version, once it is available."""
    give_up_s = time.monotonic() + limit_s
    options = (("grpc.max_reconnect_backoff_ms", 50), ("grpc.initial_reconnect_backoff_ms", 20))
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
        stub = index_service_pb2_grpc.IndexServiceStub(channel)
        while time.monotonic() < give_up_s:
            try:
                statuses = stub.GetShardStatus(index_service_pb2.GetShardStatusRequest(), timeout=5.0).versions
            except grpc.RpcError:
                statuses = ()
            for status in statuses:
                if status.state == index_service_pb2.VERSION_STATE_AVAILABLE:
                    return status
            time.sleep(0.02)
    raise DeadlineError(f"the shard is not available after {limit_s:.0f} s; see its log")


def _imports_s() -> float:
    """The floor: an interpreter that imports what a shard needs, and ends."""
    started_s = time.monotonic()
    subprocess.run([sys.executable, "-c", "import cli.main, index_service.serve"], check=True)
    return time.monotonic() - started_s


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    """Runs from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"{NUM_ITEMS_QUICK:,} items instead of {NUM_ITEMS:,}")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="restart-") as folder:
        figures = measure(NUM_ITEMS_QUICK if options.quick else NUM_ITEMS, Path(folder))
    table = Table(title=f"A shard of {figures['items']:,} items x {DIM}, killed and started again {_ROUNDS} times")
    for name in ("", "seconds"):
        table.add_column(name, justify="right" if name else "left")
    table.add_row("first start, which builds", f"{figures['build_s']:.1f}")
    table.add_row("interpreter and imports alone", f"{figures['imports_s']:.2f}")
    table.add_row("restart, median", f"{figures['restart_s']:.2f}")
    table.add_row("restart, slowest", f"{figures['slowest_restart_s']:.2f}")
    table.add_row(f"target: under {TARGET_S:.0f}", "reached" if figures["reached"] else "missed")
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
