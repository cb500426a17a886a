"""The demonstration, from data to rollback, in the order in which it is printed.

Deliberately calls the commands that users call, each in a process of its own.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console
from rich.rule import Rule
from rich.table import Table

import trainer
from cli.demo import movielens
from cli.demo.exact import ExactSearch
from cli.local_stack import LocalStack
from retrieval_client import RetrievalClient
from towers import deployment
from towers.catalogue import Catalogue
from towers.checkpoint import CheckpointStore
from towers.deployment import DeploymentStore
from towers.errors import NotReadyError, TwoTowerError
from towers.store import Store

K = 10
SHOWN_USER = "42"
NUM_QUERIES = 300
QUIET_S = 5.0
SWAP_LIMIT_S = 120.0
_PHASES = {
    "before": "before",
    "training": "while version 2 is trained on the same cores",
    "during": "during the swap",
    "after": "after the swap",
    "rollback": "rollback",
}
_CONFIGS = {1: "movielens-100k.toml", 2: "movielens-100k-wide.toml"}


@dataclass(frozen=True)
class SwapTimes:
    """Moments of the load run, monotonic seconds."""

    load_start_s: float
    training_start_s: float
    swap_start_s: float
    swap_end_s: float
    rollback_start_s: float
    load_end_s: float


def run(folder: Path, console: Console) -> None:
    """Runs the demonstration.

    Args:
        folder: Holds data, store, logs and `report.json`; what an earlier run left there is used again.
        console: Where everything is printed.

    Raises:
        TwoTowerError: a step failed; the message says which and why.
    """
    start_s = time.monotonic()
    store_folder = folder / "store"
    checkpoints = CheckpointStore(Store(str(store_folder)))

    console.print(Rule("Data"))
    console.print(movielens.TERMS, highlight=False)
    tables = movielens.fetch(folder / "data")

    console.print(Rule("Training"))
    is_new = _train(1, tables, folder, console)
    metrics = checkpoints.manifest(1).metrics
    if not is_new:
        console.print(_quality_table(metrics))
    ratio = metrics["test.recall_at_10"] / metrics["test.popularity_recall_at_10"]
    console.print(f"Recall@10 on the test split is {ratio:.1f} times popularity's.", highlight=False)

    console.print(Rule("Serving"))
    catalogue = Catalogue(Store(str(store_folder)))
    if catalogue.version() is None:
        twotower("catalog", "load", str(tables.items), "--store", str(store_folder))
    _make_first_version_live(DeploymentStore(Store(str(store_folder))))
    with LocalStack(store=str(store_folder), folder=folder, query_port=0) as stack:
        stack.wait_ready(timeout_s=SWAP_LIMIT_S)
        console.print(f"Services are up: {', '.join(stack.names)}; the query service answers on {stack.query_address}")
        queries = demo_queries(tables)
        _show_recommendations(stack.query_address, queries, catalogue.read().items, console)
        first_recommendation_s = time.monotonic() - start_s

        console.print(Rule("Swap under load"))
        answers, times = _swap_under_load(stack, list(queries.values()), tables, folder, console)
    oracles = {
        version: ExactSearch(checkpoints, version, catalogue.read().items, list(queries.values()))
        for version in _CONFIGS
    }
    swap = _judge(answers, times, oracles)
    _print_swap(swap, console)

    report = {
        "popularity": {"recall_at_10": metrics["test.popularity_recall_at_10"]},
        "two_tower": {"recall_at_10": metrics["test.recall_at_10"]},
        "swap": {key: swap[key] for key in ("answers", "errors", "mixed", "answers_by_version", "p50_ms", "p99_ms")},
        "rollback_s": swap["rollback_s"],
        "first_recommendation_s": first_recommendation_s,
        "seconds_total": time.monotonic() - start_s,
    }
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    console.print(Rule("Your turn"))
    console.print(_HOW_TO_CALL.format(store=store_folder), highlight=False, markup=False)
    seconds = report["seconds_total"]
    console.print(f"Figures: {folder / 'report.json'}. The demonstration took {seconds:.0f} s.", highlight=False)
    if swap["errors"] or swap["mixed"]:
        raise TwoTowerError(f"{swap['errors']} errors, {swap['mixed']} mixed answers; the first: {swap['first_fault']}")


_HOW_TO_CALL = """\
Nothing is left running. To serve again:

    .venv/bin/twotower up --store {store}

From the command line, in another terminal:

    .venv/bin/twotower retrieve user_id=42 history=50,181 -k 10
    .venv/bin/twotower status --store {store}

From Python:

    from retrieval_client import RetrievalClient

    with RetrievalClient("127.0.0.1:50051") as client:
        answer = client.retrieve({{"user_id": "42", "history": ["50", "181"]}}, k=10, attribute_names=["title"])
        for item in answer.items:
            print(item.item_id, item.score, item.attributes["title"])
