"""The recipe of every gRPC server here: error mapping, health, drain on SIGTERM.

Deliberately does not know any service. `""` in the health protocol means that the process is up; the service's own
name means that it is ready to answer.
"""

# The generic types of grpc exist for the type checker alone.
from __future__ import annotations

import asyncio
import inspect
import logging
import math
import signal
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from towers.errors import InvalidInputError, OverloadedError, TwoTowerError

MAX_MESSAGE_BYTES = 64 * 1024 * 1024

SERVER_OPTIONS: Sequence[tuple[str, Any]] = (
    # Without this a second server shares the port silently.
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
)

_SHARED_PORT_OPTIONS: Sequence[tuple[str, Any]] = (
    *(option for option in SERVER_OPTIONS if option[0] != "grpc.so_reuseport"),
    ("grpc.so_reuseport", 1),
    # The kernel chooses a process for each connection. A process that is new gets some once old ones are renewed;
    # calls that are under way end first.
    ("grpc.max_connection_age_ms", 30_000),
)

CHANNEL_OPTIONS: Sequence[tuple[str, Any]] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # The default backs off for up to two minutes: a restarted server would stay unseen for as long.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Despite its name the time that connecting may take: with 100, a peer that is busy for as long is UNAVAILABLE.
    ("grpc.min_reconnect_backoff_ms", 2000),
)

_MAX_DETAILS = 500
"""Characters of an error's message: a client may refuse trailers above 8 KiB, and one takes up to 12 bytes."""

_PUSHBACK_KEY = "grpc-retry-pushback-ms"

_log = logging.getLogger(__name__)


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns the error tree into statuses; anything else is logged and leaves as INTERNAL without detail."""

    def __init__(self) -> None:
        self._wrapped: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
        """By method; there is one of each, and it stays."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wraps handlers of one request, and those of streams that are coroutines.

        Health and reflection write their streams as generators, which pass.
        """
        method = handler_call_details.method
        if method in self._wrapped:
            return self._wrapped[method]
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        is_stream = inspect.iscoroutinefunction(handler.stream_stream)
        answer: Any = handler.stream_stream if is_stream else handler.unary_unary
        if answer is None:
            return handler

        async def answer_or_abort(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            try:
                return await answer(request, context)
            except grpc.aio.AbortError:
                raise
            except Exception as error:
                await context.abort(*told(error, method), _trailers(error))

        wrapped = grpc.stream_stream_rpc_method_handler if is_stream else grpc.unary_unary_rpc_method_handler
        self._wrapped[method] = wrapped(
            answer_or_abort,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )
        return self._wrapped[method]


def refusing(error_of: Callable[[float], TwoTowerError]) -> grpc.RpcMethodHandler[Any, Any]:
    """A handler that fails a call of one request before the request is read.

    Args:
        error_of: Gives the error, from the seconds that the caller waits.
    """

    # A stream's handler reads what it wants. To set a status costs less than to raise an error.
    async def refuse(requests: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:  # noqa: ARG001
        remaining_s = context.time_remaining()
        error = error_of(math.inf if remaining_s is None else remaining_s)
        status, message = told(error, "a request that is refused")
        context.set_code(status)
        context.set_details(message)
        context.set_trailing_metadata(_trailers(error))

    return grpc.stream_stream_rpc_method_handler(refuse)


def _trailers(error: Exception) -> tuple[tuple[str, str], ...]:
    """Metadata that gRPC's own retries understand."""
    if isinstance(error, OverloadedError) and error.pushback_ms is not None:
        return ((_PUSHBACK_KEY, str(error.pushback_ms)),)
    return ()


def told(error: Exception, what: str) -> tuple[grpc.StatusCode, str]:
    """The status and the message that a caller gets. Call it where the error is caught: bugs are logged.

    Args:
        error: What was raised.
        what: What failed, for the log.
    """
    if not isinstance(error, TwoTowerError):
        _log.exception("%s failed", what)
        return grpc.StatusCode.INTERNAL, "internal error; see the server's log"
    if error.status in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN):
        _log.exception("%s failed", what)
    return error.status, _details(error)


def _details(error: TwoTowerError) -> str:
    """The message, cut so that it fits a trailer, with nothing that UTF-8 cannot say: either would lose the status."""
    return str(error)[:_MAX_DETAILS].encode("utf-8", "backslashreplace").decode()


class RpcServer:
    """A grpc.aio server with health, error mapping and drain."""

    def __init__(
        self,
        address: str,
        service_name: str,
        *,
        drain_s: float,
        grace_s: float,
        reflect: bool = False,
        shares_port: bool = False,
        guards: Sequence[grpc.aio.ServerInterceptor] = (),
    ) -> None:
        """Makes a server; nothing listens yet.

        Args:
            address: `host:port`, port 0 for any free one, or `unix:/path`.
            service_name: Full name of the service, for health and reflection.
            drain_s: Seconds between NOT_SERVING and the refusal of new calls, for clients to see it.
            grace_s: Seconds that calls in flight then have to end.
            reflect: Whether the reflection service is on.
            shares_port: Whether other processes listen there too; who starts them makes sure that no stranger does.
            guards: See every call first.
        """
        options = _SHARED_PORT_OPTIONS if shares_port else SERVER_OPTIONS
        self.grpc = grpc.aio.server(interceptors=(*guards, ErrorInterceptor()), options=options)
        self._address = address
        self._service_name = service_name
        self._drain_s = drain_s
        self._grace_s = grace_s
        self._health = health_aio.HealthServicer()
        self._is_draining = False
        self.draining = asyncio.Event()
        """Set once no new calls are taken: streams, which may go on for hours, are to end."""
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc)
        if reflect:
            reflection.enable_server_reflection((service_name, reflection.SERVICE_NAME), self.grpc)

    async def start(self, *, is_ready: bool = False) -> int:
        """Listens.

        Args:
            is_ready: Whether the service can answer already.

        Returns:
            The port; 0 for a unix socket.

        Raises:
            InvalidInputError: the address cannot be bound.
        """
        try:
            port = self.grpc.add_insecure_port(self._address)
        except RuntimeError as error:
            raise InvalidInputError(f"cannot listen on {self._address}: is another process using it?") from error
        await self.set_ready(is_ready)
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        await self.grpc.start()
        _log.info("%s listens on %s (port %d)", self._service_name, self._address, port)
        return port

    async def set_ready(self, is_ready: bool) -> None:
        """Says whether the service can answer; after the drain began it stays NOT_SERVING."""
        status = health_pb2.HealthCheckResponse
        state = status.SERVING if is_ready and not self._is_draining else status.NOT_SERVING
        await self._health.set(self._service_name, state)

    async def drain_and_stop(self) -> None:
        """NOT_SERVING first, then time for clients to see it, then no new calls, then the end of those in flight."""
        self._is_draining = True
        await self._health.enter_graceful_shutdown()
        await asyncio.sleep(self._drain_s)
        self.draining.set()
        await self.grpc.stop(self._grace_s)


async def until_stopped() -> None:
    """Returns at the first SIGTERM or SIGINT."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    await stopped.wait()
