"""What no service can be faster than: echoes of messages of the same sizes, and encode and search in one process.

Deliberately does not know the services beside which the floors are shown.
"""

import asyncio
import multiprocessing
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

import grpc
import uvloop

from index_service.ann import AnnIndex
from towers.features import RawValue
from towers.rpc import CHANNEL_OPTIONS, SERVER_OPTIONS
from towers.tower import Tower

ECHO = "/benchmarks.Echo/Call"


@dataclass(frozen=True)
class Sizes:
    """Bytes of the messages of one hop."""

    request_bytes: int
    response_bytes: int


class EchoServer:
    """A process that answers every call with as many bytes as it is told, or asks another echo first."""

    def __init__(self, sizes: Sizes, next_address: str = "", next_sizes: Sizes | None = None) -> None:
        """Starts nothing yet.

        Args:
            sizes: Of the messages that come in and go out.
            next_address: Where each call is passed on before it is answered; empty: nowhere.
            next_sizes: Of those messages.
        """
        self.address = ""
        """Where it listens, once it runs."""
        self._plan = (sizes, next_address, next_sizes)

    def __enter__(self) -> Self:
        spawning = multiprocessing.get_context("spawn")
        self._connection, theirs = spawning.Pipe()
        self._process = spawning.Process(target=_serve, args=(theirs, *self._plan), daemon=True)
        self._process.start()
        theirs.close()
        self.address = self._connection.recv()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._connection.close()
        self._process.join()


def in_process_rate(
    tower: Tower, ann: AnnIndex, queries: Sequence[Mapping[str, RawValue]], k: int, batch_size: int, seconds: float
) -> float:
    """Queries a second that one thread encodes and searches, so many at a time; what it finds stays numbers of rows."""
    num_queries, start_s = 0, time.perf_counter()
    while (elapsed_s := time.perf_counter() - start_s) < seconds:
        first = num_queries % len(queries)
        batch = queries[first : first + batch_size]
        ann.search(tower.embed_rows(batch), k)
        num_queries += len(batch)
    return num_queries / elapsed_s


class _Echo(grpc.GenericRpcHandler):
    def __init__(self, sizes: Sizes, next_address: str, next_sizes: Sizes | None) -> None:
        self._response = bytes(sizes.response_bytes)
        self._channel: grpc.aio.Channel | None = None
        if next_sizes is not None:
            self._channel = grpc.aio.insecure_channel(next_address, options=CHANNEL_OPTIONS)
            self._next: Any = self._channel.unary_unary(ECHO)
            self._next_request = bytes(next_sizes.request_bytes)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:  # noqa: ARG002
        """Every method is the same."""
        return grpc.unary_unary_rpc_method_handler(self._answer)

    async def close(self) -> None:
        """Closes the channel."""
        if self._channel:
            await self._channel.close()

    async def _answer(self, request: bytes, context: Any) -> bytes:  # noqa: ARG002
        if self._channel:
            await self._next(self._next_request)
        return self._response


def _serve(connection: Connection, sizes: Sizes, next_address: str, next_sizes: Sizes | None) -> None:
    uvloop.run(_echo(connection, sizes, next_address, next_sizes))


async def _echo(connection: Connection, sizes: Sizes, next_address: str, next_sizes: Sizes | None) -> None:
    echo = _Echo(sizes, next_address, next_sizes)
    server = grpc.aio.server(options=SERVER_OPTIONS)
    server.add_generic_rpc_handlers((echo,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    connection.send(f"127.0.0.1:{port}")
    try:
        await asyncio.to_thread(connection.recv)
    except EOFError:
        await server.stop(None)
        await echo.close()
