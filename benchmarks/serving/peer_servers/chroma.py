"""Chroma as a server, asked through its HTTP client.

Deliberately does not know what its documents and embedding functions are for.
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

from benchmarks.serving.peer_servers.side import BUILD_EFFORT, HOST, Band, K, SideError, chunks, free_port, server

_LINKS = {0.95: 6, 0.985: 10}
"""Of a node of the graph, by the recall to reach; at the usual 16 the least effort finds more."""
_NAME = "items"
_ITEMS_A_CALL = 5000


def _connected(port: int) -> Any:
    chroma = importlib.import_module("chromadb")
    return chroma.HttpClient(HOST, port, settings=chroma.Settings(anonymized_telemetry=False))


class ChromaClient:
    """Holds a collection by its id, and looks its name up again once that fails."""

    def __init__(self, port: int) -> None:
        self._client = _connected(port)
        self._find()

    def prepare(self, effort: int) -> None:
        """The effort is the collection's: whoever comes first sets it."""
        self._find()
        if self._collection.configuration["hnsw"]["ef_search"] != effort:
            self._collection.modify(configuration={"hnsw": {"ef_search": effort}})

    def search(self, vectors: NDArray[np.float32]) -> Sequence[Sequence[Any]]:
        """One call, however many queries."""
        try:
            found = self._collection.query(query_embeddings=vectors, n_results=K, include=["distances"])
        except Exception:
            self._find()
            raise
        return list(found["ids"])

    def row(self, item: str) -> int:
        """The id is the row."""
        return int(item)

    def _find(self) -> None:
        self._collection = self._client.get_collection(_NAME, embedding_function=None)


class Chroma:
    """A collection."""

    NAME = "Chroma"
    IS_SERVER = True
    TUNES_ITSELF = False

    def __init__(self, folder: Path, band: Band, stack: ExitStack) -> None:
        self._links = _LINKS[band.low]
        importlib.import_module("chromadb")
        program = Path(sysconfig.get_path("scripts")) / "chroma"
        self._port = free_port()
        options = ["--path", str(folder / "data"), "--host", HOST, "--port", str(self._port)]
        running = stack.enter_context(server([str(program), "run", *options], folder / "log"))
        running.wait(lambda: _connected(self._port))
        self._client = _connected(self._port)
        self.versions = f"chromadb {version('chromadb')}"

    def fill(self, items: NDArray[np.float32], queries: NDArray[np.float32]) -> str:  # noqa: ARG002
        """Adds all items."""
        collection = self._filled(_NAME, items)
        links = collection.configuration["hnsw"]["max_neighbors"]
        if links != self._links:
            raise SideError(f"the graph has {links} links, not {self._links}")
        return f"HNSW M={links}"

    def client(self) -> Callable[[], ChromaClient]:
        """Clients know the name of the collection."""
        return partial(ChromaClient, self._port)

    def replace(self, items: NDArray[np.float32], queries: NDArray[np.float32]) -> None:  # noqa: ARG002
        """Fills a second collection and gives it the name of the first, and its effort."""
        old = self._client.get_collection(_NAME, embedding_function=None)
        new = self._filled("next", items)
        new.modify(configuration={"hnsw": {"ef_search": old.configuration["hnsw"]["ef_search"]}})
        old.modify(name="last")
        new.modify(name=_NAME)
        self._client.delete_collection("last")

    def _filled(self, name: str, items: NDArray[np.float32]) -> Any:
        graph = {"space": "ip", "max_neighbors": self._links, "ef_construction": BUILD_EFFORT}
        collection = self._client.create_collection(name, configuration={"hnsw": graph}, embedding_function=None)
        for first, part in chunks(items, _ITEMS_A_CALL):
            collection.add(ids=[str(first + i) for i in range(len(part))], embeddings=part)
        if collection.count() != len(items):
            raise SideError(f"{collection.count()} of {len(items)} items are there")
        return collection
