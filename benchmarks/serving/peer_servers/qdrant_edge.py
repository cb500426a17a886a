"""Qdrant Edge, the core of Qdrant as a library: searched inside the callers' own process.

Deliberately no server, so it pays for no network and cannot be the best of the servers; it shows what Qdrant's index
itself takes.
"""

import functools
import importlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.serving.peer_servers.side import BUILD_EFFORT, Band, K, SideError, chunks

_LINKS = {0.95: 5, 0.985: 8}
"""Of a node of the graph, by the recall to reach; at the usual 16 the least effort finds more."""
_ITEMS_A_CALL = 5000


@functools.cache
def _opened(folder: Path) -> Any:
    """One shard for all callers of a process."""
    return importlib.import_module("qdrant_edge").EdgeShard.load(str(folder))


class QdrantClient:
    """The shard itself."""

    def __init__(self, folder: Path) -> None:
        self._library = importlib.import_module("qdrant_edge")
        self._shard = _opened(folder)
        self._parameters: Any = None

    def prepare(self, effort: int) -> None:
        """Sets the effort of each query."""
        self._parameters = self._library.SearchParams(hnsw_ef=effort)

    def search(self, vectors: NDArray[np.float32]) -> Sequence[Sequence[Any]]:
        """One call, however many queries."""
        requests = [
            self._library.QueryRequest(
                limit=K, query=self._library.Query.Nearest(vector.tolist()), params=self._parameters
            )
            for vector in vectors
        ]
        return list(self._shard.query_batch(self._library.QueryBatchRequest(requests)))

    def row(self, item: Any) -> int:
        """The id is the row."""
        return int(item.id)


class QdrantEdge:
    """A folder."""

    NAME = "Qdrant Edge, in process"
    IS_SERVER = False
    TUNES_ITSELF = False

    def __init__(self, folder: Path, band: Band, stack: ExitStack) -> None:  # noqa: ARG002
        self._library = importlib.import_module("qdrant_edge")
        self._folder = folder
        self._links = _LINKS[band.low]
        self.versions = f"qdrant-edge-py {version('qdrant-edge-py')}"

    def fill(self, items: NDArray[np.float32], queries: NDArray[np.float32]) -> str:  # noqa: ARG002
        """Writes all items, then lets them be indexed."""
        library = self._library
        shard = library.EdgeShard.create(
            str(self._folder),
            library.EdgeConfig(
                vectors=library.EdgeVectorParams(size=items.shape[1], distance=library.Distance.Dot),
                hnsw_config=library.HnswIndexConfig(m=self._links, ef_construct=BUILD_EFFORT, full_scan_threshold=10),
                optimizers=library.EdgeOptimizersConfig(indexing_threshold=1, default_segment_number=1),
            ),
        )
        for first, part in chunks(items, _ITEMS_A_CALL):
            points = [library.Point(first + i, vector.tolist()) for i, vector in enumerate(part)]
            shard.update(library.UpdateOperation.upsert_points(points))
        shard.optimize()
        num_indexed = shard.info().indexed_vectors_count
        shard.close()
        if num_indexed < len(items):
            raise SideError(f"{num_indexed} of {len(items)} items are indexed")
        return f"HNSW m={self._links}"

    def client(self) -> Callable[[], QdrantClient]:
        """Clients open the folder."""
        return partial(QdrantClient, self._folder)

    def replace(self, items: NDArray[np.float32], queries: NDArray[np.float32]) -> None:  # noqa: ARG002
        """A library has no clients to keep serving."""
        raise SideError("a library, not a server")
