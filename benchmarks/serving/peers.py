"""The index server beside servers that a user would pick instead: `python -m benchmarks.serving.peers`.

Deliberately whichever are installed (`pip install 'twotower[peers]'`); each is tuned to the same band of recall, all
run on this machine at once, their callers in one more process. In each round all take turns; a ratio is the median of
the rounds' ratios. Recall, and every answer, are of queries that did not choose our index.
"""

import argparse
import bisect
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray
from rich.bar import Bar
from rich.console import Console
from rich.table import Table

from benchmarks.index.vectors import clustered
from benchmarks.serving.peer_servers.callers import Callers, Measured
from benchmarks.serving.peer_servers.chroma import Chroma
from benchmarks.serving.peer_servers.index_server import IndexServer
from benchmarks.serving.peer_servers.milvus_lite import MilvusLite
from benchmarks.serving.peer_servers.pgvector import PgVector
from benchmarks.serving.peer_servers.qdrant_edge import QdrantEdge
from benchmarks.serving.peer_servers.redis_search import RedisSearch
from benchmarks.serving.peer_servers.side import Band, K, Side, SideError

PEERS: Mapping[str, type[Side]] = {
    "redis": RedisSearch,
    "pgvector": PgVector,
    "chroma": Chroma,
    "milvus": MilvusLite,
    "qdrant": QdrantEdge,
}
BANDS = (Band(low=0.95, high=0.96), Band(low=0.985, high=0.99))
REPLACED_TIMES = 10
"""Faster than the fastest of them we are to replace a collection."""
_DIM = 128
_NUM_QUERIES = 2000
"""That choose our index."""
_NUM_ASKED = 512
"""Others, in whole batches."""
_EFFORTS = range(K, 1001, 10)
"""Of a graph; pgvector takes no more."""
_CALLERS_OF_REPLACED = 8
_AFTER_REPLACED_S = 1.0
_RECALL_LOST = 0.05
"""That a replacement may cost."""
_BAR_WIDTH = 24
"""Characters of the longest bar of a section."""


@dataclass(frozen=True)
class Calls:
    """A way to ask, and how many times the queries a second of the best peer we are to answer."""

    in_flight: int
    batch_size: int
    target: float

    @property
    def name(self) -> str:
        """Of the section of the table."""
        return f"{self.in_flight} in flight" + (f", {self.batch_size} queries a call" if self.batch_size > 1 else "")


CALLS = (Calls(1, 1, 1.3), Calls(8, 1, 1.3), Calls(32, 1, 1.3), Calls(4, 64, 5.0))


@dataclass(frozen=True)
class Length:
    """How much is measured."""

    num_items: int
    bands: Sequence[Band]
    rounds: int
    burst_s: float


FULL = Length(num_items=100_000, bands=BANDS, rounds=5, burst_s=2.0)
QUICK = Length(num_items=20_000, bands=BANDS[:1], rounds=3, burst_s=0.5)


@dataclass(frozen=True)
class Collection:
    """What is searched, and the answers."""

    items: NDArray[np.float32]
    """`[N, D]`"""
    queries: NDArray[np.float32]
    """`[Q, D]`, for the tuner of our index."""
    asked: NDArray[np.float32]
    """`[A, D]`"""
    truth: NDArray[np.int64]
    """`[A, K]`, the rows that exact search finds."""

    @classmethod
    def of(cls, num_items: int) -> "Collection":
        """Clustered vectors."""
        items, queries = clustered(num_items, _DIM, _NUM_QUERIES + _NUM_ASKED)
        asked = queries[_NUM_QUERIES:]
        return cls(items, queries[:_NUM_QUERIES], asked, faiss.knn(asked, items, K, faiss.METRIC_INNER_PRODUCT)[1])

    def shuffled(self) -> "Collection":
        """The same vectors, each as another item."""
        order = np.random.default_rng(0).permutation(len(self.items))
        return Collection(self.items[order], self.queries, self.asked, np.argsort(order)[self.truth])

    def recall(self, rows: NDArray[np.int64]) -> float:
        """Of answers `[A, K]`."""
        return statistics.mean(len(np.intersect1d(*pair)) / K for pair in zip(rows, self.truth, strict=True))


def measure(length: Length, peers: Sequence[str], folder: Path, console: Console) -> dict[str, Any]:
    """Runs all rounds of every band; the collection is replaced in the first.

    Args:
        length: How much.
        peers: Keys of PEERS.
        folder: Empty; takes the files of the servers.
        console: Where progress is told.

    Returns:
        The figures by name.
    """
    faiss.omp_set_num_threads(1)
    collection = Collection.of(length.num_items)
    kinds: list[type[Side]] = [IndexServer, *(PEERS[peer] for peer in peers)]
    bands = []
    for number, band in enumerate(length.bands):
        (place := folder / str(number)).mkdir()
        bands.append(_measured(band, collection, kinds, length, place, console, is_replaced=number == 0))
    return {"items": length.num_items, "dim": _DIM, "k": K, "bands": bands}


