"""Items that change while they are searched: `python -m benchmarks.index.updates`.

Deliberately starts two real shards, writes from a process of its own, and believes no status: what counts is what a
search finds. Every upsert changes what the item tower reads, so each one is embedded.
"""

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from retrieval.feature.v1 import feature_pb2
from retrieval.index.v1 import index_service_pb2, index_service_pb2_grpc
from rich.console import Console
from rich.table import Table

from benchmarks.index.checkpoints import ids, lookup_checkpoint
from benchmarks.index.update_load import LOOK
from benchmarks.index.vectors import clustered
from cli import child
from towers import deployment
from towers.catalogue import Catalogue
from towers.catalogue_columns import ITEM_ID
from towers.checkpoint import CheckpointStore
from towers.deployment import DeploymentStore
from towers.errors import DeadlineError
from towers.placement import shard_of
from towers.store import Store

NUM_SHARDS = 2
NUM_ITEMS, NUM_ITEMS_QUICK = 200_000, 60_000
DIM = 64
RATE = 5_000.0
SECONDS, SECONDS_QUICK = 300.0, 20.0
QUIET_S, QUIET_S_QUICK = 30.0, 10.0
K = 100
TARGET_VISIBLE_S = 1.0
TARGET_SLOWDOWN = 2.0
_NUM_PROBES = 2_000
_SEARCHES_PER_S = 50.0
"""Of each shard."""
_PROBE_INTERVAL_S = 0.2
_PROBE_POLL_S = 0.01
_NUM_QUERIES = 1000
_LIMIT_S = 1800.0
_BATCH = 64
_MORE = 20
"""Items that are asked for beyond those that must be found: the index's own scores are approximate."""


class Shard:
    """One shard process."""

    def __init__(self, store: Store, number: int, folder: Path) -> None:
        self.number = number
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        self._log = folder / f"shard-{number}.log"
        self._environment = {
            **os.environ,
            "TWOTOWER_STORE": store.url,
            "TWOTOWER_SHARD": f"{number}/{NUM_SHARDS}",
            "TWOTOWER_ADDRESS": self.address,
            "OMP_NUM_THREADS": "1",
        }
        self.start()
        options = (("grpc.max_reconnect_backoff_ms", 50), ("grpc.initial_reconnect_backoff_ms", 20))
        self.channel = grpc.insecure_channel(self.address, options=options)
        self.stub = index_service_pb2_grpc.IndexServiceStub(self.channel)

    def start(self) -> None:
        """Starts the process."""
        command = [sys.executable, "-I", "-S", child.__file__, str(os.getpid())]
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, sys.executable, "-m", "cli.main", "serve", "index"], env=self._environment, stderr=log
            )

    def kill(self) -> None:
        """As a crash would."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def cpu_s(self) -> float:
        """Seconds of processor time that the process has used."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def num_builds(self) -> int:
        """Indexes that its log says were built."""
        return self._log.read_text(errors="replace").count("builds checkpoint")

    def search(self, embeddings: NDArray[np.float32], k: int) -> list[list[str]]:
        """Item ids for each of `[B, D]` queries."""
        response = self.stub.Search(
            index_service_pb2.SearchRequest(
                checkpoint_version=1,
                query_embeddings=embeddings.astype("<f4").tobytes(),
                num_queries=len(embeddings),
                k=k,
                shard=self.number,
                num_shards=NUM_SHARDS,
            ),
            timeout=30.0,
        )
        counts = np.frombuffer(response.hit_counts, "<u4")
        ends = np.cumsum(np.frombuffer(response.item_id_sizes, "<u4"), dtype=np.int64)
        starts = np.concatenate(([0], ends[:-1]))
        found = [response.item_ids[start:end].decode() for start, end in zip(starts, ends, strict=True)]
        limits = np.cumsum(counts).tolist()
        return [found[end - count : end] for end, count in zip(limits, counts.tolist(), strict=True)]

    def status(self) -> Any:
        """Of the version, None while there is none."""
        try:
            found = self.stub.GetShardStatus(index_service_pb2.GetShardStatusRequest(), timeout=5.0).versions
        except grpc.RpcError:
            return None
        return found[0] if found else None

    def until_available(self) -> Any:
        """Waits; the status."""
        give_up_s = time.monotonic() + _LIMIT_S
        while time.monotonic() < give_up_s:
            status = self.status()
            if status is not None and status.state == index_service_pb2.VERSION_STATE_AVAILABLE:
                return status
            time.sleep(0.05)
        raise DeadlineError(f"shard {self.number} is not available; see {self._log}")


