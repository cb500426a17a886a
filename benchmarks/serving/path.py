"""The path of a query beside its floors: `python -m benchmarks.serving.path`.

Deliberately one catalogue, one k and the real processes: two index shards and query services, all on this machine with
the load generator. In each round all sides take turns; a ratio is the median of the rounds' ratios. The query tower
looks a row up: a tower that computes more would cost the floors as much.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import faiss
import grpc
import numpy as np
from retrieval.index.v1 import index_service_pb2, index_service_pb2_grpc
from retrieval.query.v1 import query_service_pb2_grpc
from rich.bar import Bar
from rich.console import Console
from rich.table import Table

from benchmarks.serving.floors import ECHO, EchoServer, Sizes, in_process_rate
from benchmarks.serving.load import Closed, Generators, Load
from benchmarks.serving.services import (
    BATCH_RETRIEVE,
    RETRIEVE,
    QueryProcess,
    World,
    batch_requests,
    retrieve_requests,
    shards_with,
)
from index_service.ann import AnnIndex, exact_index
from index_service.plan import TuningGoal
from index_service.recall import QuerySample
from index_service.tune import tuned
from towers.checkpoint import CheckpointStore
from towers.tower import Tower

K = 100
NUM_SHARDS = 2
BATCH_SIZE = 64
_DIM = 64
_NUM_QUERIES = 1920
"""Users, in whole batches; half of them choose the index that is searched in this process."""
_IN_FLIGHT = 32
_BATCHES_IN_FLIGHT = 4
_JUDGED_QUERIES = 200
_WARM_UP_S = 1.0
_TIMEOUT_S = 10.0
_BAR_WIDTH = 24
"""Characters of the longest bar of a section."""


@dataclass(frozen=True)
class Length:
    """How much is measured."""

    num_items: int
    rounds: int
    burst_s: float


FULL = Length(num_items=100_000, rounds=7, burst_s=1.5)
QUICK = Length(num_items=100_000, rounds=3, burst_s=0.7)


@dataclass(frozen=True)
class Side:
    """What takes its turn in a round: it runs for a burst and gives its figure."""

    name: str
    figure: Callable[[], float]


@dataclass(frozen=True)
class Target:
    """A ratio of two sides, and the bound that it is to keep."""

    name: str
    over: str
    """The side above the line."""
    under: str
    bound: float
    is_most: bool
    """Whether the bound is the most that the ratio may be, or the least."""


TARGETS: Mapping[str, Sequence[Target]] = {
    "1 in flight, p50 ms": (
        Target("of the two-hop echo", "Retrieve", "two-hop echo", 2.5, True),
        Target("of micro-batches off", "Retrieve", "Retrieve, micro-batches off", 1.2, True),
    ),
    "32 in flight, queries/s": (
        Target("of encode + search in process, one by one", "Retrieve", "in process, one by one", 0.45, False),
        Target("of the one-hop echo", "Retrieve", "one-hop echo", 0.8, False),
        Target("of micro-batches off", "Retrieve", "Retrieve, micro-batches off", 4.0, False),
    ),
    "64 queries a call, queries/s": (
        Target("of encode + search in process, 64 at a time", "BatchRetrieve", "in process, 64 at a time", 0.85, False),
    ),
}


def measure(length: Length, folder: Path, console: Console) -> dict[str, Any]:
    """Runs all rounds.

    Args:
        length: How much.
        folder: Empty; takes the store and the logs.
        console: Where progress is told.

    Returns:
        The figures by name.
    """
    faiss.omp_set_num_threads(1)
    with ExitStack() as stack:
        console.print(f"building {length.num_items:,} items on {NUM_SHARDS} shards", highlight=False)
        world = stack.enter_context(shards_with(length.num_items, _DIM, _NUM_QUERIES, folder, num_shards=NUM_SHARDS))
        ann = _index_in_process(world)
        tower = Tower(CheckpointStore(world.store).load(1, "query"))
        service = stack.enter_context(QueryProcess(world))
        unbatched = stack.enter_context(QueryProcess(world, max_micro_batch=1))
        sizes = _Messages.of(world, service.address)
        one_hop = stack.enter_context(EchoServer(sizes.query))
        two_hop = stack.enter_context(EchoServer(sizes.query, one_hop.address, sizes.search))
        generators = stack.enter_context(Generators(1))
        singles = [request.SerializeToString() for request in retrieve_requests(world.features, K)]
        batches = [request.SerializeToString() for request in batch_requests(world.features, K, BATCH_SIZE)]
        console.print("measuring", highlight=False)

        def calls(address: str, method: str, requests: Sequence[bytes], in_flight: int) -> Load:
            return Load(address, method, requests, Closed(in_flight), length.burst_s)

        def p50_ms(load: Load) -> Callable[[], float]:
            return lambda: 1000 * _answered(generators, load).ok.quantile_s(0.5)

        def rate(load: Load, batch_size: int = 1) -> Callable[[], float]:
            return lambda: batch_size * _answered(generators, load).ok_per_s

        def in_process(batch_size: int) -> Callable[[], float]:
            return lambda: in_process_rate(tower, ann, world.features, K, batch_size, length.burst_s)

        sections = {
            "1 in flight, p50 ms": [
                Side("two-hop echo", p50_ms(calls(two_hop.address, ECHO, singles, 1))),
                Side("one-hop echo", p50_ms(calls(one_hop.address, ECHO, singles, 1))),
                Side("Retrieve", p50_ms(calls(service.address, RETRIEVE, singles, 1))),
                Side("Retrieve, micro-batches off", p50_ms(calls(unbatched.address, RETRIEVE, singles, 1))),
            ],
            "32 in flight, queries/s": [
                Side("in process, one by one", in_process(1)),
                Side("one-hop echo", rate(calls(one_hop.address, ECHO, singles, _IN_FLIGHT))),
                Side("two-hop echo", rate(calls(two_hop.address, ECHO, singles, _IN_FLIGHT))),
                Side("Retrieve", rate(calls(service.address, RETRIEVE, singles, _IN_FLIGHT))),
                Side("Retrieve, micro-batches off", rate(calls(unbatched.address, RETRIEVE, singles, _IN_FLIGHT))),
            ],
            "64 queries a call, queries/s": [
                Side("in process, 64 at a time", in_process(BATCH_SIZE)),
                Side(
                    "BatchRetrieve",
                    rate(calls(service.address, BATCH_RETRIEVE, batches, _BATCHES_IN_FLIGHT), BATCH_SIZE),
                ),
            ],
        }
        for load in (
            calls(service.address, RETRIEVE, singles, _IN_FLIGHT),
            calls(unbatched.address, RETRIEVE, singles, _IN_FLIGHT),
            calls(service.address, BATCH_RETRIEVE, batches, _BATCHES_IN_FLIGHT),
        ):
            generators.run(replace(load, seconds=_WARM_UP_S))
        rounds = {section: _in_turns(sides, length.rounds) for section, sides in sections.items()}
        recalls = _recalls(world, ann, service.address)
        processes = {"load generator": generators.pids[0], "query service": service.pid} | {
            f"shard {number}": world.stack.pid(f"shard-{number}") for number in range(NUM_SHARDS)
        }
        load = calls(service.address, RETRIEVE, singles, _IN_FLIGHT)
        costs_us = _cpu_us_per_call(processes, lambda: _answered(generators, load).ok.num_calls)
    ratios = [_judged(target, section, rounds[section]) for section, targets in TARGETS.items() for target in targets]
    return {
        "items": length.num_items,
        "index_type": ann.plan.index_type,
        "recall": recalls,
        "message_bytes": {"query": vars(sizes.query), "search": vars(sizes.search)},
        "medians": {
            section: {name: statistics.median(figures) for name, figures in by_side.items()}
            for section, by_side in rounds.items()
        },
        "cpu_us_per_call_32_in_flight": costs_us,
        "ratios": ratios,
    }


@dataclass(frozen=True)
class _Messages:
    """Sizes of the real messages, for the echoes."""

    query: Sizes
    search: Sizes

    @classmethod
    def of(cls, world: World, address: str) -> "_Messages":
        request = retrieve_requests(world.features[:1], K)[0]
        with grpc.insecure_channel(address) as channel:
            call: Any = channel.unary_unary(RETRIEVE)
            response = call(request.SerializeToString(), timeout=_TIMEOUT_S)
        search = index_service_pb2.SearchRequest(
            checkpoint_version=1,
            query_embeddings=world.queries[0].tobytes(),
            num_queries=1,
            k=K,
            num_shards=NUM_SHARDS,
        )
        with grpc.insecure_channel(world.stack.shard_addresses[0]) as channel:
            stub: Any = index_service_pb2_grpc.IndexServiceStub(channel)
            hits = stub.Search(search, timeout=_TIMEOUT_S)
        return cls(Sizes(request.ByteSize(), len(response)), Sizes(search.ByteSize(), hits.ByteSize()))


def _index_in_process(world: World) -> AnnIndex:
    """All items in one index, tuned as a shard tunes its own."""
    queries = QuerySample(world.queries[: _NUM_QUERIES // 2], None)
    return tuned(exact_index(world.items), queries, TuningGoal(target_k=K)).ann


def _answered(generators: Generators, load: Load) -> Any:
    measured = generators.run(load)
    if measured.num_failed:
        raise RuntimeError(f"{load.method} at {load.address} failed: {measured.num_by_status}")
    return measured


def _in_turns(sides: Sequence[Side], rounds: int) -> dict[str, list[float]]:
    """Every side's figure of each round."""
    figures: dict[str, list[float]] = {side.name: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            figures[side.name].append(side.figure())
    return figures


def _judged(target: Target, section: str, figures: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    ratios = [over / under for over, under in zip(figures[target.over], figures[target.under], strict=True)]
    ratio = statistics.median(ratios)
    return {
        "section": section,
        "name": f"{target.over} {target.name}",
        "ratio": ratio,
        "lowest": min(ratios),
        "highest": max(ratios),
        "bound": target.bound,
        "is_most": target.is_most,
        "reached": ratio <= target.bound if target.is_most else ratio >= target.bound,
    }


def _recalls(world: World, ann: AnnIndex, address: str) -> dict[str, float]:
    """Recall@K of the service and of the index in this process, on queries that did not choose it."""
    rows = np.arange(len(world.queries))[-_JUDGED_QUERIES:]
    scores = world.queries[rows] @ world.items.T  # [Q, N]
    best = np.argpartition(-scores, K, axis=1)[:, :K]  # [Q, K]
    found = ann.search(world.queries[rows], K)[1]
    with grpc.insecure_channel(address) as channel:
        stub: Any = query_service_pb2_grpc.QueryServiceStub(channel)
        requests = retrieve_requests(world.features, K)
        served = [
            [int(item_id) for item_id in stub.Retrieve(requests[row], timeout=_TIMEOUT_S).item_ids] for row in rows
        ]

    def recall(answers: Sequence[Sequence[int]]) -> float:
        return statistics.mean(
            len(set(answer) & set(truth)) / K for answer, truth in zip(answers, best.tolist(), strict=True)
        )

    return {"Retrieve": recall(served), "in process": recall(found.tolist())}


def _cpu_us_per_call(processes: Mapping[str, int], calls: Callable[[], int]) -> dict[str, float]:
    """Microseconds of processor time of each process for one call."""
    before = {name: _cpu_s(pid) for name, pid in processes.items()}
    num_calls = calls()
    return {name: (_cpu_s(pid) - before[name]) / num_calls * 1e6 for name, pid in processes.items()}


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def shown(figures: Mapping[str, Any]) -> list[Table]:
    """The figures as tables."""
    recall = figures["recall"]
    medians = Table(
        title=f"{figures['items']:,} x {_DIM}, k = {K}, {NUM_SHARDS} shards; {figures['index_type']}, recall "
        f"{recall['Retrieve']:.3f} served, {recall['in process']:.3f} in process"
    )
    for column in ("", "", "median", " " * _BAR_WIDTH):
        medians.add_column(column, justify="right" if column == "median" else "left")
    sections = {**figures["medians"], "32 in flight, processor µs a query": figures["cpu_us_per_call_32_in_flight"]}
    for section, by_side in sections.items():
        for name, median in by_side.items():
            bar = Bar(max(by_side.values()), 0, median, width=_BAR_WIDTH)
            medians.add_row(section, name, f"{median:.2f}" if median < 100 else f"{median:,.0f}", bar)
        medians.add_section()
    ratios = Table(title="ratios, median (lowest, highest) of rounds")
    for column in ("", "ratio", "target", ""):
        ratios.add_column(column, justify="right" if column else "left")
    for row in figures["ratios"]:
        ratios.add_row(
            row["name"],
            f"{row['ratio']:.2f} ({row['lowest']:.2f}, {row['highest']:.2f})",
            f"{'at most' if row['is_most'] else 'at least'} {row['bound']}",
            "reached" if row["reached"] else "missed",
        )
    return [medians, ratios]


def main() -> None:
    """Runs from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer, shorter bursts")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    console = Console()
    start_s = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="path-") as folder:
        figures = measure(QUICK if options.quick else FULL, Path(folder), console)
    for table in shown(figures):
        console.print(table)
    console.print(f"took {time.perf_counter() - start_s:.0f} s", highlight=False)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