def _measured(
    band: Band,
    collection: Collection,
    kinds: Sequence[type[Side]],
    length: Length,
    folder: Path,
    console: Console,
    *,
    is_replaced: bool,
) -> dict[str, Any]:
    facts: dict[str, dict[str, Any]] = {kind.NAME: {"is_server": kind.IS_SERVER} for kind in kinds}
    sides: dict[str, Side] = {}

    @contextmanager
    def in_turn(name: str, act: str) -> Iterator[dict[str, Any]]:
        """Takes a peer out where it fails, and says so; ours must not."""
        console.print(f"recall {band.low}: {act} {name}", highlight=False)
        try:
            yield facts[name]
        except Exception as error:  # Whatever a peer's library raises.
            if name == IndexServer.NAME:
                raise
            sides.pop(name, None)
            facts[name]["problem"] = problem = f"{act}: {type(error).__name__}: {error}"
            console.print(f"{name} is left out: {problem}", highlight=False)

    with ExitStack() as stack:
        for number, kind in enumerate(kinds):
            with in_turn(kind.NAME, "filling") as row:
                (place := folder / str(number)).mkdir()
                side = kind(place, band, stack)
                start_s = time.perf_counter()
                row |= {"versions": side.versions, "index": side.fill(collection.items, collection.queries)}
                row["fill_s"] = time.perf_counter() - start_s
                sides[kind.NAME] = side
        callers = stack.enter_context(Callers())
        for name, side in list(sides.items()):
            with in_turn(name, "tuning") as row:
                callers.connect(name, side.client(), collection.asked)
                row |= _tuned(callers, name, side, band, collection)
        rounds = []
        for number in range(length.rounds + 1):
            console.print(f"round {number} of {length.rounds}", highlight=False)
            bursts = {
                calls.name: {name: _burst(callers, name, calls, length.burst_s) for name in sides} for calls in CALLS
            }
            if number:  # The first one warms.
                rounds.append(bursts)
        figures = [_judged(calls, [bursts[calls.name] for bursts in rounds], facts) for calls in CALLS]
        for name, side in list(sides.items()) if is_replaced else ():
            if side.IS_SERVER:
                with in_turn(name, "replacing") as row:
                    row |= _replaced(callers, name, side, band, collection.shuffled())
    ours, *theirs = [row["replace_s"] for row in facts.values() if "replace_s" in row] or [0.0]
    return {
        **vars(band),
        "sides": facts,
        "calls": figures,
        "replaced_ratio": min(theirs) / ours if theirs else None,
    }


def _tuned(callers: Callers, name: str, side: Side, band: Band, collection: Collection) -> dict[str, Any]:
    """The least effort that reaches the band, and its recall."""
    if side.TUNES_ITSELF:
        return {"effort": None, "recall": collection.recall(callers.rows(name))}
    recalls: dict[int, float] = {}

    def recall(effort: int) -> float:
        callers.prepare(name, effort)
        recalls[effort] = collection.recall(callers.rows(name))
        return recalls[effort]

    place = bisect.bisect_left(_EFFORTS, band.low, key=recall)
    if place == len(_EFFORTS):
        raise SideError(f"the recall is {recalls[_EFFORTS[-1]]:.3f} at most")
    callers.prepare(name, _EFFORTS[place])
    return {"effort": _EFFORTS[place], "recall": recalls[_EFFORTS[place]]}


def _burst(callers: Callers, name: str, calls: Calls, seconds: float) -> Measured:
    callers.begin(name, calls.in_flight, calls.batch_size)
    time.sleep(seconds)
    return callers.end()