class Searching:
    """Searches every shard at a steady rate until the block ends."""

    def __init__(self, shards: list[Shard], queries: NDArray[np.float32]) -> None:
        self.latencies_s: list[float] = []
        self.num_failed = 0
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(shard, queries)) for shard in shards]

    def __enter__(self) -> "Searching":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _run(self, shard: Shard, queries: NDArray[np.float32]) -> None:
        due_s = time.monotonic()
        number = 0
        while not self._ended.wait(max(0.0, due_s - time.monotonic())):
            started_s = time.monotonic()
            try:
                shard.search(queries[number % len(queries)][None], K)
            except grpc.RpcError:
                self.num_failed += 1
            self.latencies_s.append(time.monotonic() - started_s)
            number += 1
            due_s = max(due_s + 1 / _SEARCHES_PER_S, time.monotonic())

    def p99_ms(self) -> float:
        """Milliseconds."""
        return float(np.percentile(self.latencies_s, 99) * 1e3)

    def p50_ms(self) -> float:
        """Milliseconds."""
        return float(np.percentile(self.latencies_s, 50) * 1e3)


def visible_after_s(shards: list[Shard], looks: NDArray[np.float32], number: int) -> float:
    """Upserts a new item whose look nothing else has, and searches until it is found: seconds after the answer."""
    item_id = f"probe-{number}"
    stub = index_service_pb2_grpc.CatalogServiceStub(shards[number % NUM_SHARDS].channel)
    look = len(looks) - 1 - number % _NUM_PROBES
    attributes = {LOOK: feature_pb2.FeatureValue(string_value=str(look))}
    item = index_service_pb2.Item(item_id=item_id, attributes=attributes)
    stub.UpsertItems(index_service_pb2.UpsertItemsRequest(items=[item]), timeout=30.0)
    acknowledged_s = time.monotonic()
    owner = shards[shard_of(item_id, NUM_SHARDS)]
    while item_id not in owner.search(looks[look][None], 1 + number // _NUM_PROBES)[0]:
        time.sleep(_PROBE_POLL_S)
    return time.monotonic() - acknowledged_s


def num_lost(shards: list[Shard], looks: NDArray[np.float32], written: Any) -> tuple[int, int]:
    """How many of the items whose last change was acknowledged are not found by it, and how many were looked for."""
    of_look: dict[tuple[int, int], set[str]] = {}
    num_checked = 0
    for number in np.flatnonzero(written["is_sure"]).tolist():
        key = (shard_of(str(number), NUM_SHARDS), int(written["looks"][number]))
        of_look.setdefault(key, set()).add(str(number))
        num_checked += 1
    lost = 0
    for shard in shards:
        own = [(look, expected) for (owner, look), expected in of_look.items() if owner == shard.number]
        for start in range(0, len(own), _BATCH):
            batch = own[start : start + _BATCH]
            k = _MORE + max(len(expected) for _, expected in batch)
            for (_, expected), found in zip(batch, shard.search(looks[[look for look, _ in batch]], k), strict=True):
                lost += len(expected.difference(found))
    return lost, num_checked


def measure(num_items: int, seconds: float, quiet_s: float, folder: Path) -> dict[str, Any]:
    """Runs all of it.

    Args:
        num_items: N.
        seconds: Of updates.
        quiet_s: Of searches without updates, before and after.
        folder: Empty; takes the store and the logs.

    Returns:
        The figures by name.
    """
    store = Store(str(folder / "store"))
    num_looks = num_items // 2
    looks, queries = clustered(num_looks + _NUM_PROBES, DIM, _NUM_QUERIES)
    CheckpointStore(store).publish(lookup_checkpoint(looks, queries, LOOK))
    catalogue = Catalogue(store)
    numbers = np.arange(num_items)
    catalogue.upsert(
        pa.table(
            {
                ITEM_ID: ids(num_items),
                LOOK: pa.array(numbers % num_looks).cast(pa.string()),
                "title": [f"Title of item {number}" for number in numbers.tolist()],
                "price": numbers / 4,
                "stock": numbers % 100,
            }
        )
    )
    catalogue.compact()
    deployments = DeploymentStore(store)
    deployments.write(deployment.staged(deployments.current(), 1, "benchmark"))
    deployments.write(deployment.promoted(deployments.current(), "benchmark"))
    with ExitStack() as ended:
        shards = [Shard(store, number, folder) for number in range(NUM_SHARDS)]
        for shard in shards:
            ended.callback(shard.kill)
        index_type = next(shard.until_available().index_type for shard in shards)
        with Searching(shards, queries):
            time.sleep(2.0)
        with Searching(shards, queries) as quiet:
            time.sleep(quiet_s)
        result = folder / "written.npz"
        arguments = [f"--items={num_items}", f"--looks={num_looks}", f"--rate={RATE}"]
        arguments += [f"--seconds={seconds + 2}", f"--result={result}", *(shard.address for shard in shards)]
        delays_s: list[float] = []
        commits_before = catalogue.num_unfolded()
        with subprocess.Popen([sys.executable, "-m", "benchmarks.index.update_load", *arguments]) as load:
            ended.callback(load.kill)
            with Searching(shards, queries) as busy:
                used_s = sum(shard.cpu_s() for shard in shards)
                ends_s = time.monotonic() + seconds
                while time.monotonic() < ends_s:
                    started_s = time.monotonic()
                    delays_s.append(visible_after_s(shards, looks, len(delays_s)))
                    time.sleep(max(0.0, started_s + _PROBE_INTERVAL_S - time.monotonic()))
                used_s = sum(shard.cpu_s() for shard in shards) - used_s
                statuses = [shard.status() for shard in shards]
                num_commits = catalogue.num_unfolded() - commits_before
            shards[0].kill()
            load.wait()
        killed_s = time.monotonic()
        num_builds = sum(shard.num_builds() for shard in shards) - NUM_SHARDS
        shards[0].start()
        shards[0].until_available()
        restart_s = time.monotonic() - killed_s
        newest = catalogue.version()
        while any(shard.until_available().catalogue_version != newest for shard in shards):
            time.sleep(0.05)
        written = np.load(result)
        lost, checked = num_lost(shards, looks, written)
        probes_lost = sum(
            f"probe-{number}" not in shard.search(looks[len(looks) - 1 - number % _NUM_PROBES][None], _MORE)[0]
            for number in range(len(delays_s))
            for shard in [shards[shard_of(f"probe-{number}", NUM_SHARDS)]]
        )
        with Searching(shards, queries) as quiet_again:
            time.sleep(quiet_s)
    quiet_p99_ms = statistics.mean((quiet.p99_ms(), quiet_again.p99_ms()))
    figures = {
        "items": num_items,
        "dim": DIM,
        "index_type": index_type,
        "seconds": seconds,
        "upserts_per_s": float(written["rate"]),
        "acknowledged_ms_p50": float(np.percentile(written["latencies_s"], 50) * 1e3),
        "acknowledged_ms_p99": float(np.percentile(written["latencies_s"], 99) * 1e3),
        "commits": num_commits,
        "rebuilds": num_builds,
        "shards_cpu": used_s / seconds,
        "delta_items": [status.num_delta_items for status in statuses],
        "tombstones": [status.num_tombstones for status in statuses],
        "visible_s_p50": float(np.percentile(delays_s, 50)),
        "visible_s_p99": float(np.percentile(delays_s, 99)),
        "visible_s_max": max(delays_s),
        "probes": len(delays_s),
        "checked": checked + len(delays_s),
        "lost": lost + probes_lost,
        "restart_s": restart_s,
        "quiet_p50_ms": quiet.p50_ms(),
        "quiet_p99_ms": quiet_p99_ms,
        "quiet_p99_ms_before_and_after": [quiet.p99_ms(), quiet_again.p99_ms()],
        "busy_p50_ms": busy.p50_ms(),
        "busy_p99_ms": busy.p99_ms(),
        "slowdown": busy.p99_ms() / quiet_p99_ms,
        "searches": len(busy.latencies_s),
        "failed_searches": quiet.num_failed + busy.num_failed + quiet_again.num_failed,
    }
    figures["reached"] = {
        "rate": figures["upserts_per_s"] >= RATE * 0.98,
        "nothing lost": figures["lost"] == 0 and figures["failed_searches"] == 0,
        "visible": figures["visible_s_p99"] < TARGET_VISIBLE_S,
        "searches": figures["slowdown"] <= TARGET_SLOWDOWN,
    }
    return figures


def main() -> None:
    """Runs from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"{SECONDS_QUICK:.0f} seconds instead of {SECONDS:.0f}")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    sizes = (NUM_ITEMS_QUICK, SECONDS_QUICK, QUIET_S_QUICK) if options.quick else (NUM_ITEMS, SECONDS, QUIET_S)
    with tempfile.TemporaryDirectory(prefix="updates-") as folder:
        figures = measure(*sizes, Path(folder))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    _print(figures)


def _print(figures: dict[str, Any]) -> None:
    reached = figures["reached"]
    table = Table(title=f"{figures['items']:,} items in {NUM_SHARDS} shards of {figures['index_type']}, upserted")
    for name in ("", "figure", "target", ""):
        table.add_column(name, justify="right" if name else "left")

    def add(what: str, figure: str, target: str = "", key: str = "") -> None:
        table.add_row(what, figure, target, "" if not key else "reached" if reached[key] else "missed")

    add("upserts a second", f"{figures['upserts_per_s']:,.0f}", f"{RATE:,.0f}", "rate")
    add("acknowledged after, p50", f"{figures['acknowledged_ms_p50']:.0f} ms")
    add("acknowledged after, p99", f"{figures['acknowledged_ms_p99']:.0f} ms")
    add("commits", f"{figures['commits']:,}")
    add("processors used by the shards", f"{figures['shards_cpu']:.2f}")
    add("indexes rebuilt meanwhile", f"{figures['rebuilds']}")
    add("found after the answer, p50", f"{figures['visible_s_p50'] * 1e3:.0f} ms")
    visible = f"{figures['visible_s_p99'] * 1e3:.0f} ms"
    add("found after the answer, p99", visible, f"{TARGET_VISIBLE_S * 1e3:.0f} ms", "visible")
    add("acknowledged items that a kill lost", f"{figures['lost']} of {figures['checked']:,}", "0", "nothing lost")
    add("search p50, quiet", f"{figures['quiet_p50_ms']:.2f} ms")
    add("search p50, under updates", f"{figures['busy_p50_ms']:.2f} ms")
    add("search p99, quiet", f"{figures['quiet_p99_ms']:.2f} ms")
    slowdown = f"{figures['busy_p99_ms']:.2f} ms, {figures['slowdown']:.2f} times quiet"
    add("search p99, under updates", slowdown, f"{TARGET_SLOWDOWN:.0f} times", "searches")
    Console().print(table)


if __name__ == "__main__":
    main()
