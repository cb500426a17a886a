"""The public gRPC service: messages in, messages out.

Deliberately does not know how an answer is found.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any

import grpc
from retrieval.query.v1 import query_service_pb2, query_service_pb2_grpc

from query_service.admission import Admission, Priority, priority_of
from query_service.cache import EmbeddingCache
from query_service.deadline import Deadline
from query_service.embed import Embedder, Held
from query_service.explain import Explainer
from query_service.fallback import FallbackCounts
from query_service.fan_out import Shards
from query_service.micro_batch import BatchCounts
from query_service.retrieve import Retriever
from query_service.shadow import Comparison, Shadow
from query_service.siblings import Siblings
from query_service.stream import answer_stream
from query_service.traffic import Traffic
from query_service.versions import TowerState, Versions
from towers.errors import InvalidInputError, NotReadyError
from towers.rpc import told

SERVICE_NAME = query_service_pb2.DESCRIPTOR.services_by_name["QueryService"].full_name

GUARDED_METHODS = ("Retrieve", "BatchRetrieve", "Embed", "Explain")
"""Refused at the door when there is no room. The queries of a stream wait; the status is always told."""

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
        admission: Admission,
        retriever: Retriever,
        explainer: Explainer,
        versions: Versions,
        shards: Shards,
        cache: EmbeddingCache,
        embedder: Embedder,
        traffic: Traffic,
        shadow: Shadow,
        fallback_counts: FallbackCounts,
        default_timeout_s: float,
        max_stream_queries: int,
        draining: asyncio.Event,
        siblings: Siblings | None = None,
    ) -> None:
        self._admission = admission
        self._retriever = retriever
        self._explainer = explainer
        self._versions = versions
        self._shards = shards
        self._cache = cache
        self._embedder = embedder
        self._traffic = traffic
        self._shadow = shadow
        self._fallback_counts = fallback_counts
        self._default_timeout_s = default_timeout_s
        self._max_stream_queries = max_stream_queries
        self._draining = draining
        self._siblings = siblings

    async def Retrieve(  # noqa: N802
        self, request: query_service_pb2.RetrieveRequest, context: _Context
    ) -> query_service_pb2.RetrieveResponse:
        """Returns the k best items for one query."""
        priority, deadline = priority_of(context.invocation_metadata()), self._deadline(context)
        with self._admission.admitted(priority, 1, deadline) as visit:
            [response] = await self._retriever.retrieve(request, [request.query], deadline)
            if not response.degraded_reasons:
                self._admission.learn(visit)
        return response

    async def BatchRetrieve(  # noqa: N802
        self, request: query_service_pb2.BatchRetrieveRequest, context: _Context
    ) -> query_service_pb2.BatchRetrieveResponse:
        """Returns the k best items for each of many queries."""
        priority, deadline = priority_of(context.invocation_metadata()), self._deadline(context)
        with self._admission.admitted(priority, len(request.queries), deadline) as visit:
            results = await self._retriever.retrieve(request, request.queries, deadline)
            if not any(result.degraded_reasons for result in results):
                self._admission.learn(visit)
        return query_service_pb2.BatchRetrieveResponse(results=results)

    # The stubs for the type checker know streams as generators alone.
    async def StreamRetrieve(  # type: ignore[override]  # noqa: N802
        self, requests: AsyncIterator[query_service_pb2.StreamRetrieveRequest], context: _Context
    ) -> None:
        """Returns the k best items for each query of a stream, in the order of the queries."""
        priority = priority_of(context.invocation_metadata(), otherwise=Priority.SHEDDABLE)

        async def answer(
            index: int, request: query_service_pb2.StreamRetrieveRequest
        ) -> query_service_pb2.StreamRetrieveResponse:
            try:
                if not request.HasField("retrieve"):
                    raise InvalidInputError("retrieve is not set; put the query there")
                async with self._admission.admitted_in_turn(priority):
                    # The stream's own deadline, if any, may be hours away: what one query may take is not.
                    own = Deadline.after(self._default_timeout_s)
                    deadline = min(own, self._deadline(context), key=Deadline.remaining_s)
                    [response] = await self._retriever.retrieve(request.retrieve, [request.retrieve.query], deadline)
            except NotReadyError:
                # Of a replica that has just started; it says nothing of the query.
                raise
            except Exception as error:
                status, message = told(error, "a query of StreamRetrieve")
                failure = query_service_pb2.QueryError(code=status.value[0], message=message)
                return query_service_pb2.StreamRetrieveResponse(index=index, error=failure)
            return query_service_pb2.StreamRetrieveResponse(index=index, retrieved=response)

        await answer_stream(requests, answer, context.write, self._max_stream_queries, self._draining)

    async def Embed(  # noqa: N802
        self, request: query_service_pb2.EmbedRequest, context: _Context
    ) -> query_service_pb2.EmbedResponse:
        """Returns the embeddings of queries."""
        priority, deadline = priority_of(context.invocation_metadata()), self._deadline(context)
        with self._admission.admitted(priority, len(request.queries), deadline):
            return await self._retriever.embed(request.queries, deadline)

    async def Explain(  # noqa: N802
        self, request: query_service_pb2.ExplainRequest, context: _Context
    ) -> query_service_pb2.ExplainResponse:
        """Returns why an item is, or is not, among the best for a query."""
        priority, deadline = priority_of(context.invocation_metadata()), self._deadline(context)
        with self._admission.admitted(priority, 1, deadline):
            explanation = await self._explainer.explain(request, deadline)
        return query_service_pb2.ExplainResponse(
            finding=query_service_pb2.Finding.Value(f"FINDING_{explanation.finding.name}"),
            reason=explanation.reason,
            score=explanation.score,
            exact_rank=explanation.exact_rank,
            num_items=explanation.num_counted,
            found_by_index=explanation.is_found,
            last_score=explanation.last_score,
            shard=explanation.shard,
            num_shards=explanation.pin.num_shards,
            checkpoint_version=explanation.pin.version,
            catalogue_version=explanation.catalogue_version,
            contributions=[
                query_service_pb2.FeatureContribution(feature=name, contribution=contribution)
                for name, contribution in explanation.contributions
            ],
        )

    async def GetStatus(  # noqa: N802
        self,
        request: query_service_pb2.GetStatusRequest,  # noqa: ARG002
        context: _Context,  # noqa: ARG002
    ) -> query_service_pb2.GetStatusResponse:
        """Returns the versions this replica serves, its traffic, its shards and its cache."""
        status = self.status()
        if self._siblings is not None:
            status.workers.extend(await self._siblings.statuses(status))
        return status

    def status(self) -> query_service_pb2.GetStatusResponse:
        """What this process says of itself."""
        live, standby = self._versions.live, self._versions.standby
        revision = self._versions.deployment.revision
        return query_service_pb2.GetStatusResponse(
            deployment_revision=revision,
            live_version=live.version if live else 0,
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
                    slow=connection.is_slow,
                )
                for connection in self._shards.connections()
            ],
            cache=query_service_pb2.CacheStatus(
                enabled=self._cache.is_enabled,
                reachable=self._cache.is_reachable,
                hits=self._cache.num_hits,
                misses=self._cache.num_misses,
                errors=self._cache.num_errors,
                versions=[_version_cache_message(version, held) for version, held in self._embedder.held()],
            ),
            features=[
                query_service_pb2.QueryFeature(name=feature.name, kind=feature.kind)
                for feature in (live.tower.encoder.features if live else ())
            ],
            shadow=_shadow_message(self._shadow.between(live.place, standby)) if live and standby else None,
            traffic=[
                query_service_pb2.VersionTraffic(
                    checkpoint_version=place.version,
                    num_shards=place.num_shards,
                    num_requests=count.num_requests,
                    num_errors=count.num_errors,
                    p50_s=count.latencies.quantile_s(0.5),
                    p99_s=count.latencies.quantile_s(0.99),
                )
                for place, count in sorted(self._traffic.under(revision).counts.items())
            ],
            micro_batches=_micro_batch_message(self._retriever.micro_batches.counts),
            fan_out=query_service_pb2.FanOutStatus(**asdict(self._shards.counts)),
            degradation=query_service_pb2.DegradationStatus(**asdict(self._fallback_counts)),
            admission=query_service_pb2.AdmissionStatus(
                limit=self._admission.bound,
                in_flight=self._admission.in_flight,
                queued=self._admission.num_queued,
                rejected=[
                    query_service_pb2.RejectedRequests(priority=priority.value, num_requests=num_requests)
                    for priority, num_requests in self._admission.num_rejected.items()
                ],
                hopeless=self._admission.num_hopeless,
            ),
        )

    def _deadline(self, context: _Context) -> Deadline:
        remaining_s = context.time_remaining()
        return Deadline.after(self._default_timeout_s if remaining_s is None else remaining_s)


def _micro_batch_message(counts: BatchCounts) -> query_service_pb2.MicroBatchStatus:
    return query_service_pb2.MicroBatchStatus(
        num_batches=counts.num_batches,
        num_requests=counts.num_requests,
        largest=counts.largest,
        wait_p50_s=counts.waits.quantile_s(0.5),
        wait_p99_s=counts.waits.quantile_s(0.99),
    )


def _version_cache_message(version: int, held: Held) -> query_service_pb2.VersionCache:
    return query_service_pb2.VersionCache(
        checkpoint_version=version,
        entries=len(held.recent),
        hits=held.num_hits,
        misses=held.num_misses,
        joined=held.num_joined,
        prewarmed=held.num_ahead,
        tower_s=held.tower.seconds,
        local_s=held.local.lookup.seconds,
        local_bypassed=held.local.is_left_out,
        redis_s=held.shared.lookup.seconds,
        redis_bypassed=held.shared.is_left_out,
    )


def _shadow_message(comparison: Comparison) -> query_service_pb2.ShadowStatus:
    return query_service_pb2.ShadowStatus(
        checkpoint_version=comparison.standby.version,
        live_version=comparison.live.version,
        num_queries=comparison.num_queries,
        num_errors=comparison.num_errors,
        mean_overlap=comparison.mean_overlap,
        live_p50_s=comparison.live_latencies.quantile_s(0.5),
        live_p99_s=comparison.live_latencies.quantile_s(0.99),
        standby_p50_s=comparison.standby_latencies.quantile_s(0.5),
        standby_p99_s=comparison.standby_latencies.quantile_s(0.99),
    )
