"""Many swaps under load, every answer judged by exact search: `python -m benchmarks.index.swaps`.

Deliberately uses the real processes (two shards, the query service, Valkey) and changes nothing but the deployment
record, as `twotower stage` and `twotower promote` do.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import grpc
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from retrieval.index.v1 import index_service_pb2, index_service_pb2_grpc
from retrieval.query.v1 import query_service_pb2, query_service_pb2_grpc
from rich.console import Console
from rich.table import Table

from benchmarks.index.checkpoints import USER_ID, ids, lookup_checkpoint, lookup_items
from benchmarks.index.vectors import clustered
from cli.demo.exact import ExactSearch
from cli.local_stack import QUERY, ROLLOUT, LocalStack
from towers import deployment
from towers.catalogue import Catalogue
from towers.checkpoint import CheckpointStore
from towers.deployment import Deployment, DeploymentStore
from towers.errors import DeadlineError
from towers.store import Store

K = 10
NUM_SHARDS = 2
P99_RATIO = 1.5
MEMORY_RATIO = 2.2
MEMORY_BACK_SHARE = 0.05
MIN_ANSWERS = 300_000
_DIM = 64
"""Of all checkpoints: another version's embeddings fit, so a mixed answer would look right."""
_NUM_CHECKPOINTS = 6
"""That take turns: more than stay stored, so that some swaps load and some build."""
_NUM_QUERIES = 200
_LIMIT_S = 120.0
_WARM_UP_S = 5.0
"""Of calls to the first version, before its memory is taken for that of one version."""
_POLL_S = 0.05
_SETTLE_S = 0.5
"""After a swap, until which its seconds count."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    num_swaps: int
    num_items: int
    rate_per_s: float
    """Calls. At 300, which is about all that two cores can answer by exact search, calls mostly wait for each other."""
    quiet_s: float
    """Between two swaps."""
    min_answers: int


FULL = Sizes(num_swaps=200, num_items=200_000, rate_per_s=120.0, quiet_s=4.0, min_answers=MIN_ANSWERS)
QUICK = Sizes(num_swaps=10, num_items=5_000, rate_per_s=100.0, quiet_s=1.0, min_answers=0)


@dataclass
class Swaps:
    """When what happened, in monotonic seconds."""

    windows_s: list[tuple[float, float]] = field(default_factory=list)
    """From a record that stages a version to the answers of the version that it made live."""


class MemoryWatch:
    """Anonymous memory of processes, sampled in a thread."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids = pids
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.peaks = dict.fromkeys(pids, 0)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(_POLL_S):
            for pid in self._pids:
                self.peaks[pid] = max(self.peaks[pid], memory_bytes(pid))


