"""The callers of the measured servers, in a process of their own that waits for orders.

Deliberately does not know any server: it is handed what makes a client, and calls by the client's own library, from as
many threads as there are callers, or from one event loop where the library has coroutines.
"""

import asyncio
import inspect
import itertools
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

import numpy as np
import uvloop
from numpy.typing import NDArray

from benchmarks.serving.peer_servers.side import Client, K, SideError


@dataclass
class Measured:
    """What callers got."""

    seconds: float = 0.0
    """From the first call to the last answer."""
    latencies_s: list[float] = field(default_factory=list)
    """Of the calls that were answered in full."""
    num_failed: int = 0
    """Calls that raised, or gave fewer than K items for a query."""
    first_error: str = ""


class Callers:
    """The process. Every method raises SideError where a client fails."""

    def __enter__(self) -> Self:
        spawning = multiprocessing.get_context("spawn")
        self._connection, theirs = spawning.Pipe()
        self._process = spawning.Process(target=_obey, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._connection.close()
        self._process.join()

    def connect(self, name: str, make_client: Callable[[], Client], queries: NDArray[np.float32]) -> None:
        """Makes a side known; its queries `[Q, D]` are sent in turn, over and over."""
        self._order("connect", name, make_client, queries)

    def prepare(self, name: str, effort: int) -> None:
        """All callers of a side search so widely from now on."""
        self._order("prepare", name, effort)

    def rows(self, name: str) -> NDArray[np.int64]:
        """The rows found for each query of a side `[Q, K]`, asked one by one; -1 where there are fewer."""
        return self._order("rows", name)  # type: ignore[no-any-return]

    def begin(self, name: str, in_flight: int, batch_size: int) -> None:
        """Lets so many callers ask, each so many queries a call; `end` must follow."""
        self._order("begin", name, in_flight, batch_size)

    def end(self) -> Measured:
        """Ends their calls and waits for the answers that are still out."""
        return self._order("end")  # type: ignore[no-any-return]

    def _order(self, *order: Any) -> Any:
        self._connection.send(order)
        answer = self._connection.recv()
        if isinstance(answer, SideError):
            raise answer
        return answer


@dataclass
class _Clients:
    """Of one side."""

    make: Callable[[], Any]
    queries: NDArray[np.float32]
    effort: int | None = None
    made: list[Any] = field(default_factory=list)

    def first(self, count: int) -> Sequence[Any]:
        while not self.made or (len(self.made) < count and not _is_shared(self.made[0])):
            client = self.make()
            if self.effort is not None:
                client.prepare(self.effort)
            self.made.append(client)
        return (self.made * count)[:count]


def _is_shared(client: Any) -> bool:
    return inspect.iscoroutinefunction(client.search)


class _Burst:
    """Callers at work."""

    def __init__(self, clients: Sequence[Any], queries: NDArray[np.float32], batch_size: int) -> None:
        self._clients = clients
        self._batches = itertools.cycle(np.split(queries, len(queries) // batch_size))
        self._measured = Measured()
        self._is_over = False
        self._task = asyncio.create_task(self._run())

    async def end(self) -> Measured:
        self._is_over = True
        await self._task
        return self._measured

    async def _run(self) -> None:
        start_s = time.perf_counter()
        with ThreadPoolExecutor(len(self._clients)) as threads:
            loop = asyncio.get_running_loop()
            await asyncio.gather(
                *(
                    self._keep_awaiting(client)
                    if _is_shared(client)
                    else loop.run_in_executor(threads, self._keep_calling, client)
                    for client in self._clients
                )
            )
        self._measured.seconds = time.perf_counter() - start_s

    def _keep_calling(self, client: Any) -> None:
        while not self._is_over:
            start_s = time.perf_counter()
            try:
                self._count(client.search(next(self._batches)), start_s)
            except Exception as error:  # Whatever a library raises is a failed call.
                self._count_failed(error)

    async def _keep_awaiting(self, client: Any) -> None:
        while not self._is_over:
            start_s = time.perf_counter()
            try:
                self._count(await client.search(next(self._batches)), start_s)
            except Exception as error:
                self._count_failed(error)

    def _count(self, found: Sequence[Sequence[Any]], start_s: float) -> None:
        if (fewest := min(map(len, found))) < K:
            raise SideError(f"{fewest} items instead of {K}")
        self._measured.latencies_s.append(time.perf_counter() - start_s)

    def _count_failed(self, error: Exception) -> None:
        self._measured.num_failed += 1
        self._measured.first_error = self._measured.first_error or _in_words(error)


class _Process:
    """What the orders do."""

    def __init__(self) -> None:
        self._sides: dict[str, _Clients] = {}
        self._burst: _Burst

    async def connect(self, name: str, make: Callable[[], Any], queries: NDArray[np.float32]) -> None:
        self._sides[name] = _Clients(make, queries)

    async def prepare(self, name: str, effort: int) -> None:
        side = self._sides[name]
        side.effort = effort
        for client in side.made:
            client.prepare(effort)

    async def rows(self, name: str) -> NDArray[np.int64]:
        side = self._sides[name]
        client = side.first(1)[0]
        rows = np.full((len(side.queries), K), -1)
        for number, query in enumerate(side.queries):
            answer = client.search(query[None])
            [found] = await answer if inspect.isawaitable(answer) else answer
            rows[number, : len(found)] = [client.row(item) for item in found]
        return rows

    async def begin(self, name: str, in_flight: int, batch_size: int) -> None:
        side = self._sides[name]
        self._burst = _Burst(side.first(in_flight), side.queries, batch_size)

    async def end(self) -> Measured:
        return await self._burst.end()


def _obey(connection: Connection) -> None:
    uvloop.run(_obey_orders(connection))


async def _obey_orders(connection: Connection) -> None:
    process = _Process()
    while True:
        try:
            act, *details = await asyncio.to_thread(connection.recv)
        except EOFError:
            return
        try:
            answer = await getattr(process, act)(*details)
        except Exception as error:  # It is told, and the next side has its turn.
            answer = SideError(_in_words(error))
        connection.send(answer)


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
