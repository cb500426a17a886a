"""Load on a gRPC server from processes of its own: closed or open loop, and the latencies by status.

Deliberately does not know any message: requests are sent, and answers taken, as bytes.
"""

import asyncio
import itertools
import math
import multiprocessing
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

import grpc
import numpy as np
import uvloop
from numpy.typing import NDArray

from towers.rpc import CHANNEL_OPTIONS

OK = grpc.StatusCode.OK.name
_SHORTEST_S = 1e-6
_LONGEST_S = 1e3
_BUCKETS_PER_E_FOLD = 100
"""Each is 1 % wide."""
_NUM_BUCKETS = math.ceil(math.log(_LONGEST_S / _SHORTEST_S) * _BUCKETS_PER_E_FOLD)
_BATCH = 4096
"""Latencies that are counted at once."""


@dataclass(frozen=True)
class Closed:
    """So many callers, each of which waits for its answer before it calls again."""

    in_flight: int


@dataclass(frozen=True)
class Open:
    """Calls at random moments, however many wait for their answers; a latency counts from the moment that was due."""

    rate_per_s: float


@dataclass(frozen=True)
class Load:
    """What is sent, where, how fast and how long."""

    address: str
    method: str
    """For example `/retrieval.query.v1.QueryService/Retrieve`."""
    requests: Sequence[bytes]
    """Sent in turn, over and over."""
    pace: Closed | Open
    """Of all processes together."""
    seconds: float
    timeout_s: float = 10.0
    metadata: Sequence[tuple[str, str]] = ()
    cancelled_share: float = 0.0
    """Of the calls, chosen at random, that the caller gives up."""
    cancelled_within_s: float = 0.005
    """At a random moment up to so long after their start."""


class Histogram:
    """Latencies on a logarithmic scale from 1 µs to 1,000 s: a quantile is right within 1 %."""

    def __init__(self) -> None:
        self.counts: NDArray[np.int64] = np.zeros(_NUM_BUCKETS, dtype=np.int64)
        """Of each bucket, the shortest first; the first begins at 1 µs, each is 1 % wide."""

    @property
    def num_calls(self) -> int:
        """All that were counted."""
        return int(self.counts.sum())

    def add(self, seconds: Sequence[float]) -> None:
        """Counts latencies."""
        shares = np.maximum(np.asarray(seconds, dtype=np.float64), _SHORTEST_S) / _SHORTEST_S
        buckets = (np.log(shares) * _BUCKETS_PER_E_FOLD).astype(np.int64)
        self.counts += np.bincount(np.minimum(buckets, _NUM_BUCKETS - 1), minlength=_NUM_BUCKETS)

    def merge(self, other: "Histogram") -> None:
        """Counts what another one has counted."""
        self.counts += other.counts

    def quantile_s(self, share: float) -> float:
        """The seconds that this share did not exceed; 0 before the first."""
        cumulated = np.cumsum(self.counts)
        if not cumulated[-1]:
            return 0.0
        bucket = int(np.searchsorted(cumulated, max(1, math.ceil(share * cumulated[-1]))))
        return _SHORTEST_S * math.exp((bucket + 0.5) / _BUCKETS_PER_E_FOLD)


@dataclass
class Measured:
    """What came back."""

    seconds: float = 0.0
    """From the first call to the last answer."""
    latencies: dict[str, Histogram] = field(default_factory=dict)
    """By status, for example `OK`; what the caller gave up is `CANCELLED`."""
    response_bytes: int = 0
    """Of all answers together."""

    @property
    def ok(self) -> Histogram:
        """Of the calls that were answered."""
        return self.latencies.get(OK, Histogram())

    @property
    def ok_per_s(self) -> float:
        """Answers a second."""
        return self.ok.num_calls / self.seconds

    @property
    def num_failed(self) -> int:
        """Calls with any status but OK."""
        return sum(histogram.num_calls for status, histogram in self.latencies.items() if status != OK)

    @property
    def num_by_status(self) -> Mapping[str, int]:
        """Calls that ended with each status."""
        return {status: histogram.num_calls for status, histogram in sorted(self.latencies.items())}

    def merge(self, other: "Measured") -> None:
        """Adds what another process measured at the same time."""
        self.seconds = max(self.seconds, other.seconds)
        self.response_bytes += other.response_bytes
        for status, histogram in other.latencies.items():
            self.latencies.setdefault(status, Histogram()).merge(histogram)