def memory_bytes(pid: int) -> int:
    """Anonymous memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise DeadlineError(f"process {pid} has ended")


def measure(sizes: Sizes, folder: Path, console: Console) -> dict[str, Any]:
    """Swaps again and again while clients call.

    Args:
        sizes: How much.
        folder: Empty; takes the store, the logs and the answers.
        console: Where progress is told.

    Returns:
        The figures by name.
    """
    store = Store(str(folder / "store"))
    checkpoints = CheckpointStore(store)
    for number in range(_NUM_CHECKPOINTS):
        checkpoints.publish(lookup_checkpoint(*clustered(sizes.num_items, _DIM, _NUM_QUERIES, seed=number)))
    catalogue = Catalogue(store)
    catalogue.upsert(lookup_items(sizes.num_items))
    catalogue.compact()
    queries = [{USER_ID: user} for user in ids(_NUM_QUERIES)]
    # Exact indexes, so that every score and every item of an answer can be told right from wrong.
    os.environ["TWOTOWER_EXACT_BELOW"] = str(sizes.num_items + 1)
    with LocalStack(store=store.url, folder=folder, num_shards=NUM_SHARDS, query_port=0) as stack:
        stack.wait_up()
        stack.kill(ROLLOUT)  # Its gates and its pace are not what is measured.
        shards = [stack.pid(f"shard-{number}") for number in range(NUM_SHARDS)]
        time.sleep(1.0)
        empty = [memory_bytes(pid) for pid in shards]
        watcher = Watcher(stack, DeploymentStore(store))
        watcher.make_live(1)
        with _clients(stack.query_address, queries, folder, sizes.rate_per_s) as answers_path:
            time.sleep(_WARM_UP_S)
            alone = _settled_memory(shards)
            with MemoryWatch(shards) as memory:
                swaps = _swap(sizes, watcher, console)
        # Alone again, at the version that was alone before.
        watcher.make_live(1)
        watcher.end_standby()
        back = _settled_memory(shards)
    items = catalogue.read().items
    oracles = {version: ExactSearch(checkpoints, version, items, queries) for version in range(1, _NUM_CHECKPOINTS + 1)}
    answers = pq.read_table(answers_path)
    figures = _judged(answers, oracles, swaps)
    caught, planted = planted_faults(answers, oracles)
    peaks = [memory.peaks[pid] for pid in shards]
    figures |= {
        "swaps": sizes.num_swaps,
        "items": sizes.num_items,
        "planted_faults": planted,
        "planted_faults_caught": caught,
        "version_mb": max(one - none for one, none in zip(alone, empty, strict=True)) / 1e6,
        "memory_ratio": max((peak - none) / (one - none) for peak, one, none in zip(peaks, alone, empty, strict=True)),
        "memory_back_mb": max(now - one for now, one in zip(back, alone, strict=True)) / 1e6,
        "memory_back": max(now / one - 1.0 for now, one in zip(back, alone, strict=True)),
    }
    figures["reached"] = {
        "0 errors": figures["errors"] == 0,
        "0 partial": figures["partial"] == 0,
        "0 mixed": figures["mixed"] == 0 and caught == planted,
        f"{sizes.min_answers:,} answers": figures["answers"] >= sizes.min_answers,
        f"p99 ratio {P99_RATIO}": figures["p99_ratio"] <= P99_RATIO,
        f"memory ratio {MEMORY_RATIO}": figures["memory_ratio"] <= MEMORY_RATIO,
        f"memory back within {MEMORY_BACK_SHARE:.0%}": figures["memory_back"] <= MEMORY_BACK_SHARE,
    }
    return figures


class Watcher:
    """Writes deployment records, and waits until every process has followed."""

    def __init__(self, stack: LocalStack, deployments: DeploymentStore) -> None:
        self._deployments = deployments
        self._shards = [
            index_service_pb2_grpc.IndexServiceStub(grpc.insecure_channel(address)) for address in stack.shard_addresses
        ]
        self._query = query_service_pb2_grpc.QueryServiceStub(grpc.insecure_channel(stack.query_address))
        self._log = stack.log_path(QUERY).parent

    def make_live(self, version: int) -> None:
        """Stages a version, waits until it is loaded everywhere, promotes it and waits until it answers."""
        current = self._deployments.current()
        if current.live_version == version:
            return
        if current.standby_version != version:
            self._write(deployment.staged(current, version, "benchmark"))
        self._until(lambda: self._is_loaded(version), f"version {version} to be loaded")
        self._write(deployment.promoted(self._deployments.current(), "benchmark"))
        self._until(lambda: self._live_version() == version, f"version {version} to answer")

    def end_standby(self) -> None:
        """Leaves the live version alone, and waits until the other one is gone."""
        current = self._deployments.current()
        alone = {"revision": current.revision + 1, "standby_version": None, "standby_num_shards": None}
        self._write(current.model_copy(update=alone))
        self._until(lambda: all(len(self._versions(shard)) == 1 for shard in self._shards), "one version to be left")

    def _write(self, record: Deployment) -> None:
        self._deployments.write(record)

    def _is_loaded(self, version: int) -> bool:
        in_query = any(
            tower.checkpoint_version == version and tower.state == query_service_pb2.TOWER_STATE_AVAILABLE
            for tower in self._query.GetStatus(query_service_pb2.GetStatusRequest(), timeout=_LIMIT_S).towers
        )
        return in_query and all(
            any(
                status.checkpoint_version == version and status.state == index_service_pb2.VERSION_STATE_AVAILABLE
                for status in self._versions(shard)
            )
            for shard in self._shards
        )

    def _versions(self, shard: Any) -> Sequence[Any]:
        return list(shard.GetShardStatus(index_service_pb2.GetShardStatusRequest(), timeout=_LIMIT_S).versions)

    def _live_version(self) -> int:
        return int(self._query.GetStatus(query_service_pb2.GetStatusRequest(), timeout=_LIMIT_S).live_version)

    def _until(self, condition: Callable[[], bool], what: str) -> None:
        give_up_s = time.monotonic() + _LIMIT_S
        while not condition():
            if time.monotonic() > give_up_s:
                raise DeadlineError(f"waited {_LIMIT_S:.0f} s for {what}; see the logs in {self._log}")
            time.sleep(_POLL_S)


def _swap(sizes: Sizes, watcher: Watcher, console: Console) -> Swaps:
    swaps = Swaps()
    for number in range(sizes.num_swaps):
        started_s = time.monotonic()
        watcher.make_live((number + 1) % _NUM_CHECKPOINTS + 1)
        swaps.windows_s.append((started_s, time.monotonic() + _SETTLE_S))
        time.sleep(_SETTLE_S + sizes.quiet_s)
        if (number + 1) % 10 == 0:
            console.print(f"{number + 1} of {sizes.num_swaps} swaps", highlight=False)
    return swaps


@contextmanager
def _clients(address: str, queries: Sequence[Mapping[str, str]], folder: Path, rate_per_s: float) -> Iterator[Path]:
    """Calls at a steady rate from a process of its own; the answers are there when the block has ended."""
    queries_path, answers_path = folder / "queries.json", folder / "answers.parquet"
    queries_path.write_text(json.dumps(list(queries)))
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "cli.demo.load", address, str(queries_path), str(answers_path)),
            *("--k", str(K), "--clients", "8", "--rate", str(rate_per_s), "--limit", "86400"),
        ]
    )
    try:
        yield answers_path
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def _settled_memory(pids: Sequence[int]) -> list[int]:
    """Memory of processes once it no longer changes much."""
    last = [memory_bytes(pid) for pid in pids]
    for _ in range(20):
        time.sleep(0.5)
        now = [memory_bytes(pid) for pid in pids]
        if max(abs(a - b) for a, b in zip(now, last, strict=True)) < 1e6:
            return now
        last = now
    return last


def fault_of(answer: Mapping[str, Any], oracles: Mapping[int, ExactSearch]) -> str:
    """What is wrong with an answer, in words; empty when it is exactly that of the version that it names."""
    if answer["version"] not in oracles:
        return f"version {answer['version']} was never published"
    if answer["shards_answered"] != answer["shards_total"]:
        return _partial(answer)
    return oracles[answer["version"]].fault(answer["query"], answer["item_ids"], answer["scores"], K)


def _partial(answer: Mapping[str, Any]) -> str:
    return f"{answer['shards_answered']} of {answer['shards_total']} shards answered"


def planted_faults(answers: pa.Table, oracles: Mapping[int, ExactSearch]) -> tuple[int, int]:
    """How many of the faults that were planted into right answers the judge catches, and how many there were."""
    right = next(answer for answer in answers.slice(0, 100).to_pylist() if not answer["error"])
    other = next(version for version in oracles if version != right["version"])
    item_ids, scores = right["item_ids"], right["scores"]
    stranger = next(item_id for item_id in ids(K + 1) if item_id not in item_ids)
    planted: list[dict[str, Any]] = [
        {"version": other},
        {"version": max(oracles) + 1},
        {"query": (right["query"] + 1) % _NUM_QUERIES},
        {"item_ids": item_ids[:-1], "scores": scores[:-1]},
        {"item_ids": [*item_ids[:-1], item_ids[0]]},
        {"item_ids": [*item_ids[:-1], stranger]},
        {"scores": [score + 1e-4 for score in scores]},
        {"shards_answered": right["shards_total"] - 1},
    ]
    assert not fault_of(right, oracles), "the first answer is wrong already"
    return sum(bool(fault_of({**right, **change}, oracles)) for change in planted), len(planted)


def _judged(answers: pa.Table, oracles: Mapping[int, ExactSearch], swaps: Swaps) -> dict[str, Any]:
    num_errors = num_partial = num_mixed = 0
    first = ""
    for batch in answers.to_batches(max_chunksize=10_000):
        for answer in batch.to_pylist():
            if answer["error"]:
                num_errors += 1
                first = first or answer["error"]
            elif answer["shards_answered"] < answer["shards_total"]:
                num_partial += 1
                first = first or _partial(answer)
            elif fault := fault_of(answer, oracles):
                num_mixed += 1
                first = first or f"version {answer['version']}: {fault}"
    sent_s = answers["sent_s"].to_numpy()
    milliseconds = (answers["done_s"].to_numpy() - sent_s) * 1000
    is_swap = np.zeros(len(sent_s), dtype=bool)
    for start_s, end_s in swaps.windows_s:
        is_swap |= (sent_s >= start_s) & (sent_s < end_s)
    is_quiet = ~is_swap & (sent_s >= swaps.windows_s[0][0]) & (sent_s < swaps.windows_s[-1][1])
    quiet, swapping = milliseconds[is_quiet], milliseconds[is_swap]
    return {
        "answers": answers.num_rows - num_errors,
        "errors": num_errors,
        "partial": num_partial,
        "mixed": num_mixed,
        "first_fault": first,
        "answers_in_swaps": int(is_swap.sum()),
        "median_swap_s": statistics.median(end_s - start_s for start_s, end_s in swaps.windows_s) - _SETTLE_S,
        "quiet_p50_ms": _percentile(quiet, 50),
        "quiet_p99_ms": _percentile(quiet, 99),
        "swap_p50_ms": _percentile(swapping, 50),
        "swap_p99_ms": _percentile(swapping, 99),
        "p99_ratio": _percentile(swapping, 99) / _percentile(quiet, 99),
    }


def _percentile(milliseconds: NDArray[np.float64], percent: float) -> float:
    return float(np.percentile(milliseconds, percent))


def _report(figures: Mapping[str, Any], console: Console) -> None:
    table = Table(title=f"{figures['swaps']} swaps of {figures['items']:,} items on {NUM_SHARDS} shards, under load")
    for name in ("", "measured", "beside", "ratio", "target"):
        table.add_column(name, justify="right" if name else "left")
    counts = (f"{figures[name]:,}" for name in ("answers", "errors", "partial", "mixed"))
    table.add_row("answers, errors, partial, mixed", ", ".join(counts))
    table.add_row("planted faults caught", f"{figures['planted_faults_caught']} of {figures['planted_faults']}")
    table.add_row(
        "p99 during swaps, quiet, ms",
        f"{figures['swap_p99_ms']:.1f}",
        f"{figures['quiet_p99_ms']:.1f}",
        f"{figures['p99_ratio']:.2f}",
        f"{P99_RATIO}",
    )
    table.add_row("p50, ms", f"{figures['swap_p50_ms']:.1f}", f"{figures['quiet_p50_ms']:.1f}")
    table.add_row("seconds of a swap, median", f"{figures['median_swap_s']:.1f}")
    table.add_row(
        "memory of a shard, in versions", "", f"{figures['version_mb']:.0f} MB", f"{figures['memory_ratio']:.2f}", "2.2"
    )
    table.add_row(
        "memory left over at the end",
        f"{figures['memory_back_mb']:+.1f} MB",
        "",
        f"{figures['memory_back']:+.1%}",
        f"{MEMORY_BACK_SHARE:.0%}",
    )
    console.print(table)
    missed = [name for name, is_reached in figures["reached"].items() if not is_reached]
    console.print(f"missed: {', '.join(missed)}" if missed else "every target is reached", highlight=False)
    if figures["first_fault"]:
        console.print(f"the first fault: {figures['first_fault']}", highlight=False, markup=False)


def main() -> None:
    """Runs from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK.num_swaps} swaps instead of {FULL.num_swaps}")
    parser.add_argument("--swaps", type=int, help="so many swaps, of the same size", metavar="COUNT")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    if options.swaps is not None and options.swaps < 1:
        parser.error(f"--swaps {options.swaps}: give at least 1")
    sizes = QUICK if options.quick else FULL
    sizes = replace(sizes, num_swaps=options.swaps or sizes.num_swaps)
    console = Console()
    with tempfile.TemporaryDirectory(prefix="swaps-") as folder:
        figures = measure(sizes, Path(folder), console)
    _report(figures, console)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
