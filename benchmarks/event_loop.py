"""Which event loop should the query service run on? `python -m benchmarks.event_loop`, after `make demo`.

Deliberately changes nothing but the loop: the same shards, the same towers, the same calls, in alternating bursts.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console
from rich.table import Table

from cli.demo import movielens
from cli.demo.run import K, demo_queries
from cli.local_stack import LocalStack
from query_service.serve import serving
from query_service.settings import QuerySettings
from retrieval_client import AsyncRetrievalClient

_LOOPS = {"asyncio": asyncio.run, "uvloop": uvloop.run}
_IN_FLIGHT = (1, 8, 32)
_WAIT_S = 60.0


async def _serve(store: str, shards: str) -> None:
    """Serves on a free port, which is printed, until stdin closes."""
    settings = QuerySettings(store=store, shards=shards, address="127.0.0.1:0", redis_url="")
    async with serving(settings) as port:
        print(port, flush=True)
        await asyncio.to_thread(sys.stdin.read)


async def _burst(client: AsyncRetrievalClient, queries: Sequence[Any], in_flight: int, burst_s: float) -> list[float]:
    """Milliseconds of each call, `in_flight` at a time."""
    end_s = time.perf_counter() + burst_s
    milliseconds: list[float] = []

    async def keep_calling(number: int) -> None:
        while (start_s := time.perf_counter()) < end_s:
            await client.retrieve(queries[number % len(queries)], k=K)
            milliseconds.append((time.perf_counter() - start_s) * 1000)
            number += in_flight

    await asyncio.gather(*(keep_calling(number) for number in range(in_flight)))
    return milliseconds


async def _compare(ports: dict[str, int], queries: Sequence[Any], rounds: int, burst_s: float) -> list[dict[str, Any]]:
    rows = []
    clients = {name: AsyncRetrievalClient(f"127.0.0.1:{port}") for name, port in ports.items()}
    for client in clients.values():
        await client.retrieve(queries[0], k=K)
    for in_flight in _IN_FLIGHT:
        medians: dict[str, list[float]] = {name: [] for name in clients}
        rates: dict[str, list[float]] = {name: [] for name in clients}
        for _ in range(rounds):
            for name, client in clients.items():
                milliseconds = await _burst(client, queries, in_flight, burst_s)
                medians[name].append(statistics.median(milliseconds))
                rates[name].append(len(milliseconds) / burst_s)
        ratios = [slow / fast for slow, fast in zip(rates["uvloop"], rates["asyncio"], strict=True)]
        rows.append(
            {
                "in_flight": in_flight,
                **{f"{name}_p50_ms": statistics.median(medians[name]) for name in clients},
                **{f"{name}_per_s": statistics.median(rates[name]) for name in clients},
                "uvloop_to_asyncio": statistics.median(ratios),
                "worst": min(ratios),
                "best": max(ratios),
            }
        )
    for client in clients.values():
        await client.close()
    return rows


def main() -> None:
    """Runs from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("var/demo"), help="folder of the demonstration")
    parser.add_argument("--quick", action="store_true", help="fewer, shorter bursts")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--serve", nargs=3, metavar=("LOOP", "STORE", "SHARDS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        name, store, shards = options.serve
        _LOOPS[name](_serve(store, shards))
        return
    queries = list(demo_queries(movielens.fetch(options.folder / "data")).values())
    store = str(options.folder / "store")
    with LocalStack(store=store, folder=options.folder, query_port=0) as stack:
        stack.wait_ready(_WAIT_S)
        command = [sys.executable, "-m", "benchmarks.event_loop", "--serve"]
        services = {
            name: subprocess.Popen(
                [*command, name, store, ",".join(stack.shard_addresses)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for name in _LOOPS
        }
        try:
            ports = {name: int(service.stdout.readline()) for name, service in services.items() if service.stdout}
            time.sleep(2.0)
            rounds, burst_s = (3, 1.0) if options.quick else (7, 1.5)
            rows = asyncio.run(_compare(ports, queries, rounds, burst_s))
        finally:
            for service in services.values():
                service.communicate()
    table = Table(
        title="Query service on asyncio and on uvloop; ratio of calls a second, median (worst, best) of rounds"
    )
    for column in ("in flight", "p50 ms asyncio", "uvloop", "calls/s asyncio", "uvloop", "uvloop / asyncio"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            str(row["in_flight"]),
            *(f"{row[f'{name}_p50_ms']:.2f}" for name in _LOOPS),
            *(f"{row[f'{name}_per_s']:.0f}" for name in _LOOPS),
            f"{row['uvloop_to_asyncio']:.2f} ({row['worst']:.2f}, {row['best']:.2f})",
        )
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
