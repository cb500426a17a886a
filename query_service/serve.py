"""The query service's process: everything is made here, and ended in the reverse order.

Deliberately does not know how a request is answered.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from retrieval.query.v1 import query_service_pb2_grpc

from query_service.admission import Admission, AdmissionInterceptor
from query_service.cache import EmbeddingCache
from query_service.embed import Embedder
from query_service.explain import Explainer
from query_service.fallback import Fallback
from query_service.fan_out import Shards
from query_service.hot import HotQueries
from query_service.offload import Offload
from query_service.parse import Limits
from query_service.prewarm import Prewarmer
from query_service.retrieve import Retriever
from query_service.service import GUARDED_METHODS, SERVICE_NAME, QueryService
from query_service.settings import QuerySettings
from query_service.shadow import Shadow
from query_service.siblings import Siblings
from query_service.traffic import Traffic
from query_service.versions import Versions
from towers import event_loop
from towers.errors import TwoTowerError
from towers.rpc import RpcServer, until_stopped
from towers.store import Store


def run(settings: QuerySettings) -> None:
    """Serves until SIGTERM or SIGINT, then drains.

    Raises:
        InvalidInputError: the store cannot be opened, or the address cannot be bound.
    """
    event_loop.run(_serve_until_stopped(settings))


@asynccontextmanager
async def serving(settings: QuerySettings, siblings: Siblings | None = None) -> AsyncIterator[int]:
    """Serves while the block runs, then drains; yields the port, 0 where nothing listens yet.

    The service is ready, in the health protocol's sense, once a query tower is loaded.

    Args:
        settings: The whole configuration.
        siblings: The processes that share the address; this one is told there once it is ready too.

    Raises:
        InvalidInputError: the store cannot be opened, or the address cannot be bound.
    """
    store = Store(settings.store)
    shards = Shards(settings.shards, is_hedged=settings.hedge)
    versions = Versions(store, settings.poll_interval_s, shards.num_shards)
    cache = EmbeddingCache(settings.redis_url, settings.cache_ttl_s, settings.cache_timeout_s, settings.cache_dtype)
    offload = Offload()
    limits = Limits(settings.max_k, settings.max_batch_size, max(shards.num_shards))
    traffic = Traffic()
    shadow = Shadow(settings.shadow_share, settings.default_timeout_s)
    hot = HotQueries(min(settings.cache_prewarm, settings.cache_entries))
    embedder = Embedder(cache, offload, hot, settings.cache_entries, settings.cache_bypass)
    fallback = Fallback(settings.stale_result_s, settings.stale_entries, settings.popular_items)
    retriever = Retriever(
        versions, embedder, shards, offload, traffic, shadow, fallback, limits, settings.max_micro_batch
    )
    explainer = Explainer(versions, embedder, shards, limits)
    admission = Admission(settings.max_in_flight, settings.target_latency_s)
    server = RpcServer(
        settings.address,
        SERVICE_NAME,
        drain_s=settings.drain_s,
        grace_s=settings.grace_s,
        reflect=settings.reflection,
        shares_port=siblings is not None,
        guards=(AdmissionInterceptor(admission, SERVICE_NAME, GUARDED_METHODS),),
    )
    service = QueryService(
        admission,
        retriever,
        explainer,
        versions,
        shards,
        cache,
        embedder,
        traffic,
        shadow,
        fallback.counts,
        settings.default_timeout_s,
        settings.max_stream_queries,
        server.draining,
        siblings,
    )
    query_service_pb2_grpc.add_QueryServiceServicer_to_server(service, server.grpc)
    background: list[asyncio.Task[None]] = []
    try:
        if siblings is not None:
            await siblings.listen(service.status)
        port = await server.start() if siblings is None or siblings.joins_at_once else 0
        background += [
            asyncio.create_task(versions.follow()),
            asyncio.create_task(Prewarmer(versions, embedder, hot, settings.poll_interval_s).follow()),
            asyncio.create_task(_ready_once_loaded(versions, server, siblings)),
        ]
        try:
            yield port
        finally:
            await server.drain_and_stop()
    finally:
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)
        await retriever.close()
        await shadow.close()
        await shards.close()
        await cache.close()
        offload.close()
        if siblings is not None:
            await siblings.close()


async def _serve_until_stopped(settings: QuerySettings) -> None:
    # First, so that a signal during the start drains too.
    stopped = asyncio.create_task(until_stopped())
    async with serving(settings):
        await stopped


async def _ready_once_loaded(versions: Versions, server: RpcServer, siblings: Siblings | None) -> None:
    await versions.ready.wait()
    if siblings is None:
        await server.set_ready(True)
        return
    try:
        if not siblings.joins_at_once:
            await server.start(is_ready=True)
        await server.set_ready(True)
    except TwoTowerError as error:
        siblings.joined.set_exception(error)
    else:
        siblings.joined.set_result(None)
