"""Asks every shard and every query service for its status, in parallel, over channels that stay open.

Deliberately does not know what the statuses are for. The one place of this room that knows the stubs.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

import grpc
from retrieval.index.v1 import index_service_pb2, index_service_pb2_grpc
from retrieval.query.v1 import query_service_pb2, query_service_pb2_grpc

from rollout.fleet import Fleet, LoadStatus, Replica, SearchSetting, Shadow, State, Traffic
from towers.rpc import CHANNEL_OPTIONS
from towers.settings import Layouts

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


@dataclass(frozen=True)
class _Place:
    """Which shard is expected at an address."""

    shard: int
    num_shards: int
    address: str


class StatusCollector:
    """Channels to all replicas. Made, used and closed within one event loop."""

    def __init__(self, layouts: Layouts, query_services: Sequence[str], timeout_s: float = TIMEOUT_S) -> None:
        """Opens the channels; nothing is called yet.

        Args:
            layouts: Addresses of every shard's replicas, by layout.
            query_services: Address of each replica of the query service.
            timeout_s: How long a replica may take to answer.
        """
        self._timeout_s = timeout_s
        self._shards = [
            (_Place(number, len(layout), address), _channel(address))
            for layout in layouts
            for number, addresses in enumerate(layout)
            for address in addresses
        ]
        self._query_services = [(address, _channel(address)) for address in query_services]

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
        shards, answers = await asyncio.gather(
            asyncio.gather(*(self._shard(place, channel) for place, channel in self._shards)),
            asyncio.gather(*(self._query_service(address, channel) for address, channel in self._query_services)),
        )
        return Fleet(shards, [process for processes in answers for process in processes])

    async def _shard(self, place: _Place, channel: grpc.aio.Channel) -> Replica:
        replica = Replica("shard", place.address, place.shard, place.num_shards)
        stub = index_service_pb2_grpc.IndexServiceStub(channel)
        try:
            answer = await stub.GetShardStatus(index_service_pb2.GetShardStatusRequest(), timeout=self._timeout_s)
        except grpc.aio.AioRpcError as error:
            return replace(replica, error=_in_words(error))
        if (answer.shard, answer.num_shards) != (place.shard, place.num_shards):
            mismatch = (
                f"says it is shard {answer.shard} of {answer.num_shards}, not {place.shard} of {place.num_shards}: "
                "check the number and the order of the shards' addresses"
            )
            return replace(replica, error=mismatch)
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
                built_catalogue_version=status.built_catalogue_version,
                num_delta_items=status.num_delta_items,
                num_tombstones=status.num_tombstones,
                size_bytes=status.size_bytes,
                is_from_store=status.loaded_from_store,
                search_settings=tuple(
                    SearchSetting(setting.k, setting.parameters, setting.recall, setting.latency_s)
                    for setting in status.search_settings
                ),
                target_recall=status.target_recall,
                target_k=status.target_k,
                measured_with=status.measured_with,
                item_similarity=status.item_similarity,
                score_mean=status.score_mean,
                score_deviation=status.score_deviation,
            )
            for status in answer.versions
        ]
        return replace(replica, deployment_revision=answer.deployment_revision, loads=loads)

    async def _query_service(self, address: str, channel: grpc.aio.Channel) -> list[Replica]:
        """The processes at one address."""
        stub = query_service_pb2_grpc.QueryServiceStub(channel)
        try:
            answer = await stub.GetStatus(query_service_pb2.GetStatusRequest(), timeout=self._timeout_s)
        except grpc.aio.AioRpcError as error:
            return [Replica("query service", address, error=_in_words(error))]
        if not answer.workers:
            return [_query_process(address, answer)]
        return [
            replace(
                _query_process(address, worker.status)
                if worker.HasField("status")
                else Replica("query service", address, error=worker.error),
                worker=worker.worker,
            )
            for worker in answer.workers
        ]


def _query_process(address: str, answer: query_service_pb2.GetStatusResponse) -> Replica:
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
    return Replica(
        "query service",
        address,
        deployment_revision=answer.deployment_revision,
        loads=loads,
        layouts=frozenset(connection.num_shards for connection in answer.shards),
        shadow=_shadow(answer.shadow) if answer.HasField("shadow") else None,
        traffic=[
            Traffic(
                part.checkpoint_version,
                part.num_shards,
                part.num_requests,
                part.num_errors,
                part.p50_s,
                part.p99_s,
            )
            for part in answer.traffic
        ],
    )


def _channel(address: str) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)


def _shadow(message: query_service_pb2.ShadowStatus) -> Shadow:
    return Shadow(
        message.checkpoint_version,
        message.live_version,
        message.num_queries,
        message.num_errors,
        message.mean_overlap,
        message.live_p50_s,
        message.live_p99_s,
        message.standby_p50_s,
        message.standby_p99_s,
    )


def _in_words(error: grpc.aio.AioRpcError) -> str:
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return "does not answer in time"
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        return "is not reachable"
    return f"answers {error.code().name}: {error.details()}"
