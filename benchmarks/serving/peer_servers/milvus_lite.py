"""milvus-lite as a server, asked through pymilvus. It is Python over FAISS, and not Milvus itself.

Deliberately the server of the package's own command, in a process of its own.
"""

import importlib
import sysconfig
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.serving.peer_servers.side import (
    BUILD_EFFORT,
    CALL_TIMEOUT_S,
    HOST,
    Band,
    K,
    SideError,
    chunks,
    free_port,
    server,
)

_LINKS = {0.95: 4, 0.985: 8}
"""Of a node of the graph, by the recall to reach; at the usual 16 the least effort finds more."""
_ALIAS = "items"
_ITEMS_A_CALL = 5000


def _connected(port: int) -> Any:
    return importlib.import_module("pymilvus").MilvusClient(uri=f"http://{HOST}:{port}", timeout=10 * CALL_TIMEOUT_S)


class MilvusClient:
    """A connection; the effort goes with each call."""

    def __init__(self, port: int) -> None:
        self._client = _connected(port)
        self._parameters: dict[str, Any] = {}

    def prepare(self, effort: int) -> None:
        """Sets the effort of each query."""
        self._parameters = {"metric_type": "IP", "params": {"ef": effort}}

    def search(self, vectors: NDArray[np.float32]) -> Sequence[Sequence[Any]]:
        """One call, however many queries."""
        found = self._client.search(
            _ALIAS, data=list(vectors), limit=K, search_params=self._parameters, timeout=CALL_TIMEOUT_S
        )
        return list(found)

    def row(self, item: Any) -> int:
        """The id is the row."""
        return int(item["id"])


class MilvusLite:
    """A collection behind an alias."""

    NAME = "milvus-lite"
    IS_SERVER = True
    TUNES_ITSELF = False

    def __init__(self, folder: Path, band: Band, stack: ExitStack) -> None:
        self._links = _LINKS[band.low]
        self._library = importlib.import_module("pymilvus")
        importlib.import_module("milvus_lite")
        program = Path(sysconfig.get_path("scripts")) / "milvus-lite"
        port = free_port()
        options = ["--data-dir", str(folder / "data"), "--host", HOST, "--port", str(port)]
        running = stack.enter_context(server([str(program), "server", *options], folder / "log"))
        running.wait(lambda: _connected(port))
        self._port = port
        self._client = _connected(port)
        self.versions = f"milvus-lite {version('milvus-lite')}, pymilvus {version('pymilvus')}"

    def fill(self, items: NDArray[np.float32], queries: NDArray[np.float32]) -> str:  # noqa: ARG002
        """Inserts all items, then makes the index."""
        self._fill("first", items)
        self._client.create_alias("first", _ALIAS)
        return f"HNSW M={self._links}"

    def client(self) -> Callable[[], MilvusClient]:
        """Clients know the alias alone."""
        return partial(MilvusClient, self._port)

    def replace(self, items: NDArray[np.float32], queries: NDArray[np.float32]) -> None:  # noqa: ARG002
        """Fills a second collection and moves the alias."""
        self._fill("second", items)
        self._client.alter_alias("second", _ALIAS)
        self._client.drop_collection("first")

    def _fill(self, name: str, items: NDArray[np.float32]) -> None:
        schema = self._client.create_schema(auto_id=False)
        schema.add_field("id", self._library.DataType.INT64, is_primary=True)
        schema.add_field("vector", self._library.DataType.FLOAT_VECTOR, dim=items.shape[1])
        self._client.create_collection(name, schema=schema)
        for first, part in chunks(items, _ITEMS_A_CALL):
            self._client.insert(name, [{"id": first + i, "vector": vector} for i, vector in enumerate(part)])
        self._client.flush(name)
        wanted = self._client.prepare_index_params()
        graph = {"M": self._links, "efConstruction": BUILD_EFFORT}
        wanted.add_index("vector", index_type="HNSW", metric_type="IP", params=graph)
        self._client.create_index(name, wanted)
        self._client.load_collection(name)
        index = self._client.describe_index(name, self._client.list_indexes(name)[0])
        if index["index_type"] != "HNSW":
            raise SideError(f"the index is {index}")
