"""The processes that share this one's address: each says over a socket of its own what it holds.

Deliberately does not know who starts them, nor what follows from what they say.
"""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
from retrieval.query.v1 import query_service_pb2, query_service_pb2_grpc

from towers.rpc import CHANNEL_OPTIONS

_TIMEOUT_S = 0.5
"""Shorter than the rollout controller's, which waits for all of them through one."""
_SUFFIX = ".sock"


class Siblings:
    """This process among those that share its address."""

    def __init__(self, folder: Path, number: int, *, joins_at_once: bool) -> None:
        """Nothing listens yet.

        Args:
            folder: Holds a socket for each process, by its number, and nothing else.
            number: Of this process.
            joins_at_once: Whether it listens on the shared address before its version is loaded, since no other does.
        """
        self._folder = folder
        self._number = number
        self._channels: dict[int, grpc.aio.Channel] = {}
        self._server = grpc.aio.server()
        self.joins_at_once = joins_at_once
        self.joined: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done once this process answers on the shared address; or why it cannot."""

    async def listen(self, status: Callable[[], query_service_pb2.GetStatusResponse]) -> None:
        """Tells the others, from now on, what this process says of itself."""

        async def answer(request: query_service_pb2.GetStatusRequest, context: Any) -> Any:  # noqa: ARG001
            return status()

        method: Any = grpc.unary_unary_rpc_method_handler(
            answer,
            request_deserializer=query_service_pb2.GetStatusRequest.FromString,
            response_serializer=query_service_pb2.GetStatusResponse.SerializeToString,
        )
        service = query_service_pb2.DESCRIPTOR.services_by_name["QueryService"].full_name
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {"GetStatus": method}),))
        self._server.add_insecure_port(self._target(self._number))
        await self._server.start()

    async def statuses(self, own: query_service_pb2.GetStatusResponse) -> Sequence[query_service_pb2.WorkerStatus]:
        """Asks all; one that does not answer in time says so in its `error`.

        Args:
            own: What this process says of itself.
        """
        mine = query_service_pb2.WorkerStatus(worker=self._number, status=own)
        # One that was killed leaves its socket, so that it is missed until it is replaced.
        numbers = sorted({int(path.stem) for path in self._folder.glob(f"*{_SUFFIX}")} - {self._number})
        others = await asyncio.gather(*(self._ask(number) for number in numbers))
        return sorted([mine, *others], key=lambda status: status.worker)

    async def close(self) -> None:
        """Stops telling and asking."""
        await self._server.stop(None)
        await asyncio.gather(*(channel.close() for channel in self._channels.values()))

    async def _ask(self, number: int) -> query_service_pb2.WorkerStatus:
        if number not in self._channels:
            self._channels[number] = grpc.aio.insecure_channel(self._target(number), options=CHANNEL_OPTIONS)
        stub: Any = query_service_pb2_grpc.QueryServiceStub(self._channels[number])
        try:
            status = await stub.GetStatus(query_service_pb2.GetStatusRequest(), timeout=_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            is_late = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            why = "does not answer in time" if is_late else "is not reachable"
            return query_service_pb2.WorkerStatus(worker=number, error=why)
        return query_service_pb2.WorkerStatus(worker=number, status=status)

    def _target(self, number: int) -> str:
        return f"unix:{self._folder / f'{number}{_SUFFIX}'}"
