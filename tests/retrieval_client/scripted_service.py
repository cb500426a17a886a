"""A query service behind a real gRPC server that answers as a test tells it to.

Deliberately does not retrieve anything: what the real service answers is tested with the real service.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from retrieval.query.v1 import query_service_pb2, query_service_pb2_grpc

Script = Callable[[Any, grpc.ServicerContext], Any]


class ScriptedService(query_service_pb2_grpc.QueryServiceServicer):
    """Answers every method through `script(request, context)`."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.stream_script: Callable[[Iterator[Any], grpc.ServicerContext], Iterator[Any]] = lambda *_: iter(())
        self.requests: list[Any] = []
        self.timeouts_s: list[float] = []
        self.port = 0

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listens; on the same port as before."""
        self._threads = ThreadPoolExecutor(16)
        self._server = grpc.server(self._threads, options=(("grpc.so_reuseport", 0),))
        query_service_pb2_grpc.add_QueryServiceServicer_to_server(self, self._server)
        # The default holds its lock while it waits for gRPC's thread, which waits for the lock when a watch ends.
        self._health = health.HealthServicer(experimental_non_blocking=False)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self.set_ready(True)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        self._server.start()

    def set_ready(self, is_ready: bool) -> None:
        status = health_pb2.HealthCheckResponse
        service = query_service_pb2.DESCRIPTOR.services_by_name["QueryService"].full_name
        self._health.set(service, status.SERVING if is_ready else status.NOT_SERVING)

    def stop(self) -> None:
        self._server.stop(None).wait()
        self._threads.shutdown()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def Retrieve(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._answer(request, context)

    def BatchRetrieve(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._answer(request, context)

    def StreamRetrieve(self, requests: Any, context: Any) -> Any:  # noqa: N802
        return self.stream_script(requests, context)

    def Embed(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._answer(request, context)

    def GetStatus(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._answer(request, context)

    def _answer(self, request: Any, context: grpc.ServicerContext) -> Any:
        self.requests.append(request)
        self.timeouts_s.append(context.time_remaining())
        return self.script(request, context)


def failing(status: grpc.StatusCode, message: str, num_times: int = 1_000_000) -> Script:
    """Fails so many times, then gives empty answers."""
    left = [num_times]

    def script(request: Any, context: grpc.ServicerContext) -> Any:
        if left[0] > 0:
            left[0] -= 1
            context.abort(status, message)
        return empty(request, context)

    return script


def empty(request: Any, context: grpc.ServicerContext) -> Any:
    """The empty answer to a request."""
    answers = {
        "RetrieveRequest": query_service_pb2.RetrieveResponse,
        "BatchRetrieveRequest": query_service_pb2.BatchRetrieveResponse,
        "EmbedRequest": query_service_pb2.EmbedResponse,
        "GetStatusRequest": query_service_pb2.GetStatusResponse,
    }
    return answers[request.DESCRIPTOR.name]()


def slow(seconds: float) -> Script:
    """Answers late."""

    def script(request: Any, context: grpc.ServicerContext) -> Any:
        time.sleep(seconds)
        return empty(request, context)

    return script
