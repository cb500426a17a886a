"""What the choice of an index is worth: `python -m benchmarks.index.tuning`.

Deliberately in one process and without gRPC. For each number of items, dimension and k the index is chosen as a build
chooses it, with one sample of queries. Held-out queries then tell whether it reaches the target, and an exhaustive
sweep, over more numbers of lists, codes and all search parameters, tells what the fastest index would have been. The
sweep may use exactly the target recall on the held-out queries; the choice had to reach it without having seen them.
Both are timed in turns, one query at a time with one thread.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.index.vectors import clustered, of_checkpoint
from index_service.ann import AnnIndex, Knobs, exact_index, parsed_parameters
from index_service.effort import sweep
from index_service.kinds import TrainedLists, built, trained_quantizer
from index_service.plan import TuningGoal
from index_service.recall import QuerySample, Truth
from index_service.timing import latencies
from index_service.tune import sweepable_types, tuned
from towers.errors import TwoTowerError

SIZES = (10_000, 100_000, 1_000_000)
DIMS = (32, 64, 128)
KS = (10, 100, 500)
TARGET_RECALL = 0.95
TARGET_RATIO = 1.2
_NUM_SEEN = 2000
_NUM_SWEPT = 1000
_NUM_HELD_OUT = 4000
_ROUNDS = 7
_NUM_FINALISTS = 3
"""Of the sweep, which was not timed in turns; then they are, beside the choice."""

Search = tuple[AnnIndex, Knobs]


def measure(
    items: NDArray[np.float32],
    seen: NDArray[np.float32],
    held_out: NDArray[np.float32],
    ks: tuple[int, ...],
    console: Console,
) -> list[dict[str, Any]]:
    """The figures of each k for one catalogue.

    Args:
        items: `[N, D]`
        seen: `[S, D]` the queries that choose.
        held_out: `[H, D]` the queries that judge.
        ks: Results of a search.
        console: Where progress is told.
    """
    num_items, dim = items.shape
    exact = exact_index(items)
    truth = Truth(exact, QuerySample(held_out, None), max(ks))
    chosen: dict[int, AnnIndex] = {}
    tuned_s: dict[int, float] = {}
    for k in ks:
        start_s = time.perf_counter()
        goal = TuningGoal(target_recall=TARGET_RECALL, target_k=k)
        chosen[k] = tuned(exact, QuerySample(seen, None), goal).ann
        tuned_s[k] = time.perf_counter() - start_s
        plan = chosen[k].plan
        console.print(f"{num_items:,} x {dim}, k {k}: {plan.index_type}, chosen in {tuned_s[k]:.1f} s")
    finalists = _finalists(exact, held_out[:_NUM_SWEPT], ks, console)
    return [
        {
            "items": num_items,
            "dim": dim,
            "k": k,
            "tuned_s": tuned_s[k],
            **_compared(chosen[k], finalists[k], truth, held_out, k),
        }
        for k in ks
    ]


def _finalists(
    exact: Any, queries: NDArray[np.float32], ks: tuple[int, ...], console: Console
) -> dict[int, list[Search]]:
    """The fastest searches of all that reach the target, one of each type, for each k."""
    truth = Truth(exact, QuerySample(queries, None), max(ks))
    found: dict[int, list[tuple[float, Search]]] = {k: [] for k in ks}
    trained: dict[int, TrainedLists] = {}
    for index_type in sweepable_types(exact.ntotal, exact.d):
        start_s = time.perf_counter()
        ann = _built(index_type, exact, trained)
        lines: list[str] = []
        for k in ks:
            settings = [setting for setting in sweep(ann, truth, k, TARGET_RECALL) if setting.recall >= TARGET_RECALL]
            if not settings:
                lines.append(f"k {k}: -")
                continue
            fastest = min(settings, key=lambda setting: setting.latency_s)
            lines.append(f"k {k}: {fastest.parameters} {fastest.latency_s * 1e6:.0f} µs")
            found[k].append((fastest.latency_s, (ann, parsed_parameters(fastest.parameters))))
            found[k] = sorted(found[k], key=lambda pair: pair[0])[:_NUM_FINALISTS]
        console.print(f"  {index_type}: {'; '.join(lines)} ({time.perf_counter() - start_s:.0f} s)")
    return {k: [search for _, search in pairs] for k, pairs in found.items()}


def _built(index_type: str, exact: Any, trained: dict[int, TrainedLists]) -> AnnIndex:
    """An index; lists are trained once for all kinds with as many."""
    if not index_type.startswith("IVF"):
        return built(index_type, exact)
    num_lists = int(index_type.removeprefix("IVF").partition(",")[0])
    if num_lists not in trained:
        trained[num_lists] = TrainedLists(exact, trained_quantizer(exact, num_lists))
    return trained[num_lists].built(index_type)


def _compared(
    chosen: AnnIndex, finalists: list[Search], truth: Truth, held_out: NDArray[np.float32], k: int
) -> dict[str, Any]:
    setting = next(setting for setting in chosen.settings if setting.k == k)
    knobs = parsed_parameters(setting.parameters)
    recall, standard_error = truth.recall(chosen.search(held_out, k)[1], k)
    rounds = [latencies([(chosen, knobs), *finalists], held_out, k) for _ in range(_ROUNDS)]
    medians = [statistics.median(seconds) for seconds in zip(*rounds, strict=True)]
    best = int(np.argmin(medians[1:]))
    best_ann, best_knobs = finalists[best]
    best_recall, _ = truth.recall(best_ann.search_at(best_knobs, held_out, k)[1], k)
    ratio = statistics.median(seconds[0] / seconds[1 + best] for seconds in rounds)
    return {
        "index_type": chosen.plan.index_type,
        "parameters": setting.parameters,
        "recall": recall,
        "recall_error": standard_error,
        "latency_s": medians[0],
        "size_bytes": chosen.size_bytes,
        "best_index_type": best_ann.plan.index_type,
        "best_parameters": ",".join(f"{name}={value}" for name, value in best_knobs.items()),
        "best_recall": best_recall,
        "best_latency_s": medians[1 + best],
        "ratio": ratio,
        "recall_reached": recall >= TARGET_RECALL,
        "ratio_reached": ratio <= TARGET_RATIO,
    }


def shown(figures: list[dict[str, Any]]) -> Table:
    """All cases as a table."""
    table = Table(
        title=f"The chosen index beside the fastest that reaches a recall of {TARGET_RECALL}",
        caption="recall: of the chosen index on held-out queries; µs: one query, one thread, in turns",
    )
    for name in ("items", "dim", "k", "chosen", "recall", "µs", "MB", "fastest of the sweep", "µs", "ratio", "target"):
        table.add_column(name, justify="left" if name in ("chosen", "fastest of the sweep", "target") else "right")
    for row in figures:
        table.add_row(
            f"{row['items']:,}",
            str(row["dim"]),
            str(row["k"]),
            f"{row['index_type']} {row['parameters']}",
            f"{row['recall']:.4f}",
            f"{row['latency_s'] * 1e6:.0f}",
            f"{row['size_bytes'] / 1e6:.0f}",
            f"{row['best_index_type']} {row['best_parameters']}",
            f"{row['best_latency_s'] * 1e6:.0f}",
            f"{row['ratio']:.2f}",
            "reached" if row["recall_reached"] and row["ratio_reached"] else "missed",
        )
    return table


def main() -> None:
    """Runs from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="10,000 items of dimension 32 only")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of items")
    parser.add_argument("--dims", type=int, nargs="+", default=DIMS, help="dimensions")
    parser.add_argument("--ks", type=int, nargs="+", default=KS, help="results of a search")
    parser.add_argument("--store", help="measure on a store's catalogue and checkpoint instead", metavar="URL")
    parser.add_argument("--version", type=int, default=1, help="the checkpoint")
    parser.add_argument("--threads", type=int, default=faiss.omp_get_max_threads(), help="threads to build with")
    parser.add_argument("--json", type=Path, help="file for the figures, written after each number of items and dim")
    options = parser.parse_args()
    faiss.omp_set_num_threads(options.threads)
    console = Console(highlight=False, width=160)
    figures: list[dict[str, Any]] = []
    for items, queries, num_seen in _catalogues(options):
        figures += measure(items, queries[:num_seen], queries[num_seen:], tuple(options.ks), console)
        console.print(shown(figures))
        if options.json:
            reached = all(row["recall_reached"] and row["ratio_reached"] for row in figures)
            options.json.write_text(json.dumps({"reached": reached, "figures": figures}, indent=2) + "\n")


def _catalogues(options: argparse.Namespace) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32], int]]:
    """Items, queries, and how many of the queries choose."""
    if options.store:
        try:
            items, queries = of_checkpoint(options.store, options.version)
        except TwoTowerError as error:
            raise SystemExit(f"error: {error}") from None
        yield items, queries, len(queries) // 2
        return
    for num_items in SIZES[:1] if options.quick else options.sizes:
        for dim in DIMS[:1] if options.quick else options.dims:
            yield *clustered(num_items, dim, _NUM_SEEN + _NUM_HELD_OUT), _NUM_SEEN


if __name__ == "__main__":
    main()
