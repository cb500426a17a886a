"""Asks every shard and every query service for its status, in parallel, over channels that stay open.

Deliberately does not know what the statuses are for. The one place of this room that knows the stubs.
"""

import asyncio
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

import grpc
from retrieval.index.v1 import index_service_pb2, index_service_pb2_grpc
from retrieval.query.v1 import query_service_pb2, query_service_pb2_grpc

from rollout.fleet import Fleet, LoadStatus, Replica, State
from towers.rpc import CHANNEL_OPTIONS

TIMEOUT_S = 1.0
"""A replica that takes longer counts as unreachable in this round."""

_SHARD_STATES: Mapping[int, State] = {
    index_service_pb2.VERSION_STATE_BUILDING: State.BUILDING,
    index_service_pb2.VERSION_STATE_LOADING: State.LOADING,
    index_service_pb2.VERSION_STATE_AVAILABLE: State.AVAILABLE,
    index_service_pb2.VERSION_STATE_UNLOADING: State.UNLOADING,
    index_service_pb2.VERSION_STATE_FAILED: State.FAILED,
}
_TOWER_STATES: Mapping[int, State] = {
    query_service_pb2.TOWER_STATE_LOADING: State.LOADING,
    query_service_pb2.TOWER_STATE_AVAILABLE: State.AVAILABLE,
    query_service_pb2.TOWER_STATE_FAILED: State.FAILED,
}


class StatusCollector:
    """Channels to all replicas. Made, used and closed within one event loop."""

    def __init__(self, shards: Sequence[str], query_services: Sequence[str], timeout_s: float = TIMEOUT_S) -> None:
        """Opens the channels; nothing is called yet.

        Args:
            shards: Address of each shard; the position is its number.
            query_services: Address of each replica of the query service.
            timeout_s: How long a replica may take to answer.
        """
        self._timeout_s = timeout_s
        self._shards = [(address, grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)) for address in shards]
        self._query_services = [
            (address, grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)) for address in query_services
        ]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the channels."""
        await asyncio.gather(*(channel.close() for _, channel in (*self._shards, *self._query_services)))

    async def collect(self) -> Fleet:
        """Asks all replicas; never fails, for a replica that does not answer says so in its `error`."""
        num_shards = len(self._shards)
        shards, query_services = await asyncio.gather(
            asyncio.gather(
                *(
                    self._shard(number, num_shards, address, channel)
                    for number, (address, channel) in enumerate(self._shards)
                )
            ),
            asyncio.gather(*(self._query_service(address, channel) for address, channel in self._query_services)),
        )
        return Fleet(shards, query_services)

    async def _shard(self, number: int, num_shards: int, address: str, channel: grpc.aio.Channel) -> Replica:
        stub = index_service_pb2_grpc.IndexServiceStub(channel)
        try:
            answer = await stub.GetShardStatus(index_service_pb2.GetShardStatusRequest(), timeout=self._timeout_s)
        except grpc.aio.AioRpcError as error:
            return Replica("shard", address, number, error=_in_words(error))
        if (answer.shard, answer.num_shards) != (number, num_shards):
            return Replica(
                "shard",
                address,
                number,
                error=f"says it is shard {answer.shard} of {answer.num_shards}, not {number} of {num_shards}: "
                "check the number and the order of the shards' addresses",
            )
        loads = [
            LoadStatus(
                version=status.checkpoint_version,
                state=_SHARD_STATES.get(status.state, State.UNKNOWN),
                reason=status.reason,
                is_corrupt=status.is_corrupt,
                progress=status.progress,
                golden_difference=status.golden_difference,
                num_items=status.num_items,
                num_quarantined=status.num_quarantined,
                index_type=status.index_type,
                catalogue_version=status.catalogue_version,
            )
            for status in answer.versions
        ]
        return Replica("shard", address, number, answer.deployment_revision, loads)

    async def _query_service(self, address: str, channel: grpc.aio.Channel) -> Replica:
        stub = query_service_pb2_grpc.QueryServiceStub(channel)
        try:
            answer = await stub.GetStatus(query_service_pb2.GetStatusRequest(), timeout=self._timeout_s)
        except grpc.aio.AioRpcError as error:
            return Replica("query service", address, error=_in_words(error))
        loads = [
            LoadStatus(
                version=status.checkpoint_version,
                state=_TOWER_STATES.get(status.state, State.UNKNOWN),
                reason=status.reason,
                is_corrupt=status.is_corrupt,
                golden_difference=status.golden_difference,
            )
            for status in answer.towers
        ]
        return Replica("query service", address, None, answer.deployment_revision, loads)


def _in_words(error: grpc.aio.AioRpcError) -> str:
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return "does not answer in time"
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        return "is not reachable"
    return f"answers {error.code().name}: {error.details()}"
