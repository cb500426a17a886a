"""Recall and time of searches behind filters and exclusions: `python -m benchmarks.index.filters`.

Deliberately in one process and without gRPC: the index of one shard, its attributes and its planner. Each filter is
timed when it has never been seen and when it comes again, in turn with the search without a filter and with an exact
scan of the rows that match, whose numbers are then known beforehand. Beside it stands FAISS's own search behind the
same filter, its selector made beforehand, as wide as is right for k / selectivity without one: what time that takes is
the floor, and its recall is what it costs to ask no further.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.index.vectors import clustered, of_checkpoint
from index_service.build import artefact_of
from index_service.embed import EmbeddedItems
from index_service.filters import Range
from index_service.order import BuildOrder
from index_service.plan import TuningGoal
from index_service.shard import ShardIndex
from towers.checkpoint import Manifest
from towers.errors import TwoTowerError

NUM_ITEMS = (100_000, 1_000_000)
NUM_ITEMS_QUICK = (30_000,)
DIM = 64
K = 100
SELECTIVITIES = (0.5, 0.1, 0.01, 0.001)
TARGET_RECALL = 0.95
TARGET_RATIO = 2.0
NEAREST, RANDOM = "nearest", "random"
EXCLUSIONS = ((NEAREST, 1_000), (NEAREST, 10_000), (RANDOM, 50_000))
_NUM_QUERIES = 100
_NUM_REGIONS = 10
_EXCLUSION_ROUNDS = 10
_TIMES = ("unfiltered_s", "fresh_s", "repeated_s", "plain_s", "exact_s")
_NUDGE = 1e-9
"""Makes a bound, and with it a filter, that was never seen before."""


def indexed(items: NDArray[np.float32]) -> ShardIndex:
    """The index of items `[N, D]` with attributes that are uniform between 0 and 1.

    `spread` says nothing about where an item lies; `region0` and so on rise towards one item each, so that the highest
    of them are a region of the space, and far from most queries.
    """
    random = np.random.default_rng(1)
    ids = [f"item-{number}" for number in range(len(items))]
    attributes = {"spread": random.random(len(items))}
    for number, centre in enumerate(random.choice(len(items), _NUM_REGIONS, replace=False)):
        ranks = np.argsort(np.argsort(items @ items[centre]))
        attributes[f"region{number}"] = ranks / len(items)
    order = BuildOrder(
        store="",
        shard=0,
        num_shards=1,
        checkpoint_version=1,
        catalogue_version="0.1",
        revision=1,
        goal=TuningGoal(),
    )
    checkpoint = Manifest(
        version=1,
        created=datetime.now(UTC),
        dim=items.shape[1],
        schema_fingerprint="",
        files={},
        metrics={},
        config={},
        data_window=None,
        code_revision="",
        parent_version=None,
    )
    embedded = EmbeddedItems(pa.table({"item_id": ids, **attributes}), items, {})
    return ShardIndex(artefact_of(order, checkpoint, 0.0, embedded), list(attributes))


def measure(index: ShardIndex, queries: NDArray[np.float32]) -> list[dict[str, Any]]:
    """The figures of each selectivity, for attributes that say nothing about the embedding and those that do."""
    faiss.omp_set_num_threads(1)
    kinds = [(kind, selectivity) for selectivity in SELECTIVITIES for kind in ("spread", "region")]
    figures = [_filtered(index, queries, kind, selectivity) for kind, selectivity in kinds]
    return [*figures, *(_excluded(index, queries, which, number) for which, number in EXCLUSIONS)]


def _filtered(index: ShardIndex, queries: NDArray[np.float32], kind: str, selectivity: float) -> dict[str, Any]:
    random = np.random.default_rng(2)
    seconds: dict[str, list[float]] = {"unfiltered": [], "fresh": [], "repeated": [], "plain": [], "exact": []}
    conditions = [_condition(kind, selectivity, number, random) for number in range(len(queries))]
    hits, plain_hits = [], []
    effort_k = round(K / selectivity)
    for number, condition in enumerate(conditions):
        query = queries[number : number + 1]
        _timed(seconds["unfiltered"], index.search, query, K)
        hits.append(_timed(seconds["fresh"], index.search, query, K, condition))
        _timed(seconds["repeated"], index.search, query, K, condition)
        selector = faiss.IDSelectorBitmap(index.attributes.matching(condition).bitmap)
        _, plain = _timed(seconds["plain"], index.ann.search, query, K, effort_k, selector)
        plain_hits.append(plain[0])
    recalls, plain_recalls, is_full = [], [], []
    # Apart, as a long scan leaves cold caches to whatever comes next.
    for number, condition in enumerate(conditions):
        rows = np.flatnonzero(index.attributes.mask(condition))
        query = queries[number : number + 1]
        _, expected = _timed(seconds["exact"], index.ann.search_exactly, query, K, rows)
        wanted = set(expected[0][expected[0] >= 0].tolist())
        recalls.append(len(wanted & set(hits[number].rows.tolist())) / len(wanted))
        plain_recalls.append(len(wanted & set(plain_hits[number].tolist())) / len(wanted))
        is_full.append(len(hits[number].rows) == min(K, len(rows)))
    figures = {name: statistics.median(values) for name, values in seconds.items()}
    recall = statistics.mean(recalls)
    slower = max(figures["fresh"], figures["repeated"])
    return {
        "items": index.num_items,
        "filter": kind,
        "selectivity": selectivity,
        "recall": recall,
        "plain_recall": statistics.mean(plain_recalls),
        "full": all(is_full),
        **{f"{name}_s": value for name, value in figures.items()},
        "fresh_ratio": figures["fresh"] / figures["unfiltered"],
        "repeated_ratio": figures["repeated"] / figures["unfiltered"],
        "exact_ratio": figures["exact"] / figures["unfiltered"],
        "reached": recall >= TARGET_RECALL and all(is_full) and slower <= TARGET_RATIO * figures["unfiltered"],
    }


def _excluded(index: ShardIndex, queries: NDArray[np.float32], which: str, num_excluded: int) -> dict[str, Any]:
    """Excluded ids, as many as half of the items at most; the time to find their rows is among the figures."""
    random = np.random.default_rng(3)
    num_excluded = min(num_excluded, index.num_items // 2)
    seconds: dict[str, list[float]] = {"unfiltered": [], "fresh": [], "lookup": []}
    recalls, is_full = [], []
    for number in range(min(_EXCLUSION_ROUNDS, len(queries))):
        query = queries[number : number + 1]
        if which == NEAREST:
            chosen = np.argpartition(-(index.ann.vectors @ query[0]), num_excluded)[:num_excluded]
        else:
            chosen = random.choice(index.num_items, num_excluded, replace=False)
        excluded = [item_id.decode() for item_id in index.ids.utf8(chosen)]
        _timed(seconds["unfiltered"], index.search, query, K)
        rows = _timed(seconds["lookup"], index.rows_of, excluded)
        hits = _timed(seconds["fresh"], index.search, query, K, None, excluded)
        allowed = np.setdiff1d(np.arange(index.num_items), rows, assume_unique=True)
        wanted = set(index.ann.search_exactly(query, K, allowed)[1][0].tolist())
        recalls.append(len(wanted & set(hits.rows.tolist())) / len(wanted))
        is_full.append(len(hits.rows) == min(K, len(allowed)))
    figures = {name: statistics.median(values) for name, values in seconds.items()}
    recall = statistics.mean(recalls)
    return {
        "items": index.num_items,
        "filter": f"without {which} {num_excluded:,}",
        "selectivity": 1 - num_excluded / index.num_items,
        "recall": recall,
        "full": all(is_full),
        **{f"{name}_s": value for name, value in figures.items()},
        "reached": recall >= TARGET_RECALL and all(is_full),
    }


def _condition(kind: str, selectivity: float, number: int, random: np.random.Generator) -> Range:
    """A filter that was never used before."""
    if kind == "spread":
        first = (1 - selectivity) * random.random()
        return Range("spread", at_least=first, less_than=first + selectivity)
    return Range(f"region{number % _NUM_REGIONS}", at_least=1 - selectivity - _NUDGE * (number + 1))


def _timed(seconds: list[float], work: Callable[..., Any], *arguments: Any) -> Any:
    start = time.perf_counter()
    result = work(*arguments)
    seconds.append(time.perf_counter() - start)
    return result


def shown(figures: list[dict[str, Any]], index_type: str) -> Table:
    """The figures of one index as a table, times in microseconds."""
    table = Table(
        title=f"{figures[0]['items']:,} items, k {K}, {index_type}: µs of one query",
        caption="new: a filter never seen before; FAISS: its own filtered search; exact: a scan of the matching rows",
    )
    columns = ("none", "new", "again", "FAISS", "exact", "new/none", "again/none", "target")
    for name in ("filter", "recall", "FAISS's", *columns):
        table.add_column(name, justify="left" if name in ("filter", "target") else "right")
    for row in figures:
        times = [f"{row[name] * 1e6:.0f}" if name in row else "" for name in _TIMES]
        ratios = [f"{row[name]:.2f}" if name in row else "" for name in ("fresh_ratio", "repeated_ratio")]
        filter_name = f"{row['filter']} {row['selectivity']:.1%}" if "fresh_ratio" in row else row["filter"]
        target = "reached" if row["reached"] else "missed" if row["full"] else "not full"
        plain_recall = f"{row['plain_recall']:.3f}" if "plain_recall" in row else ""
        table.add_row(filter_name, f"{row['recall']:.3f}", plain_recall, *times, *ratios, target)
    return table


def main() -> None:
    """Runs from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"{NUM_ITEMS_QUICK[0]:,} items only")
    parser.add_argument("--items", type=int, nargs="+", default=NUM_ITEMS, help="numbers of items", metavar="COUNT")
    parser.add_argument("--seed", type=int, default=0, help="of the synthetic items")
    parser.add_argument("--store", help="measure on a store's catalogue and checkpoint instead", metavar="URL")
    parser.add_argument("--version", type=int, default=1, help="the checkpoint")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    figures: list[dict[str, Any]] = []
    index_types: list[str] = []
    for items, queries in _catalogues(options):
        index = indexed(items)
        index_types.append(index.manifest.index_type)
        measured = measure(index, queries)
        Console(highlight=False, width=160).print(shown(measured, index.manifest.index_type))
        figures += measured
    if options.json:
        options.json.write_text(json.dumps({"index_types": index_types, "figures": figures}, indent=2) + "\n")


def _catalogues(options: argparse.Namespace) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Items and queries."""
    if options.store:
        try:
            items, queries = of_checkpoint(options.store, options.version)
        except TwoTowerError as error:
            raise SystemExit(f"error: {error}") from None
        yield items, queries[:_NUM_QUERIES]
        return
    for num_items in NUM_ITEMS_QUICK if options.quick else options.items:
        yield clustered(num_items, DIM, _NUM_QUERIES, options.seed)


if __name__ == "__main__":
    main()