class Generators:
    """Processes that call, and wait for the next load in between."""

    def __init__(self, num_processes: int = 1) -> None:
        """Starts nothing yet.

        Args:
            num_processes: A load is divided among them.
        """
        self._num_processes = num_processes
        self._connections: list[Connection] = []
        self._processes: list[Any] = []

    def __enter__(self) -> Self:
        # Fork is not safe once gRPC has threads.
        spawning = multiprocessing.get_context("spawn")
        for _ in range(self._num_processes):
            ours, theirs = spawning.Pipe()
            process = spawning.Process(target=_generate, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)
        for connection in self._connections:
            connection.recv()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join()

    @property
    def pids(self) -> tuple[int, ...]:
        """Of the processes."""
        return tuple(process.pid for process in self._processes)

    def run(self, load: Load) -> Measured:
        """Puts a load on a server and waits for its end."""
        self.begin(load)
        return self.end()

    def begin(self, load: Load) -> None:
        """Puts a load on a server and returns at once; `end` must follow."""
        for connection, part in zip(self._connections, _parts(load, self._num_processes), strict=True):
            connection.send(part)

    def end(self) -> Measured:
        """Waits for the end of the load."""
        measured = Measured()
        for connection in self._connections:
            measured.merge(connection.recv())
        return measured


def _parts(load: Load, count: int) -> Iterator[Load]:
    """A load for each process, which together make the whole."""
    for number in range(count):
        turned = number * len(load.requests) // count
        requests = [*load.requests[turned:], *load.requests[:turned]]
        match load.pace:
            case Closed(in_flight):
                share = in_flight // count + (number < in_flight % count)
                yield replace(load, requests=requests, pace=Closed(share))
            case Open(rate_per_s):
                yield replace(load, requests=requests, pace=Open(rate_per_s / count))


def _generate(connection: Connection) -> None:
    """A process's life: loads come in, what was measured goes out."""
    uvloop.run(_answer_loads(connection))


async def _answer_loads(connection: Connection) -> None:
    caller = _Caller()
    connection.send(os.getpid())
    while True:
        try:
            load = await asyncio.to_thread(connection.recv)
        except EOFError:
            break
        connection.send(await caller.measure(load))
    await caller.close()


class _Caller:
    """The calls of one process; its channels stay open from load to load."""

    def __init__(self) -> None:
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._random = random.Random(os.getpid())  # noqa: S311

    async def close(self) -> None:
        """Closes the channels."""
        await asyncio.gather(*(channel.close() for channel in self._channels.values()))

    async def measure(self, load: Load) -> Measured:
        """Calls until the time is up, then waits for the answers that are still out."""
        if load.address not in self._channels:
            self._channels[load.address] = grpc.aio.insecure_channel(load.address, options=CHANNEL_OPTIONS)
        call: Any = self._channels[load.address].unary_unary(load.method)
        call = partial(call, timeout=load.timeout_s, metadata=tuple(load.metadata) or None)
        burst = _Burst(load, call, self._random)
        start_s = time.perf_counter()
        match load.pace:
            case Closed(in_flight):
                await asyncio.gather(*(burst.keep_calling(start_s + load.seconds) for _ in range(in_flight)))
            case Open(rate_per_s):
                await burst.call_at_random(start_s, rate_per_s)
        return burst.measured(time.perf_counter() - start_s)


class _Burst:
    """One load of one process."""

    def __init__(self, load: Load, call: Any, chance: random.Random) -> None:
        self._load = load
        self._call = call
        self._random = chance
        self._requests = itertools.cycle(load.requests)
        self._seconds: dict[str, list[float]] = {}
        self._histograms: dict[str, Histogram] = {}
        self._response_bytes = 0

    async def keep_calling(self, end_s: float) -> None:
        """One caller of a closed loop."""
        while (start_s := time.perf_counter()) < end_s:
            await self._call_once(start_s)

    async def call_at_random(self, start_s: float, rate_per_s: float) -> None:
        """An open loop: a Poisson process."""
        due_s, calls = start_s, set()
        while (due_s := due_s + self._random.expovariate(rate_per_s)) < start_s + self._load.seconds:
            if (pause_s := due_s - time.perf_counter()) > 0:
                await asyncio.sleep(pause_s)
            call = asyncio.create_task(self._call_once(due_s))
            calls.add(call)
            call.add_done_callback(calls.discard)
        await asyncio.gather(*calls)

    def measured(self, seconds: float) -> Measured:
        """All that came back."""
        for status in self._seconds:
            self._count(status)
        return Measured(seconds, self._histograms, self._response_bytes)

    async def _call_once(self, start_s: float) -> None:
        call = self._call(next(self._requests))
        if self._load.cancelled_share and self._random.random() < self._load.cancelled_share:
            asyncio.get_running_loop().call_later(self._random.uniform(0, self._load.cancelled_within_s), call.cancel)
        try:
            response = await call
        except grpc.aio.AioRpcError as error:
            status = error.code().name
        except asyncio.CancelledError:
            # The call was given up above; its task goes on.
            status = grpc.StatusCode.CANCELLED.name
        else:
            status = OK
            self._response_bytes += len(response)
        seconds = self._seconds.setdefault(status, [])
        seconds.append(time.perf_counter() - start_s)
        if len(seconds) >= _BATCH:
            self._count(status)

    def _count(self, status: str) -> None:
        self._histograms.setdefault(status, Histogram()).add(self._seconds[status])
        self._seconds[status].clear()
