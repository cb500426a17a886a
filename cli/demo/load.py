"""Clients that keep calling: a process of its own, so that measuring does not disturb what is measured.

Deliberately does not judge the answers; it records them all, with their times, for the oracle.
"""

import argparse
import asyncio
import gc
import json
import random
import signal
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from retrieval_client import AsyncRetrievalClient, RetrievalError

SCHEMA = pa.schema(
    {
        "sent_s": pa.float64(),
        "done_s": pa.float64(),
        "query": pa.int32(),
        "version": pa.int64(),
        "item_ids": pa.list_(pa.string()),
        "scores": pa.list_(pa.float32()),
        "shards_answered": pa.int32(),
        "shards_total": pa.int32(),
        "embedding_cached": pa.bool_(),
        "error": pa.string(),
    }
)
"""Times are of the monotonic clock, which all processes of a machine share."""


async def call_until_stopped(
    address: str,
    queries: list[dict[str, Any]],
    k: int,
    num_clients: int,
    num_connections: int,
    rate_per_s: float,
    limit_s: float,
) -> pa.Table:
    """Calls `Retrieve` with random queries, at a fixed rate, until SIGTERM, SIGINT or the time limit.

    Returns:
        One row per answer, columns as `SCHEMA`.
    """
    rows: list[dict[str, Any]] = []
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    end_s = time.monotonic() + limit_s

    async def keep_calling(client: AsyncRetrievalClient, seed: int) -> None:
        chosen = random.Random(seed)  # noqa: S311
        pause_s = num_clients / rate_per_s
        next_s = time.monotonic() + pause_s * chosen.random()
        while not stopped.is_set() and next_s < end_s:
            await asyncio.sleep(max(0.0, next_s - time.monotonic()))
            query = chosen.randrange(len(queries))
            rows.append(await _call(client, queries[query], query, k))
            next_s = max(next_s + pause_s, time.monotonic())

    async with AsyncRetrievalClient(address, num_connections=num_connections) as client:
        await asyncio.gather(*(keep_calling(client, seed) for seed in range(num_clients)))
    return pa.Table.from_pylist(rows, schema=SCHEMA)


async def _call(client: AsyncRetrievalClient, features: dict[str, Any], query: int, k: int) -> dict[str, Any]:
    row: dict[str, Any] = {"query": query, "sent_s": time.monotonic(), "error": ""}
    try:
        answer = await client.retrieve(features, k=k)
    except RetrievalError as error:
        row["error"] = str(error)
    else:
        row |= {
            "version": answer.checkpoint_version,
            "item_ids": [item.item_id for item in answer.items],
            "scores": [item.score for item in answer.items],
            "shards_answered": answer.shards_answered,
            "shards_total": answer.shards_total,
            "embedding_cached": answer.embedding_cached,
        }
    row["done_s"] = time.monotonic()
    return row


def main() -> None:
    """Runs from the command line: queries in as JSON, answers out as Parquet."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("address")
    parser.add_argument("queries", type=Path, help="JSON list of feature objects")
    parser.add_argument("answers", type=Path, help="Parquet file to write")
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--connections", type=int, default=1, help="to each replica, used in turn")
    parser.add_argument("--rate", type=float, default=200.0, help="calls a second, all clients together")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds after which it ends by itself")
    options = parser.parse_args()
    # All answers are kept: the collector would walk through them again and again, and the pauses would be measured.
    gc.disable()
    queries = json.loads(options.queries.read_text())
    answers = asyncio.run(
        call_until_stopped(
            options.address,
            queries,
            options.k,
            options.clients,
            options.connections,
            options.rate,
            options.limit,
        )
    )
    partial = options.answers.with_suffix(".partial")
    pq.write_table(answers, partial)
    partial.rename(options.answers)


if __name__ == "__main__":
    main()
