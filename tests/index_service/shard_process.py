"""A real shard replica in a process of its own, and a client for it.

Deliberately does not know what a test wants of it.
"""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
import numpy as np
from numpy.typing import NDArray
from retrieval.index.v1 import index_service_pb2 as index_pb2
from retrieval.index.v1 import index_service_pb2_grpc as index_grpc

from towers.rpc import CHANNEL_OPTIONS

PATIENCE_S = 30.0
"""How long anything may take on a noisy machine before a test gives up."""


@dataclass(frozen=True)
class SearchResult:
    """An unpacked `SearchResponse`."""

    item_ids: list[list[str]]
    scores: list[NDArray[np.float32]]
    attributes: dict[str, list[Any]]
    checkpoint_version: int
    catalogue_version: str


def search_request(embeddings: NDArray[Any], version: int, k: int = 10, **fields: Any) -> index_pb2.SearchRequest:
    fields = {"shard": 0, "num_shards": 1, "num_queries": len(embeddings), **fields}
    packed = np.ascontiguousarray(embeddings, dtype="<f4").tobytes()
    return index_pb2.SearchRequest(checkpoint_version=version, query_embeddings=packed, k=k, **fields)


def unpacked(response: index_pb2.SearchResponse) -> SearchResult:
    counts = np.frombuffer(response.hit_counts, "<u4")
    ends = np.cumsum(np.frombuffer(response.item_id_sizes, "<u4"), dtype=np.int64)
    assert (ends[-1] if len(ends) else 0) == len(response.item_ids)
    starts = np.concatenate(([0], ends[:-1])) if len(ends) else ends
    ids = [response.item_ids[start:end].decode() for start, end in zip(starts, ends, strict=True)]
    scores = np.frombuffer(response.scores, "<f4")
    assert len(scores) == len(ids) == counts.sum()
    limits = [0, *np.cumsum(counts).tolist()]
    slices = [slice(start, end) for start, end in pairwise(limits)]
    return SearchResult(
        item_ids=[ids[part] for part in slices],
        scores=[scores[part] for part in slices],
        attributes={column.name: list(column.values) for column in response.attributes},
        checkpoint_version=response.checkpoint_version,
        catalogue_version=response.catalogue_version,
    )


def until(condition: Callable[[], Any], what: str) -> Any:
    """Waits until a condition holds, and returns its value."""
    give_up = time.monotonic() + PATIENCE_S
    while time.monotonic() < give_up:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"{what}: not within {PATIENCE_S} s")


@dataclass
class ShardProcess:
    """One `twotower serve index`."""

    store_url: str
    shard: str = "0/1"
    environment: dict[str, str] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)

    def start(self) -> Self:
        settings = {
            "TWOTOWER_STORE": self.store_url,
            "TWOTOWER_SHARD": self.shard,
            "TWOTOWER_ADDRESS": "127.0.0.1:0",
            "TWOTOWER_POLL_INTERVAL_S": "0.05",
            "TWOTOWER_DRAIN_S": "0",
            "OMP_NUM_THREADS": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cli.main", "serve", "index"],
            env={**os.environ, **settings, **self.environment},
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stderr is not None
        self._reader = threading.Thread(target=self._read, args=(self.process.stderr,), daemon=True)
        self._reader.start()
        port = until(self._port, "listening")
        self.address = f"127.0.0.1:{port}"
        self.channel = grpc.insecure_channel(self.address, options=CHANNEL_OPTIONS)
        self.stub = index_grpc.IndexServiceStub(self.channel)
        return self

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Ends the process; its exit code."""
        # Builders end with their shard, but one that a test has stopped before it said so would not.
        builders = self.builder_pids() if number == signal.SIGKILL and self.process.poll() is None else []
        if self.process.poll() is None:
            self.process.send_signal(number)
        for builder in builders:
            with suppress(ProcessLookupError):
                os.kill(builder, signal.SIGKILL)
        code = self.process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        assert self.process.stderr is not None
        self.process.stderr.close()
        self.channel.close()
        return code

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop(signal.SIGKILL)
        if error is not None:
            sys.stderr.write("".join(self.log))

    def search(self, embeddings: NDArray[Any], version: int, k: int = 10, **fields: Any) -> SearchResult:
        return unpacked(self.stub.Search(search_request(embeddings, version, k, **fields), timeout=PATIENCE_S))

    def status(self) -> index_pb2.GetShardStatusResponse:
        return self.stub.GetShardStatus(index_pb2.GetShardStatusRequest(), timeout=PATIENCE_S)

    def version(self, version: int) -> index_pb2.VersionStatus | None:
        return next((status for status in self.status().versions if status.checkpoint_version == version), None)

    def until_state(self, version: int, state: str) -> index_pb2.VersionStatus:
        wanted = index_pb2.VersionState.Value(f"VERSION_STATE_{state}")

        def reached() -> index_pb2.VersionStatus | None:
            status = self.version(version)
            return status if status is not None and status.state == wanted else None

        try:
            return until(reached, f"version {version} {state}")
        except AssertionError as error:
            raise AssertionError(f"{error}; it is {self.status()}") from error

    def until_versions(self, versions: Sequence[int]) -> None:
        until(lambda: [s.checkpoint_version for s in self.status().versions] == list(versions), f"only {versions}")

    def builder_pids(self) -> list[int]:
        """Builders that this process started and that live."""
        return children_of(self.process.pid)

    def num_builds(self) -> int:
        """Builders that this process ever started."""
        return sum("builds checkpoint" in line for line in self.log)

    def _read(self, stream: Any) -> None:
        for line in stream:
            self.log.append(line)

    def _port(self) -> int | None:
        if self.process.poll() is not None:
            raise AssertionError("".join(self.log))
        found = re.search(r"\(port (\d+)\)", "".join(self.log))
        return int(found.group(1)) if found else None


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
