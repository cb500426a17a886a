"""Real gRPC servers whose replicas say what a test tells them to: faults that real services show rarely."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import grpc
from retrieval.index.v1 import index_service_pb2, index_service_pb2_grpc
from retrieval.query.v1 import query_service_pb2, query_service_pb2_grpc

from rollout.fleet import LoadStatus, Shadow, State, Traffic
from towers.settings import Layouts

_SHARD_STATES = {
    State.UNKNOWN: index_service_pb2.VERSION_STATE_UNSPECIFIED,
    State.BUILDING: index_service_pb2.VERSION_STATE_BUILDING,
    State.LOADING: index_service_pb2.VERSION_STATE_LOADING,
    State.AVAILABLE: index_service_pb2.VERSION_STATE_AVAILABLE,
    State.UNLOADING: index_service_pb2.VERSION_STATE_UNLOADING,
    State.FAILED: index_service_pb2.VERSION_STATE_FAILED,
}
_TOWER_STATES = {
    State.UNKNOWN: query_service_pb2.TOWER_STATE_UNSPECIFIED,
    State.LOADING: query_service_pb2.TOWER_STATE_LOADING,
    State.AVAILABLE: query_service_pb2.TOWER_STATE_AVAILABLE,
    State.FAILED: query_service_pb2.TOWER_STATE_FAILED,
}


@dataclass
class ScriptedReplica:
    """What one replica answers; change it at any time."""

    loads: Sequence[LoadStatus] = ()
    shard: int = 0
    num_shards: int = 2
    delay_s: float = 0.0
    failure: grpc.StatusCode | None = None
    deployment_revision: int = 3
    shadow: Shadow | None = None
    traffic: Sequence[Traffic] = ()
    layouts: Sequence[int] = (2, 3)
    workers: Sequence["ScriptedReplica"] = ()
    """The processes that share the address, where there are several; one that fails does not answer the others."""
    address: str = field(default="", init=False)

    async def wait_or_fail(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await asyncio.sleep(self.delay_s)
        if self.failure is not None:
            await context.abort(self.failure, "as scripted")


class _Shard(index_service_pb2_grpc.IndexServiceServicer):
    def __init__(self, script: ScriptedReplica) -> None:
        self._script = script

    async def GetShardStatus(  # noqa: N802
        self, request: index_service_pb2.GetShardStatusRequest, context: Any
    ) -> index_service_pb2.GetShardStatusResponse:
        await self._script.wait_or_fail(context)
        return index_service_pb2.GetShardStatusResponse(
            shard=self._script.shard,
            num_shards=self._script.num_shards,
            deployment_revision=self._script.deployment_revision,
            versions=[
                index_service_pb2.VersionStatus(
                    checkpoint_version=load.version,
                    state=_SHARD_STATES[load.state],
                    reason=load.reason,
                    is_corrupt=load.is_corrupt,
                    progress=load.progress,
                    golden_difference=load.golden_difference,
                    num_items=load.num_items,
                    num_quarantined=load.num_quarantined,
                    index_type=load.index_type,
                    catalogue_version=load.catalogue_version,
                    built_catalogue_version=load.built_catalogue_version,
                    num_delta_items=load.num_delta_items,
                    num_tombstones=load.num_tombstones,
                    size_bytes=load.size_bytes,
                    loaded_from_store=load.is_from_store,
                    search_settings=[
                        index_service_pb2.SearchSetting(**asdict(setting)) for setting in load.search_settings
                    ],
                    target_recall=load.target_recall,
                    target_k=load.target_k,
                    measured_with=load.measured_with,
                    item_similarity=load.item_similarity,
                    score_mean=load.score_mean,
                    score_deviation=load.score_deviation,
                )
                for load in self._script.loads
            ],
        )


class _QueryService(query_service_pb2_grpc.QueryServiceServicer):
    def __init__(self, script: ScriptedReplica) -> None:
        self._script = script

    async def GetStatus(  # noqa: N802
        self, request: query_service_pb2.GetStatusRequest, context: Any
    ) -> query_service_pb2.GetStatusResponse:
        await self._script.wait_or_fail(context)
        status = _query_status(self._script)
        for number, worker in enumerate(self._script.workers):
            said = None if worker.failure else _query_status(worker)
            error = "is not reachable" if worker.failure else ""
            status.workers.append(query_service_pb2.WorkerStatus(worker=number, status=said, error=error))
        return status


def _query_status(script: ScriptedReplica) -> query_service_pb2.GetStatusResponse:
    return query_service_pb2.GetStatusResponse(
        deployment_revision=script.deployment_revision,
        shards=[
            query_service_pb2.ShardConnection(shard=shard, num_shards=num_shards)
            for num_shards in script.layouts
            for shard in range(num_shards)
        ],
        shadow=script.shadow and query_service_pb2.ShadowStatus(**_renamed(script.shadow)),
        traffic=[query_service_pb2.VersionTraffic(**_renamed(part)) for part in script.traffic],
        towers=[
            query_service_pb2.TowerStatus(
                checkpoint_version=load.version,
                state=_TOWER_STATES[load.state],
                reason=load.reason,
                is_corrupt=load.is_corrupt,
                golden_difference=load.golden_difference,
            )
            for load in script.loads
        ],
    )


def _renamed(figures: Shadow | Traffic) -> dict[str, Any]:
    """The fields as the messages name them."""
    fields = asdict(figures)
    return {"checkpoint_version": fields.pop("version"), **fields}


@dataclass
class ScriptedServices:
    """Two shards and a query service, or more."""

    shards: Sequence[ScriptedReplica]
    query_service: ScriptedReplica

    def say(self, *loads: LoadStatus) -> None:
        """All replicas say the same."""
        for replica in (*self.shards, self.query_service):
            replica.loads = loads

    @property
    def layouts(self) -> Layouts:
        """Where the shards are, as the setting says it."""
        sizes = dict.fromkeys(shard.num_shards for shard in self.shards)
        return tuple(
            tuple(
                tuple(shard.address for shard in self.shards if (shard.shard, shard.num_shards) == (number, size))
                for number in range(size)
            )
            for size in sizes
        )


@asynccontextmanager
async def serve_shard(replica: ScriptedReplica, address: str = "127.0.0.1:0") -> AsyncIterator[None]:
    """Serves one shard; its address is filled in."""
    server = grpc.aio.server()
    index_service_pb2_grpc.add_IndexServiceServicer_to_server(_Shard(replica), server)
    replica.address = f"127.0.0.1:{server.add_insecure_port(address)}"
    await server.start()
    try:
        yield
    finally:
        await server.stop(None)


@asynccontextmanager
async def serve_query_service(replica: ScriptedReplica, address: str = "127.0.0.1:0") -> AsyncIterator[None]:
    """Serves one query service; its address is filled in."""
    server = grpc.aio.server()
    query_service_pb2_grpc.add_QueryServiceServicer_to_server(_QueryService(replica), server)
    replica.address = f"127.0.0.1:{server.add_insecure_port(address)}"
    await server.start()
    try:
        yield
    finally:
        await server.stop(None)


@asynccontextmanager
async def scripted_services(num_replicas: int = 1, more_shards: int = 0) -> AsyncIterator[ScriptedServices]:
    """Serves a query service and the replicas of two shards on free ports, and another layout if asked for."""
    shards = [ScriptedReplica(shard=number) for number in (0, 1) for _ in range(num_replicas)]
    shards += [ScriptedReplica(shard=number, num_shards=more_shards) for number in range(more_shards)]
    services = ScriptedServices(shards, ScriptedReplica())
    async with AsyncExitStack() as stack:
        for shard in services.shards:
            await stack.enter_async_context(serve_shard(shard))
        await stack.enter_async_context(serve_query_service(services.query_service))
        yield services
