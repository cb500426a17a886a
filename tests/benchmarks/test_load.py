"""The load generator, against a server that says what it saw."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import numpy as np
import pytest

from benchmarks.serving.load import Closed, Generators, Histogram, Load, Measured, Open

METHOD = "/test.Echo/Call"
REQUESTS = [b"a", b"bb", b"ccc", b"dddd"]


class Echo(grpc.GenericRpcHandler):
    """Answers with the request; fails where it is told to."""

    def __init__(self) -> None:
        self.requests: list[bytes] = []
        self.metadata: set[tuple[str, str]] = set()
        self.num_in_flight = 0
        self.most_in_flight = 0
        self.pause_s = 0.0
        self.refused: bytes | None = None

    def service(self, handler_call_details: Any) -> Any:
        return grpc.unary_unary_rpc_method_handler(self._answer)

    async def _answer(self, request: bytes, context: Any) -> bytes:
        self.requests.append(request)
        self.metadata |= {(key, value) for key, value in context.invocation_metadata()}
        self.num_in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.num_in_flight)
        try:
            await asyncio.sleep(self.pause_s)
            if request == self.refused:
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "told to")
            return request
        finally:
            self.num_in_flight -= 1


@pytest.fixture(scope="module")
def one() -> Any:
    with Generators(1) as generators:
        yield generators


@pytest.fixture(scope="module")
def two() -> Any:
    with Generators(2) as generators:
        yield generators


def measured(echo: Echo, generators: Generators, load_of: Callable[[str], Load]) -> Measured:
    async def check() -> Measured:
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((echo,))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        running: Awaitable[Measured] = asyncio.to_thread(generators.run, load_of(f"127.0.0.1:{port}"))
        result = await running
        await server.stop(None)
        return result

    return asyncio.run(check())


def test_a_closed_loop_keeps_its_callers_busy_and_no_more(two: Generators) -> None:
    echo = Echo()
    echo.pause_s = 0.01
    result = measured(
        echo, two, lambda address: Load(address, METHOD, REQUESTS, Closed(5), 0.3, metadata=[("who", "test")])
    )
    assert echo.most_in_flight <= 5
    assert result.num_by_status == {"OK": len(echo.requests)}
    assert result.num_failed == 0
    assert len(echo.requests) >= 5
    assert result.response_bytes == sum(map(len, echo.requests))
    assert set(REQUESTS) >= set(echo.requests)
    assert ("who", "test") in echo.metadata
    assert result.ok.quantile_s(0.5) >= 0.0099
    assert result.ok_per_s == pytest.approx(len(echo.requests) / result.seconds)


def test_statuses_are_counted_apart(one: Generators) -> None:
    echo = Echo()
    echo.refused = b"bb"
    result = measured(echo, one, lambda address: Load(address, METHOD, REQUESTS, Closed(2), 0.2))
    num_refused = echo.requests.count(b"bb")
    assert num_refused > 0
    assert result.num_by_status == {"OK": len(echo.requests) - num_refused, "RESOURCE_EXHAUSTED": num_refused}
    assert result.num_failed == num_refused


def test_an_open_loop_does_not_wait_for_answers(one: Generators) -> None:
    echo = Echo()
    echo.pause_s = 0.5
    result = measured(echo, one, lambda address: Load(address, METHOD, REQUESTS, Open(200.0), 0.4))
    assert echo.most_in_flight > 10
    assert result.num_by_status == {"OK": len(echo.requests)}
    assert result.ok.quantile_s(0.0) >= 0.49


def test_callers_give_up_a_share_of_their_calls(one: Generators) -> None:
    echo = Echo()
    echo.pause_s = 60.0
    result = measured(
        echo,
        one,
        lambda address: Load(
            address, METHOD, REQUESTS, Closed(4), 0.2, cancelled_share=1.0, cancelled_within_s=0.01, timeout_s=30.0
        ),
    )
    assert set(result.num_by_status) == {"CANCELLED"}
    assert result.num_failed >= 4


def test_a_server_that_is_not_there_is_counted_too(one: Generators) -> None:
    result = one.run(Load("127.0.0.1:1", METHOD, REQUESTS, Closed(1), 0.05))
    assert set(result.num_by_status) == {"UNAVAILABLE"}
    assert result.ok.quantile_s(0.5) == 0.0


def test_quantiles_of_a_histogram_are_right_within_one_percent() -> None:
    chance = random.Random(0)
    seconds = [10 ** chance.uniform(-5, 1) for _ in range(10_000)]
    histogram = Histogram()
    histogram.add(seconds[:4000])
    other = Histogram()
    other.add(seconds[4000:])
    histogram.merge(other)
    assert histogram.num_calls == len(seconds)
    for share in (0.01, 0.5, 0.9, 0.99, 1.0):
        exact = float(np.quantile(seconds, share, method="inverted_cdf"))
        assert histogram.quantile_s(share) == pytest.approx(exact, rel=0.01)


def test_latencies_off_the_scale_are_counted_at_its_ends() -> None:
    histogram = Histogram()
    histogram.add([0.0, 1e9])
    assert histogram.num_calls == 2
    assert histogram.quantile_s(0.5) == pytest.approx(1e-6, rel=0.02)
    assert histogram.quantile_s(1.0) == pytest.approx(1e3, rel=0.02)