"""


def _train(version: int, tables: movielens.MovieLens, folder: Path, console: Console) -> bool:
    """Trains and publishes a version, unless an earlier run did; returns whether it did."""
    store_folder = folder / "store"
    if version in CheckpointStore(Store(str(store_folder))).versions():
        console.print(f"Version {version} is there from an earlier run.")
        return False
    config = Path(trainer.__file__).parent / "configs" / _CONFIGS[version]
    twotower("train", str(config), "--data", str(tables.items.parent), "--store", str(store_folder))
    return True


def twotower(*arguments: str) -> None:
    """Runs a command as a user would, on this terminal."""
    result = subprocess.run([sys.executable, "-m", "cli.main", *arguments], check=False)
    if result.returncode != 0:
        raise TwoTowerError(f"twotower {' '.join(arguments)} ended with exit code {result.returncode}")


def _make_first_version_live(deployments: deployment.DeploymentStore) -> None:
    """Undoes what an earlier, perhaps interrupted, run deployed: version 1 live, version 2 held."""
    current = deployments.current()
    if current.live_version == 2:
        deployments.write(deployment.rolled_back(current, "the demonstration starts over"))
    elif current.standby_version == 2 and not current.held:
        deployments.write(deployment.held(current, "the demonstration starts over"))


def demo_queries(tables: movielens.MovieLens) -> dict[str, dict[str, Any]]:
    """Raw features of the first users, by user id: all that is known of them, the newest 50 titles as history."""
    interactions = pq.read_table(tables.interactions).sort_by("timestamp")
    histories: dict[int, list[str]] = {}
    for user_id, item_id in zip(interactions["user_id"].to_pylist(), interactions["item_id"].to_pylist(), strict=True):
        histories.setdefault(user_id, []).append(str(item_id))
    return {
        str(user_id): {"user_id": str(user_id), "history": histories[user_id][-50:]}
        for user_id in range(1, NUM_QUERIES + 1)
    }


def _show_recommendations(
    address: str, queries: Mapping[str, Mapping[str, Any]], items: pa.Table, console: Console
) -> None:
    titles = dict(zip(items["item_id"].to_pylist(), items["title"].to_pylist(), strict=True))
    features = queries[SHOWN_USER]
    watched = features["history"]
    console.print(f"User {SHOWN_USER} watched last: " + "; ".join(titles[item_id] for item_id in watched[-5:]))
    with RetrievalClient(address) as client:
        client.get_status()  # Connects, so that the time below is the answer's own.
        start_s = time.perf_counter()
        answer = client.retrieve(features, k=K, excluded_item_ids=watched, attribute_names=["title", "year"])
        milliseconds = (time.perf_counter() - start_s) * 1000
    table = Table(title=f"Recommended, by version {answer.checkpoint_version}, in {milliseconds:.1f} ms")
    for name in ("#", "item_id", "title", "year", "score"):
        table.add_column(name, justify="left" if name == "title" else "right")
    for rank, item in enumerate(answer.items, start=1):
        year = item.attributes["year"]
        shown_year = "" if year is None else f"{year:.0f}"
        table.add_row(str(rank), item.item_id, str(item.attributes["title"]), shown_year, f"{item.score:.4f}")
    console.print(table)


def _swap_under_load(
    stack: LocalStack,
    queries: Sequence[Mapping[str, Any]],
    tables: movielens.MovieLens,
    folder: Path,
    console: Console,
) -> tuple[pa.Table, SwapTimes]:
    """Keeps calling while version 2 is trained, swapped in and rolled back."""
    store_folder = folder / "store"
    is_new = 2 not in CheckpointStore(Store(str(store_folder))).versions()
    console.print("Clients keep calling from here on.")
    with (
        clients_calling(stack.query_address, queries, folder) as answers_path,
        RetrievalClient(stack.query_address) as client,
    ):
        load_start_s = time.monotonic()
        time.sleep(QUIET_S)
        training_start_s = time.monotonic()
        if is_new:
            console.print("Training version 2, of another dimension and another architecture, meanwhile:")
            _train(2, tables, folder, console)
            swap_start_s = time.monotonic()
        else:
            console.print("Version 2, of another dimension and another architecture, is there from an earlier run.")
            swap_start_s = time.monotonic()
            twotower("stage", "2", "--store", str(store_folder))
        deployments = DeploymentStore(Store(str(store_folder)))
        _wait_for_live(client, 2, lambda: deployments.current().reason)
        swap_end_s = time.monotonic()
        act = "published" if is_new else "staged"
        console.print(f"Version 2 is live, {swap_end_s - swap_start_s:.1f} s after it was {act}.", highlight=False)
        time.sleep(QUIET_S)
        rollback_start_s = time.monotonic()
        twotower("rollback", "--store", str(store_folder))
        _wait_for_live(client, 1, lambda: deployments.current().reason)
        time.sleep(QUIET_S / 2)
        load_end_s = time.monotonic()
    times = SwapTimes(load_start_s, training_start_s, swap_start_s, swap_end_s, rollback_start_s, load_end_s)
    return pq.read_table(answers_path), times


@contextmanager
def clients_calling(address: str, queries: Sequence[Mapping[str, Any]], folder: Path, *options: str) -> Iterator[Path]:
    """Runs the load generator; yields the path of its answers, which are there when the block has ended."""
    queries_path, answers_path = folder / "load" / "queries.json", folder / "load" / "answers.parquet"
    queries_path.parent.mkdir(parents=True, exist_ok=True)
    answers_path.unlink(missing_ok=True)
    queries_path.write_text(json.dumps(list(queries)))
    command = [sys.executable, "-m", "cli.demo.load", address, str(queries_path), str(answers_path), "--k", str(K)]
    command += options
    process = subprocess.Popen(command)
    try:
        yield answers_path
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if not answers_path.exists():
        raise TwoTowerError(f"the load generator ended with exit code {process.returncode} and left no answers")


def _wait_for_live(client: RetrievalClient, version: int, last_reason: Callable[[], str]) -> None:
    deadline_s = time.monotonic() + SWAP_LIMIT_S
    while client.get_status().live_version != version:
        if time.monotonic() > deadline_s:
            raise NotReadyError(
                f"version {version} did not go live in {SWAP_LIMIT_S:.0f} s; last record: {last_reason()}"
            )
        time.sleep(0.05)


def _judge(answers: pa.Table, times: SwapTimes, oracles: Mapping[int, ExactSearch]) -> dict[str, Any]:
    """Compares every answer with exact search at the version it reports."""
    first_fault = ""
    num_mixed = 0
    succeeded = answers.filter(pc.equal(answers["error"], ""))
    for row in succeeded.to_pylist():
        if row["version"] not in oracles:
            fault = f"version {row['version']} was never published"
        else:
            fault = oracles[row["version"]].fault(row["query"], row["item_ids"], row["scores"], K)
        if fault:
            num_mixed += 1
            first_fault = first_fault or f"version {row['version']}: {fault}"
    errors = answers.filter(pc.not_equal(answers["error"], ""))
    if errors.num_rows:
        first_fault = first_fault or errors["error"][0].as_py()
    sent_s = succeeded["sent_s"].to_numpy()
    done_s = succeeded["done_s"].to_numpy()
    versions = succeeded["version"].to_numpy()
    phases = {
        "before": (times.load_start_s, times.training_start_s),
        "training": (times.training_start_s, times.swap_start_s),
        "during": (times.swap_start_s, times.swap_end_s),
        "after": (times.swap_end_s, times.rollback_start_s),
        "rollback": (times.rollback_start_s, times.load_end_s),
    }
    counts: dict[str, int] = {}
    percentiles: dict[str, dict[str, float]] = {"p50_ms": {}, "p99_ms": {}}
    for phase, (start_s, end_s) in phases.items():
        milliseconds = (done_s - sent_s)[(sent_s >= start_s) & (sent_s < end_s)] * 1000
        counts[phase] = milliseconds.size
        if milliseconds.size:
            percentiles["p50_ms"][phase] = float(np.percentile(milliseconds, 50))
            percentiles["p99_ms"][phase] = float(np.percentile(milliseconds, 99))
    last_old_s = done_s[(sent_s >= times.rollback_start_s) & (versions == 2)].max(initial=times.rollback_start_s)
    return {
        "answers": succeeded.num_rows,
        "errors": errors.num_rows,
        "mixed": num_mixed,
        "first_fault": first_fault,
        "answers_by_version": {str(version): int((versions == version).sum()) for version in oracles},
        "answers_by_phase": counts,
        **percentiles,
        "rollback_s": float(last_old_s - times.rollback_start_s),
    }


def _quality_table(metrics: Mapping[str, float]) -> Table:
    """What training printed, for a version of an earlier run."""
    table = Table(title="Test split")
    for name in ("", "Recall@10", "NDCG@10"):
        table.add_column(name, justify="right" if name else "left")
    for name, prefix in (("popularity", "test.popularity_"), ("two towers", "test.")):
        table.add_row(name, f"{metrics[prefix + 'recall_at_10']:.4f}", f"{metrics[prefix + 'ndcg_at_10']:.4f}")
    return table


def _print_swap(swap: Mapping[str, Any], console: Console) -> None:
    table = Table(title="Latency seen by the clients, in milliseconds")
    table.add_column("phase")
    for name in ("answers", "p50", "p99"):
        table.add_column(name, justify="right")
    for phase, description in _PHASES.items():
        if phase in swap["p99_ms"]:
            latencies = (f"{swap[percentile][phase]:.1f}" for percentile in ("p50_ms", "p99_ms"))
            table.add_row(description, f"{swap['answers_by_phase'][phase]:,}", *latencies)
    console.print(table)
    by_version = ", ".join(f"{count:,} by version {version}" for version, count in swap["answers_by_version"].items())
    console.print(
        f"{swap['answers']:,} answers ({by_version}), {swap['errors']} errors. Each answer was compared with exact "
        f"search in float64 at the version it reports: {swap['mixed']} mixed.",
        highlight=False,
    )
    console.print(
        f"Rollback: the last answer of version 2 came {swap['rollback_s']:.2f} s after the command was started.",
        highlight=False,
    )
