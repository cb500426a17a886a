"""The public gRPC service: messages in, messages out.

Deliberately does not know how an answer is found.
"""

from typing import Any

import grpc
from retrieval.query.v1 import query_service_pb2, query_service_pb2_grpc

from query_service.cache import EmbeddingCache
from query_service.deadline import Deadline
from query_service.fan_out import Shards
from query_service.retrieve import Retriever
from query_service.versions import TowerState, Versions

SERVICE_NAME = query_service_pb2.DESCRIPTOR.services_by_name["QueryService"].full_name

_STATES = {
    TowerState.LOADING: query_service_pb2.TOWER_STATE_LOADING,
    TowerState.AVAILABLE: query_service_pb2.TOWER_STATE_AVAILABLE,
    TowerState.FAILED: query_service_pb2.TOWER_STATE_FAILED,
}

_Context = grpc.aio.ServicerContext[Any, Any]


class QueryService(query_service_pb2_grpc.QueryServiceServicer):
    """The servicer."""

    def __init__(
        self,
        retriever: Retriever,
        versions: Versions,
        shards: Shards,
        cache: EmbeddingCache,
        default_timeout_s: float,
    ) -> None:
        self._retriever = retriever
        self._versions = versions
        self._shards = shards
        self._cache = cache
        self._default_timeout_s = default_timeout_s

    async def Retrieve(  # noqa: N802
        self, request: query_service_pb2.RetrieveRequest, context: _Context
    ) -> query_service_pb2.RetrieveResponse:
        """Returns the k best items for one query."""
        [response] = await self._retriever.retrieve(request, [request.query], self._deadline(context))
        return response

    async def BatchRetrieve(  # noqa: N802
        self, request: query_service_pb2.BatchRetrieveRequest, context: _Context
    ) -> query_service_pb2.BatchRetrieveResponse:
        """Returns the k best items for each of many queries."""
        results = await self._retriever.retrieve(request, request.queries, self._deadline(context))
        return query_service_pb2.BatchRetrieveResponse(results=results)

    async def Embed(  # noqa: N802
        self, request: query_service_pb2.EmbedRequest, context: _Context
    ) -> query_service_pb2.EmbedResponse:
        """Returns the embeddings of queries."""
        return await self._retriever.embed(request.queries, self._deadline(context))

    async def GetStatus(  # noqa: N802
        self,
        request: query_service_pb2.GetStatusRequest,  # noqa: ARG002
        context: _Context,  # noqa: ARG002
    ) -> query_service_pb2.GetStatusResponse:
        """Returns the versions this replica serves, its shards and its cache."""
        standby = self._versions.standby
        return query_service_pb2.GetStatusResponse(
            deployment_revision=self._versions.deployment.revision,
            live_version=self._versions.live_version or 0,
            standby_version=standby.version if standby else 0,
            towers=[
                query_service_pb2.TowerStatus(
                    checkpoint_version=status.version,
                    state=_STATES[status.state],
                    reason=status.reason,
                    golden_difference=status.golden_difference,
                    is_corrupt=status.is_corrupt,
                )
                for status in self._versions.statuses()
            ],
            shards=[
                query_service_pb2.ShardConnection(
                    shard=connection.shard,
                    address=connection.address,
                    reachable=connection.is_reachable,
                    num_shards=connection.num_shards,
                )
                for connection in self._shards.connections()
            ],
            cache=query_service_pb2.CacheStatus(
                enabled=self._cache.is_enabled,
                reachable=self._cache.is_reachable,
                hits=self._cache.num_hits,
                misses=self._cache.num_misses,
                errors=self._cache.num_errors,
            ),
            features=[
                query_service_pb2.QueryFeature(name=feature.name, kind=feature.kind)
                for feature in self._versions.live_features
            ],
        )

    def _deadline(self, context: _Context) -> Deadline:
        remaining_s = context.time_remaining()
        return Deadline.after(self._default_timeout_s if remaining_s is None else remaining_s)
