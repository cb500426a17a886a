import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from child_process import tied_python
from grpc_health.v1 import health_pb2, health_pb2_grpc

from towers import errors
from towers.errors import InvalidInputError, TwoTowerError
from towers.rpc import CHANNEL_OPTIONS, RpcServer

SERVICE = "test.Echo"
METHOD = f"/{SERVICE}/Call"
_TIMEOUT_S = 30.0
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

Answer = Callable[[bytes, Any], Awaitable[bytes]]


def _server(answer: Answer, address: str = "127.0.0.1:0", drain_s: float = 0.0, **options: Any) -> RpcServer:
    server = RpcServer(address, SERVICE, drain_s=drain_s, grace_s=10.0, **options)
    handlers = {"Call": grpc.unary_unary_rpc_method_handler(answer)}
    server.grpc.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    return server


async def _call(channel: grpc.aio.Channel, request: bytes = b"") -> bytes:
    answer: bytes = await channel.unary_unary(METHOD)(request, timeout=_TIMEOUT_S)
    return answer


async def _health(channel: grpc.aio.Channel, service: str) -> int:
    stub = health_pb2_grpc.HealthStub(channel)
    return (await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=_TIMEOUT_S)).status


def _failure(raised: BaseException, caplog: pytest.LogCaptureFixture) -> grpc.aio.AioRpcError:
    """What a client sees when the handler raises."""

    async def answer(request: bytes, context: Any) -> bytes:
        raise raised

    async def scenario() -> grpc.aio.AioRpcError:
        server = _server(answer)
        port = await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=CHANNEL_OPTIONS) as channel:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await _call(channel)
                return caught.value
        finally:
            await server.drain_and_stop()

    with caplog.at_level(logging.ERROR):
        return asyncio.run(scenario())


_ERROR_CLASSES = [
    value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, TwoTowerError)
]


@pytest.mark.parametrize("error_class", _ERROR_CLASSES)
def test_each_error_leaves_as_its_status(error_class: type[TwoTowerError], caplog: pytest.LogCaptureFixture) -> None:
    failure = _failure(error_class("feature 'user_id': say what to do"), caplog)
    assert failure.code() == error_class.status
    assert failure.details() == "feature 'user_id': say what to do"
    is_bug = error_class.status in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
    assert bool(caplog.records) == is_bug, "only bugs fill the log"


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("InvalidInputError", "INVALID_ARGUMENT"),
        ("InvalidFeatureError", "INVALID_ARGUMENT"),
        ("NotFoundError", "NOT_FOUND"),
        ("ConflictError", "ABORTED"),
        ("CorruptArtefactError", "DATA_LOSS"),
        ("StoreUnavailableError", "UNAVAILABLE"),
        ("VersionNotLoadedError", "FAILED_PRECONDITION"),
        ("WrongShardError", "FAILED_PRECONDITION"),
        ("TooFewShardsError", "UNAVAILABLE"),
        ("NotReadyError", "UNAVAILABLE"),
        ("DeadlineError", "DEADLINE_EXCEEDED"),
    ],
)
def test_statuses_are_the_contracts(name: str, status: str) -> None:
    assert getattr(errors, name).status.name == status


def test_only_the_root_is_internal() -> None:
    bugs = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
    assert [error_class for error_class in _ERROR_CLASSES if error_class.status in bugs] == [TwoTowerError]


@pytest.mark.parametrize(
    "raised", [ValueError("secret"), KeyError("secret"), RuntimeError("secret"), OSError("secret")]
)
def test_anything_else_is_internal_without_its_text(raised: Exception, caplog: pytest.LogCaptureFixture) -> None:
    failure = _failure(raised, caplog)
    assert failure.code() == grpc.StatusCode.INTERNAL
    assert "secret" not in f"{failure.details()}{failure.debug_error_string()}"
    assert any(record.exc_info and "secret" in str(record.exc_info[1]) for record in caplog.records)


@pytest.mark.parametrize("message", ["x" * 100_000, "🎬" * 20_000, "two\nlines", "lone \ud800 surrogate", "nul\0", ""])
def test_no_message_is_too_much_for_the_wire(message: str, caplog: pytest.LogCaptureFixture) -> None:
    failure = _failure(InvalidInputError(message), caplog)
    assert failure.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert (failure.details() or "")[:5] == message[:5]


def test_a_status_that_the_handler_set_stays(caplog: pytest.LogCaptureFixture) -> None:
    async def answer(request: bytes, context: Any) -> bytes:
        await context.abort(grpc.StatusCode.OUT_OF_RANGE, "mine")
        raise AssertionError

    async def scenario() -> grpc.aio.AioRpcError:
        server = _server(answer)
        port = await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await _call(channel)
                return caught.value
        finally:
            await server.drain_and_stop()

    failure = asyncio.run(scenario())
    assert (failure.code(), failure.details()) == (grpc.StatusCode.OUT_OF_RANGE, "mine")


async def _echo(request: bytes, context: Any) -> bytes:
    return request


def test_a_server_answers_and_says_whether_it_is_ready() -> None:
    async def scenario() -> None:
        server = _server(_echo)
        port = await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=CHANNEL_OPTIONS) as channel:
                assert await _call(channel, b"hello") == b"hello"
                assert await _health(channel, "") == _SERVING, "the process is up"
                assert await _health(channel, SERVICE) == _NOT_SERVING, "but not ready yet"
                await server.set_ready(True)
                assert await _health(channel, SERVICE) == _SERVING
                await server.set_ready(False)
                assert await _health(channel, SERVICE) == _NOT_SERVING
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await _health(channel, "another.Service")
                assert caught.value.code() == grpc.StatusCode.NOT_FOUND
        finally:
            await server.drain_and_stop()

    asyncio.run(scenario())


