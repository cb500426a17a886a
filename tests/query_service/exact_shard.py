"""A shard that searches exactly, in numpy, behind a real gRPC server, and that can be told to misbehave.

Deliberately does not know the query service.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Self

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from retrieval.feature.v1 import feature_pb2
from retrieval.index.v1 import index_service_pb2, index_service_pb2_grpc
from toy_checkpoint import ToyModel, toy_items

from towers.catalogue import partition
from towers.errors import InvalidInputError, VersionNotLoadedError, WrongShardError
from towers.rpc import SERVER_OPTIONS, ErrorInterceptor

_SERVICE = index_service_pb2.DESCRIPTOR.services_by_name["IndexService"].full_name

Context = grpc.aio.ServicerContext[Any, Any]


class ExactShard(index_service_pb2_grpc.IndexServiceServicer):
    """One shard of the toy catalogue."""

    def __init__(self, shard: int, num_shards: int, models: Mapping[int, ToyModel]) -> None:
        self.models = dict(models)
        """The versions it holds."""
        self.delay_s = 0.0
        self.failure: grpc.StatusCode | None = None
        self.spoil: Callable[[index_service_pb2.SearchResponse], None] = lambda response: None
        """Changes answers before they leave."""
        self.version_shift = 0
        """Added to the version that a rank says it is of."""
        self.before_search: Callable[[], None] = lambda: None
        self.num_calls = 0
        self.last_request = index_service_pb2.SearchRequest()
        self.num_cancelled = 0
        self.port = 0
        self._place = (shard, num_shards)
        self._items = partition(toy_items(), shard, num_shards)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def item_ids(self) -> list[str]:
        ids: list[str] = self._items["item_id"].to_pylist()
        return ids

    async def start(self) -> None:
        """Listens; on the same port as before."""
        self._server = grpc.aio.server(interceptors=(ErrorInterceptor(),), options=SERVER_OPTIONS)
        index_service_pb2_grpc.add_IndexServiceServicer_to_server(self, self._server)
        self._health = health_aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        await self.set_serving(True)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()

    async def set_serving(self, is_serving: bool) -> None:
        """What it says of itself; it answers all the same."""
        status = health_pb2.HealthCheckResponse
        await self._health.set(_SERVICE, status.SERVING if is_serving else status.NOT_SERVING)

    async def stop(self) -> None:
        await self._server.stop(None)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.stop()

    async def Search(  # noqa: N802
        self, request: index_service_pb2.SearchRequest, context: Context
    ) -> index_service_pb2.SearchResponse:
        self.num_calls += 1
        self.last_request = request
        self.before_search()
        try:
            await asyncio.sleep(self.delay_s)
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        if self.failure is not None:
            await context.abort(self.failure, "told to fail")
        response = self._search(request)
        self.spoil(response)
        return response

    async def RankItem(  # noqa: N802
        self, request: index_service_pb2.RankItemRequest, context: Context
    ) -> index_service_pb2.RankItemResponse:
        self.num_calls += 1
        await asyncio.sleep(self.delay_s)
        if self.failure is not None:
            await context.abort(self.failure, "told to fail")
        model = self._held(request)
        queries = np.frombuffer(request.query_embeddings, "<f4").reshape(request.num_queries, model.dim)
        counted = [item_id for item_id in self.item_ids if item_id not in set(request.excluded_item_ids)]
        is_held = request.item_id in self.item_ids
        scores, score = np.empty(0), request.score if request.HasField("score") else None
        if is_held:
            scores = queries @ model.item_embeddings([request.item_id]).astype(np.float32)[0]
            score = float(scores[0])
        better = 0
        if score is not None:
            others = [item_id for item_id in counted if item_id != request.item_id]
            better = int((queries[0] @ model.item_embeddings(others).astype(np.float32).T > score).sum())
        return index_service_pb2.RankItemResponse(
            state=index_service_pb2.ITEM_STATE_HELD if is_held else index_service_pb2.ITEM_STATE_NOT_HELD,
            meets_filter=is_held,
            scores=scores.astype("<f4").tobytes(),
            num_better=better,
            num_counted=len(counted),
            checkpoint_version=request.checkpoint_version + self.version_shift,
            catalogue_version="0.1",
        )

    def GetShardStatus(  # noqa: N802
        self, request: index_service_pb2.GetShardStatusRequest, context: Any
    ) -> index_service_pb2.GetShardStatusResponse:
        raise NotImplementedError

    def _held(self, request: index_service_pb2.SearchRequest | index_service_pb2.RankItemRequest) -> ToyModel:
        if (request.shard, request.num_shards) != self._place:
            raise WrongShardError(f"this is shard {self._place[0]} of {self._place[1]}")
        if request.checkpoint_version not in self.models:
            raise VersionNotLoadedError(f"checkpoint_version {request.checkpoint_version} is not loaded")
        return self.models[request.checkpoint_version]

    def _search(self, request: index_service_pb2.SearchRequest) -> index_service_pb2.SearchResponse:
        model = self._held(request)
        for name in request.attribute_names:
            if name not in self._items.column_names:
                raise InvalidInputError(f"attribute_names: unknown attribute {name!r}")
        queries = np.frombuffer(request.query_embeddings, "<f4").reshape(request.num_queries, model.dim)
        excluded = set(request.excluded_item_ids)
        rows = [row for row, item_id in enumerate(self.item_ids) if item_id not in excluded]
        scores = queries @ model.item_embeddings([self.item_ids[row] for row in rows]).astype(np.float32).T  # [B, N]
        best = np.argsort(-scores, axis=1, kind="stable")[:, : request.k]  # [B, K]
        hits = [rows[column] for column in best.ravel()]
        ids = [self.item_ids[row].encode() for row in hits]
        return index_service_pb2.SearchResponse(
            hit_counts=np.full(len(best), best.shape[1], "<u4").tobytes(),
            scores=np.take_along_axis(scores, best, axis=1).astype("<f4").tobytes(),
            item_ids=b"".join(ids),
            item_id_sizes=np.array([len(item_id) for item_id in ids], "<u4").tobytes(),
            attributes=[
                feature_pb2.AttributeColumn(name=name, values=[_value(self._items[name][row].as_py()) for row in hits])
                for name in request.attribute_names
            ],
            checkpoint_version=request.checkpoint_version,
        )


def _value(value: Any) -> feature_pb2.FeatureValue:
    if isinstance(value, str):
        return feature_pb2.FeatureValue(string_value=value)
    if isinstance(value, list):
        return feature_pb2.FeatureValue(string_list=feature_pb2.StringList(values=value))
    return feature_pb2.FeatureValue(number_value=value)
