"""Our index server: one shard in a process of its own, asked as the query service asks it.

Deliberately filled by its own means alone: a checkpoint whose item tower looks vectors up, a catalogue of the items,
a deployment record. So filling, and replacing, include publishing the checkpoint and embedding every item.
"""

import asyncio
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray
from retrieval.index.v1 import index_service_pb2, index_service_pb2_grpc

from benchmarks.index.checkpoints import lookup_checkpoint, lookup_items
from benchmarks.serving.peer_servers.side import CALL_TIMEOUT_S, HOST, Band, K, SideError, free_port, server
from towers.catalogue import Catalogue
from towers.checkpoint import CheckpointStore
from towers.deployment import Deployment, DeploymentStore
from towers.rpc import CHANNEL_OPTIONS
from towers.store import Store

_INDEX_TYPES = {0.95: "IVF632,SQ8", 0.985: "IVF632,SQfp16"}
"""By the recall to reach: those that builds choose for 100,000 items, given as the others' graphs are."""
_FOLLOW_S = 0.5
"""Between two looks of a client at the deployment record."""
_BUILD_S = 300.0
_POLL_S = 0.02
_AVAILABLE = index_service_pb2.VERSION_STATE_AVAILABLE


class ShardClient:
    """One channel for all callers; names the live version of the deployment record in each call."""

    def __init__(self, address: str, store: str) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._stub: Any = index_service_pb2_grpc.IndexServiceStub(self._channel)
        self._records = DeploymentStore(Store(store))
        self._version = self._live()
        self._following = asyncio.create_task(self._follow())

    async def search(self, vectors: NDArray[np.float32]) -> Sequence[Sequence[Any]]:
        """One call, however many queries; ids become text, as all others give them."""
        request = index_service_pb2.SearchRequest(
            checkpoint_version=self._version,
            num_queries=len(vectors),
            query_embeddings=vectors.tobytes(),
            k=K,
            num_shards=1,
        )
        response = await self._stub.Search(request, timeout=CALL_TIMEOUT_S)
        np.frombuffer(response.scores, "<f4").tolist()
        packed, sizes = response.item_ids.decode(), np.frombuffer(response.item_id_sizes, "<u4")
        ids = [packed[first:last] for first, last in itertools.pairwise([0, *sizes.cumsum().tolist()])]
        counts = np.frombuffer(response.hit_counts, "<u4")
        return [ids[first:last] for first, last in itertools.pairwise([0, *counts.cumsum().tolist()])]

    def row(self, item: str) -> int:
        """The id is the row."""
        return int(item)

    def _live(self) -> int:
        return self._records.current().live_version or 0

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(_FOLLOW_S)
            self._version = await asyncio.to_thread(self._live)


class IndexServer:
    """A store, and a shard whose builds tune their searches to the band's recall."""

    NAME = "twotower"
    IS_SERVER = True
    TUNES_ITSELF = True

    def __init__(self, folder: Path, band: Band, stack: ExitStack) -> None:
        self.versions = f"faiss {version('faiss-cpu')}, grpcio {version('grpcio')}"
        self._store = Store(str(folder / "store"))
        self._address = f"{HOST}:{free_port()}"
        environment = {
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "passive",
            "TWOTOWER_STORE": self._store.url,
            "TWOTOWER_SHARD": "0/1",
            "TWOTOWER_ADDRESS": self._address,
            "TWOTOWER_TARGET_RECALL": str(band.low),
            "TWOTOWER_INDEX_TYPE": _INDEX_TYPES[band.low],
        }
        command = [sys.executable, "-m", "cli.main", "serve", "index"]
        running = stack.enter_context(server(command, folder / "log", environment))
        channel = stack.enter_context(grpc.insecure_channel(self._address))
        self._stub: Any = index_service_pb2_grpc.IndexServiceStub(channel)
        running.wait(lambda: [self._statuses()])

    def fill(self, items: NDArray[np.float32], queries: NDArray[np.float32]) -> str:
        """Publishes checkpoint 1 and the catalogue, and lets the shard build its index."""
        CheckpointStore(self._store).publish(lookup_checkpoint(items, queries))
        catalogue = Catalogue(self._store)
        catalogue.upsert(lookup_items(len(items)))
        catalogue.compact()
        self._record(1, live=1, standby=None)
        return self._await_version(1)

    def client(self) -> Callable[[], ShardClient]:
        """Clients know the shard and the store."""
        return partial(ShardClient, self._address, self._store.url)

    def replace(self, items: NDArray[np.float32], queries: NDArray[np.float32]) -> None:
        """Publishes checkpoint 2, which embeds the same items elsewhere, stages it and swaps once it is available."""
        CheckpointStore(self._store).publish(lookup_checkpoint(items, queries))
        self._record(2, live=1, standby=2)
        self._await_version(2)
        self._record(3, live=2, standby=1)
        time.sleep(_FOLLOW_S)

    def _record(self, revision: int, live: int, standby: int | None) -> None:
        DeploymentStore(self._store).write(
            Deployment(
                revision=revision,
                live_version=live,
                standby_version=standby,
                held=False,
                reason="benchmark",
                created=datetime.now(UTC),
            )
        )

    def _await_version(self, number: int) -> str:
        give_up_s = time.monotonic() + _BUILD_S
        while time.monotonic() < give_up_s:
            for status in self._statuses():
                if (status.checkpoint_version, status.state) == (number, _AVAILABLE):
                    setting = next(setting for setting in status.search_settings if setting.k >= K)
                    return f"{status.index_type} {setting.parameters}"
            time.sleep(_POLL_S)
        raise SideError(f"version {number} is not available after {_BUILD_S:.0f} s: {self._statuses()}")

    def _statuses(self) -> Sequence[Any]:
        request = index_service_pb2.GetShardStatusRequest()
        return list(self._stub.GetShardStatus(request, timeout=CALL_TIMEOUT_S).versions)