def test_large_messages_pass_and_larger_ones_are_refused() -> None:
    async def scenario() -> None:
        server = _server(_echo)
        port = await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=CHANNEL_OPTIONS) as channel:
                large = bytes(20 * 1024 * 1024)
                assert await _call(channel, large) == large
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await _call(channel, bytes(65 * 1024 * 1024))
                assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        finally:
            await server.drain_and_stop()

    asyncio.run(scenario())


def test_a_port_in_use_is_refused() -> None:
    async def scenario() -> None:
        first = _server(_echo)
        port = await first.start()
        try:
            second = _server(_echo, address=f"127.0.0.1:{port}")
            with pytest.raises(InvalidInputError, match=f"cannot listen on 127.0.0.1:{port}"):
                await second.start()
        finally:
            await first.drain_and_stop()
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            third = _server(_echo, address=f"127.0.0.1:{taken.getsockname()[1]}")
            with pytest.raises(InvalidInputError, match="cannot listen"):
                await third.start()

    asyncio.run(scenario())


@pytest.mark.parametrize("address", ["no such host:1", "unix:/no/such/folder/socket"])
def test_an_address_that_cannot_be_is_refused(address: str) -> None:
    async def scenario() -> None:
        with pytest.raises(InvalidInputError, match="cannot listen"):
            await _server(_echo, address=address).start()

    asyncio.run(scenario())


def test_a_unix_socket(tmp_path_factory: pytest.TempPathFactory) -> None:
    async def scenario() -> None:
        address = f"unix:{os.path.relpath(tmp_path_factory.mktemp('s') / 's')}"
        server = _server(_echo, address=address)
        await server.start()
        try:
            async with grpc.aio.insecure_channel(address) as channel:
                assert await _call(channel, b"hello") == b"hello"
        finally:
            await server.drain_and_stop()

    asyncio.run(scenario())


def test_a_drain_lets_calls_in_flight_end() -> None:
    async def scenario() -> None:
        begun, may_end = asyncio.Event(), asyncio.Event()

        async def slow(request: bytes, context: Any) -> bytes:
            begun.set()
            await may_end.wait()
            return b"done"

        server = _server(slow)
        port = await server.start()
        await server.set_ready(True)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
            assert (await watch.read()).status == _SERVING
            call = asyncio.create_task(_call(channel))
            await begun.wait()
            drain = asyncio.create_task(server.drain_and_stop())
            assert (await watch.read()).status == _NOT_SERVING
            watch.cancel()
            await server.set_ready(True)  # Too late.
            assert not call.done()
            assert not drain.done()
            may_end.set()
            assert await call == b"done"
            await drain
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await _call(channel)
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE

    asyncio.run(scenario())


_SERVER_PROCESS = """
import asyncio, sys
from pathlib import Path
import grpc
from towers.rpc import RpcServer, until_stopped

async def wait_for_file(request, context):
    print("begun", flush=True)
    while not Path(sys.argv[1]).exists():
        await asyncio.sleep(0.01)
    return b"done"

async def main():
    server = RpcServer("127.0.0.1:0", "test.Echo", drain_s=0.2, grace_s=60)
    handlers = {"Call": grpc.unary_unary_rpc_method_handler(wait_for_file)}
    server.grpc.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Echo", handlers),))
    print(await server.start(), flush=True)
    await server.set_ready(True)
    await until_stopped()
    await server.drain_and_stop()
    print("drained", flush=True)

asyncio.run(main())
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_the_process(tmp_path: Path, number: signal.Signals) -> None:
    may_end = tmp_path / "may_end"

    async def scenario(process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
            while (await watch.read()).status != _SERVING:
                pass
            call = asyncio.create_task(_call(channel))
            assert await asyncio.to_thread(process.stdout.readline) == "begun\n"
            process.send_signal(number)
            assert (await watch.read()).status == _NOT_SERVING
            watch.cancel()
            assert not call.done()
            assert process.poll() is None
            may_end.touch()
            assert await call == b"done"
        assert await asyncio.to_thread(process.stdout.readline) == "drained\n"

    with subprocess.Popen(tied_python(_SERVER_PROCESS, str(may_end)), stdout=subprocess.PIPE, text=True) as process:
        try:
            asyncio.run(scenario(process))
            assert process.wait() == 0
        finally:
            process.kill()


@pytest.mark.parametrize("reflect", [False, True])
def test_reflection_is_off_unless_asked_for(reflect: bool) -> None:
    async def services() -> bytes:
        server = _server(_echo, reflect=reflect)
        port = await server.start()
        method = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
        list_services = b"\x3a\x00"  # Field 7 of the request, empty.
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                call = channel.stream_stream(method)(iter([list_services]), timeout=_TIMEOUT_S)
                answer: bytes = await call.read()
                return answer
        finally:
            await server.drain_and_stop()

    if reflect:
        assert SERVICE.encode() in asyncio.run(services())
        return
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        asyncio.run(services())
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_the_contract_needs_no_training_framework() -> None:
    code = """
import importlib, pkgutil, sys
import towers
for module in pkgutil.iter_modules(towers.__path__):
    importlib.import_module(f"towers.{module.name}")
print(sorted({"torch", "faiss", "redis", "transformers", "onnx"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
