"""Real services to measure: index shards with a catalogue of any size, and query services in front of them.

Deliberately does not know what is measured.
"""

import asyncio
import gc
import multiprocessing
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from retrieval.feature.v1 import feature_pb2
from retrieval.query.v1 import query_service_pb2

from benchmarks.index.checkpoints import USER_ID, ids, lookup_checkpoint, lookup_items
from benchmarks.index.vectors import clustered
from cli.local_stack import QUERY, ROLLOUT, LocalStack
from query_service.serve import serving
from query_service.settings import QuerySettings
from towers import event_loop
from towers.catalogue import Catalogue
from towers.checkpoint import CheckpointStore
from towers.deployment import Deployment, DeploymentStore
from towers.errors import DeadlineError
from towers.health import is_serving
from towers.settings import layouts_text
from towers.store import Store

RETRIEVE = "/retrieval.query.v1.QueryService/Retrieve"
BATCH_RETRIEVE = "/retrieval.query.v1.QueryService/BatchRetrieve"
_SERVICE = "retrieval.query.v1.QueryService"
_WAIT_S = 240.0
_POLL_S = 0.05


@dataclass(frozen=True)
class World:
    """Index shards that serve version 1, and what they hold."""

    stack: LocalStack
    """Its query service and its controller were ended."""
    store: Store
    items: NDArray[np.float32]
    """`[N, D]`; item "0" is row 0."""
    queries: NDArray[np.float32]
    """`[Q, D]`; user "0" is row 0."""

    @property
    def features(self) -> list[Mapping[str, str]]:
        """Raw features of the Q queries."""
        return [{USER_ID: user} for user in ids(len(self.queries))]

    @property
    def shards(self) -> str:
        """Addresses of the shards, as the query service is told them."""
        return layouts_text(self.stack.layouts)


@contextmanager
def shards_with(
    num_items: int, dim: int, num_queries: int, folder: Path, *, num_shards: int = 2, replicas: int = 1
) -> Iterator[World]:
    """Builds a catalogue of clustered vectors and serves it from shards while the block runs.

    Args:
        num_items: N.
        dim: D.
        num_queries: Q.
        folder: Takes the store and the logs.
        num_shards: Of the layout.
        replicas: Of each shard.
    """
    items, queries = clustered(num_items, dim, num_queries)
    store = Store(str(folder / "store"))
    CheckpointStore(store).publish(lookup_checkpoint(items, queries))
    catalogue = Catalogue(store)
    catalogue.upsert(lookup_items(num_items))
    catalogue.compact()
    DeploymentStore(store).write(
        Deployment(
            revision=1,
            live_version=1,
            standby_version=None,
            held=False,
            reason="benchmark",
            created=datetime.now(UTC),
        )
    )
    with LocalStack(store=store.url, folder=folder, num_shards=num_shards, replicas=replicas, query_port=0) as stack:
        stack.wait_up()
        for name in (ROLLOUT, QUERY):
            stack.kill(name)
        give_up_s = time.monotonic() + _WAIT_S
        for name in [name for name in stack.names if name.startswith("shard")]:
            while not stack.is_ready(name):
                if time.monotonic() > give_up_s:
                    raise DeadlineError(f"{name} is not ready after {_WAIT_S:.0f} s: {stack.log(name)[-500:]}")
                time.sleep(_POLL_S)
        yield World(stack, store, items, queries)


@dataclass(frozen=True)
class Vitals:
    """What a query service holds."""

    num_tasks: int
    num_descriptors: int
    resident_bytes: int


class QueryProcess:
    """A query service in a process of its own."""

    def __init__(self, world: World, **settings: Any) -> None:
        """Starts nothing yet.

        Args:
            world: The shards it asks.
            settings: What differs from the defaults.
        """
        self.address = ""
        """Where it listens, once it runs."""
        plain = {"redis_url": "", "shadow_share": 0.0, "drain_s": 0.0, "address": "127.0.0.1:0"}
        self._settings = {**plain, "store": world.store.url, "shards": world.shards, **settings}

    @property
    def pid(self) -> int:
        """Of the process."""
        return int(self._process.pid or 0)

    def vitals(self) -> Vitals:
        """What it holds now, once what is garbage is gone."""
        self._connection.send(None)
        vitals: Vitals = self._connection.recv()
        return vitals

    def __enter__(self) -> Self:
        spawning = multiprocessing.get_context("spawn")
        self._connection, theirs = spawning.Pipe()
        self._process = spawning.Process(target=_serve, args=(theirs, self._settings), daemon=True)
        self._process.start()
        theirs.close()
        self.address = f"127.0.0.1:{self._connection.recv()}"
        give_up_s = time.monotonic() + _WAIT_S
        while not is_serving(self.address, _SERVICE):
            if time.monotonic() > give_up_s:
                raise DeadlineError(f"the query service is not ready after {_WAIT_S:.0f} s")
            time.sleep(_POLL_S)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._connection.close()
        self._process.join()


def retrieve_requests(users: Sequence[Mapping[str, str]], k: int) -> list[query_service_pb2.RetrieveRequest]:
    """One request for each user."""
    return [query_service_pb2.RetrieveRequest(query=_query(features), k=k) for features in users]


def batch_requests(
    users: Sequence[Mapping[str, str]], k: int, batch_size: int
) -> list[query_service_pb2.BatchRetrieveRequest]:
    """One request for each `batch_size` users; what is left over is left out."""
    return [
        query_service_pb2.BatchRetrieveRequest(
            queries=[_query(features) for features in users[first : first + batch_size]], k=k
        )
        for first in range(0, len(users) - batch_size + 1, batch_size)
    ]


def _query(features: Mapping[str, str]) -> query_service_pb2.Query:
    return query_service_pb2.Query(
        features={name: feature_pb2.FeatureValue(string_value=value) for name, value in features.items()}
    )


def num_descriptors(pid: int | str) -> int:
    """Files, sockets and pipes that a process has open."""
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


def resident_bytes(pid: int | str) -> int:
    """Memory of a process that is in use."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _serve(connection: Connection, settings: Mapping[str, Any]) -> None:
    event_loop.run(_serve_until_closed(connection, settings))


async def _serve_until_closed(connection: Connection, settings: Mapping[str, Any]) -> None:
    async with serving(QuerySettings(**settings)) as port:
        connection.send(port)
        while True:
            try:
                await asyncio.to_thread(connection.recv)
            except EOFError:
                return
            gc.collect()
            connection.send(Vitals(len(asyncio.all_tasks()), num_descriptors("self"), resident_bytes("self")))