def _judged(
    calls: Calls, rounds: Sequence[Mapping[str, Measured]], facts: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The medians of one way to ask, and how many times their queries a second ours are."""

    def rate(burst: Measured) -> float:
        return calls.batch_size * len(burst.latencies_s) / burst.seconds

    sides = {}
    for name in rounds[0]:
        bursts = [bursts[name] for bursts in rounds]
        ratios = [rate(bursts[IndexServer.NAME]) / rate(bursts[name]) for bursts in rounds]
        sides[name] = {
            "per_s": statistics.median(map(rate, bursts)),
            "p50_s": statistics.median(statistics.median(burst.latencies_s) for burst in bursts),
            "ratio": statistics.median(ratios),
            "lowest": min(ratios),
            "highest": max(ratios),
            "num_failed": sum(burst.num_failed for burst in bursts),
        }
    servers = [name for name in sides if facts[name]["is_server"] and name != IndexServer.NAME]
    best = min(servers, key=lambda name: sides[name]["ratio"], default=None)
    return {
        "name": calls.name,
        "target": calls.target,
        "sides": sides,
        "best_peer": best,
        "reached": best is not None and sides[best]["ratio"] >= calls.target,
    }


def _replaced(callers: Callers, name: str, side: Side, band: Band, new: Collection) -> dict[str, Any]:
    """Seconds, calls and failed calls of a replacement of all items under callers."""
    callers.begin(name, _CALLERS_OF_REPLACED, 1)
    try:
        start_s = time.perf_counter()
        side.replace(new.items, new.queries)
        replace_s = time.perf_counter() - start_s
        time.sleep(_AFTER_REPLACED_S)
    finally:
        burst = callers.end()
    recall = new.recall(callers.rows(name))
    if recall < band.low - _RECALL_LOST:
        raise SideError(f"the recall of the new items is {recall:.3f}")
    return {
        "replace_s": replace_s,
        "replace_calls": len(burst.latencies_s) + burst.num_failed,
        "replace_failed": burst.num_failed,
        "replace_error": burst.first_error,
        "replace_slowest_s": max(burst.latencies_s),
    }


def shown(figures: Mapping[str, Any]) -> Iterator[Table]:
    """The figures as tables, two for each band."""
    for band in figures["bands"]:
        title = f"{figures['items']:,} x {figures['dim']}, k = {figures['k']}, recall {band['low']} to {band['high']}"
        yield _sides_shown(title, band)
        yield _calls_shown(title, band)


def _sides_shown(title: str, band: Mapping[str, Any]) -> Table:
    table = Table(title=title, caption=f"replacing all items under {_CALLERS_OF_REPLACED} callers")
    for column in ("", "index", "effort", "recall", "fill s", "replace s", "failed", "slowest ms"):
        table.add_column(column, justify="left" if column in ("", "index") else "right")
    for name, row in band["sides"].items():
        label = f"{name}\n{row.get('versions', '')}"
        if "recall" not in row:
            table.add_row(label, row["problem"])
            continue
        above = " above" if row["recall"] > band["high"] else ""
        cells = [row["index"], str(row["effort"] or ""), f"{row['recall']:.3f}{above}", f"{row['fill_s']:.1f}"]
        if "replace_s" in row:
            failed = f"{row['replace_failed']:,} of {row['replace_calls']:,}"
            cells += [f"{row['replace_s']:.1f}", failed, f"{1000 * row['replace_slowest_s']:.0f}"]
        elif "problem" in row:
            cells += [row["problem"]]
        table.add_row(label, *cells)
    if ratio := band["replaced_ratio"]:
        failed = band["sides"][IndexServer.NAME]["replace_failed"]
        reached = "reached" if ratio >= REPLACED_TIMES and not failed else "missed"
        table.caption = (
            f"{table.caption}: {ratio:.1f} times as fast as the fastest peer, at least {REPLACED_TIMES}: {reached}"
        )
    return table


def _calls_shown(title: str, band: Mapping[str, Any]) -> Table:
    table = Table(title=title, caption="times: ours beside theirs, median (lowest, highest) of rounds")
    for column in ("", "", "queries/s", "p50 ms", " " * _BAR_WIDTH, "times", "target"):
        table.add_column(column, justify="right" if column in ("queries/s", "p50 ms") else "left")
    for calls in band["calls"]:
        most = max(side["per_s"] for side in calls["sides"].values())
        for name, side in calls["sides"].items():
            failed = f", {side['num_failed']} failed" if side["num_failed"] else ""
            target = f"at least {calls['target']}: {'reached' if calls['reached'] else 'missed'}"
            table.add_row(
                calls["name"],
                name + failed,
                f"{side['per_s']:,.0f}",
                f"{1000 * side['p50_s']:.2f}",
                Bar(most, 0, side["per_s"], width=_BAR_WIDTH),
                ""
                if name == IndexServer.NAME
                else f"{side['ratio']:.2f} ({side['lowest']:.2f}, {side['highest']:.2f})",
                target if name == calls["best_peer"] else "",
            )
        table.add_section()
    return table


def main() -> None:
    """Runs from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer items, one band, fewer and shorter bursts")
    parser.add_argument(
        "--peers", nargs="+", choices=PEERS, default=list(PEERS), help="those to measure; all otherwise"
    )
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    console = Console(width=160)
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        figures = measure(QUICK if options.quick else FULL, options.peers, Path(folder), console)
    for table in shown(figures):
        console.print(table)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
