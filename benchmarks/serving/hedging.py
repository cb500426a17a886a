"""A replica that becomes slow, with hedging and without: `python -m benchmarks.serving.hedging`.

Deliberately slows the way to one replica of one shard, and nothing in it: a process in front of it holds every call up
by 200 ms. In each round both services take their turn: warmed while all replicas are fast, measured from the moment
that one is not.
"""

import argparse
import asyncio
import json
import multiprocessing
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
import uvloop
from retrieval.query.v1 import query_service_pb2, query_service_pb2_grpc
from rich.bar import Bar
from rich.console import Console
from rich.table import Table

from benchmarks.serving.load import Generators, Load, Measured, Open
from benchmarks.serving.services import RETRIEVE, QueryProcess, retrieve_requests, shards_with
from towers.rpc import CHANNEL_OPTIONS, SERVER_OPTIONS
from towers.settings import layouts_text

K = 100
DELAY_S = 0.2
P99_SHARE = 0.5
EXTRA_SHARE = 0.05
_NUM_SHARDS = 2
_REPLICAS = 2
_DIM = 64
_NUM_QUERIES = 2000
_TIMEOUT_S = 5.0
_BAR_WIDTH = 24


@dataclass(frozen=True)
class Length:
    """How much is measured."""

    num_items: int
    rounds: int
    rate_per_s: float
    burst_s: float


FULL = Length(num_items=100_000, rounds=5, rate_per_s=100.0, burst_s=15.0)
QUICK = Length(num_items=100_000, rounds=2, rate_per_s=100.0, burst_s=8.0)


class SlowWay:
    """A process in front of a gRPC server that passes every call on, at once or later."""

    def __init__(self, address: str) -> None:
        """Starts nothing yet.

        Args:
            address: Of the server.
        """
        self.address = ""
        """Where it listens, once it runs."""
        self._next_address = address

    def __enter__(self) -> Self:
        spawning = multiprocessing.get_context("spawn")
        self._connection, theirs = spawning.Pipe()
        self._process = spawning.Process(target=_pass_on, args=(theirs, self._next_address), daemon=True)
        self._process.start()
        theirs.close()
        self.address = self._connection.recv()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._connection.close()
        self._process.join()

    def delay(self, seconds: float) -> None:
        """Holds calls up for so long from now on."""
        self._connection.send(seconds)
        self._connection.recv()


def _pass_on(connection: Connection, address: str) -> None:
    uvloop.run(_serve(connection, address))


class _Passing(grpc.GenericRpcHandler):
    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.delay_s = 0.0
        self._channel = channel

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """Every method is passed on."""
        call: Callable[..., Any] = self._channel.unary_unary(handler_call_details.method)

        async def answer(request: bytes, context: Any) -> bytes:
            await asyncio.sleep(self.delay_s)
            try:
                response: bytes = await call(request, timeout=context.time_remaining())
            except grpc.aio.AioRpcError as error:
                await context.abort(error.code(), error.details())
            return response

        return grpc.unary_unary_rpc_method_handler(answer)


async def _serve(connection: Connection, address: str) -> None:
    async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        passing = _Passing(channel)
        server = grpc.aio.server(options=SERVER_OPTIONS)
        server.add_generic_rpc_handlers((passing,))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        connection.send(f"127.0.0.1:{port}")
        while True:
            try:
                passing.delay_s = await asyncio.to_thread(connection.recv)
            except EOFError:
                break
            connection.send(None)
        await server.stop(None)


def measure(length: Length, folder: Path, console: Console) -> dict[str, Any]:
    """Runs all rounds.

    Args:
        length: How much.
        folder: Empty; takes the store and the logs.
        console: Where progress is told.

    Returns:
        The figures by name.
    """
    console.print(f"building {length.num_items:,} items on {_NUM_SHARDS} shards", highlight=False)
    with shards_with(length.num_items, _DIM, _NUM_QUERIES, folder, num_shards=_NUM_SHARDS, replicas=_REPLICAS) as world:
        [layout] = world.stack.layouts
        (slowed, *others), *shards = layout
        with SlowWay(slowed) as way:
            addresses = layouts_text((((way.address, *others), *shards),))
            with (
                QueryProcess(world, shards=addresses) as hedging,
                QueryProcess(world, shards=addresses, hedge=False) as plain,
                Generators(1) as generators,
            ):
                requests = [request.SerializeToString() for request in retrieve_requests(world.features, K)]

                def run(address: str) -> Measured:
                    return generators.run(
                        Load(address, RETRIEVE, requests, Open(length.rate_per_s), length.burst_s, _TIMEOUT_S)
                    )

                rounds = []
                for number in range(length.rounds):
                    console.print(f"round {number + 1} of {length.rounds}", highlight=False)
                    figures: dict[str, float] = {}
                    for name, service in (("hedging", hedging), ("plain", plain)):
                        quiet = run(service.address)
                        before = _fan_out(service.address)
                        way.delay(DELAY_S)
                        slow = run(service.address)
                        way.delay(0.0)
                        after = _fan_out(service.address)
                        extra = (after.num_hedges - before.num_hedges) / (after.num_calls - before.num_calls)
                        figures |= {
                            f"{name}_quiet_p99_s": quiet.ok.quantile_s(0.99),
                            f"{name}_p50_s": slow.ok.quantile_s(0.5),
                            f"{name}_p99_s": slow.ok.quantile_s(0.99),
                            f"{name}_extra_share": extra,
                            f"{name}_num_failed": quiet.num_failed + slow.num_failed,
                        }
                    figures["p99_share"] = figures["hedging_p99_s"] / figures["plain_p99_s"]
                    rounds.append(figures)
    medians = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
    return {
        "items": length.num_items,
        "delay_s": DELAY_S,
        "rounds": rounds,
        **medians,
        "p99_reached": medians["p99_share"] <= P99_SHARE,
        "extra_reached": max(each["hedging_extra_share"] for each in rounds) <= EXTRA_SHARE,
    }


def _fan_out(address: str) -> query_service_pb2.FanOutStatus:
    with grpc.insecure_channel(address) as channel:
        stub: Any = query_service_pb2_grpc.QueryServiceStub(channel)
        status: query_service_pb2.GetStatusResponse = stub.GetStatus(
            query_service_pb2.GetStatusRequest(), timeout=_TIMEOUT_S
        )
        return status.fan_out


def shown(figures: dict[str, Any]) -> Table:
    """The figures as a table."""
    rounds = figures["rounds"]
    table = Table(
        title=f"{figures['items']:,} x {_DIM}, k = {K}, {_NUM_SHARDS} shards of {_REPLICAS} replicas, one slowed by "
        f"{1000 * figures['delay_s']:.0f} ms; medians of {len(rounds)} rounds"
    )
    for column in ("", "", " " * _BAR_WIDTH, "target", ""):
        table.add_column(column, justify="right" if column == "target" else "left")
    times = {
        "p99, all replicas fast": figures["plain_quiet_p99_s"],
        "p99, one slowed, without hedging": figures["plain_p99_s"],
        "p99, one slowed, with hedging": figures["hedging_p99_s"],
    }
    for name, seconds in times.items():
        bar = Bar(max(times.values()), 0, seconds, width=_BAR_WIDTH)
        table.add_row(name, f"{1000 * seconds:.1f} ms", bar)
    shares = [each["p99_share"] for each in rounds]
    extra = max(each["hedging_extra_share"] for each in rounds)
    table.add_row(
        "with of without",
        f"{figures['p99_share']:.2f} ({min(shares):.2f}, {max(shares):.2f})",
        "",
        f"at most {P99_SHARE}",
        "reached" if figures["p99_reached"] else "missed",
    )
    table.add_row(
        "extra calls, most of a round",
        f"{extra:.1%}",
        "",
        f"at most {EXTRA_SHARE:.0%}",
        "reached" if figures["extra_reached"] else "missed",
    )
    failed = sum(each["hedging_num_failed"] + each["plain_num_failed"] for each in rounds)
    table.add_row("failed calls", f"{failed:.0f}")
    return table


def main() -> None:
    """Runs from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer, shorter rounds")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory(prefix="hedging-") as folder:
        figures = measure(QUICK if options.quick else FULL, Path(folder), console)
    console.print(shown(figures))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
