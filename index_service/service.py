"""The gRPC servicer of one shard: parse, pin the version, search, pack.

Deliberately does not know how versions come and go. The one place of this room that knows the stubs.
"""

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any, TypeVar

import faiss
import grpc
import numpy as np
from numpy.typing import NDArray
from retrieval.feature.v1 import feature_pb2
from retrieval.index.v1 import index_service_pb2, index_service_pb2_grpc

from index_service.filter_message import condition_of
from index_service.live import LiveView
from index_service.rank import standing
from index_service.versions import State, Versions, VersionStatus
from towers.errors import DeadlineError, InvalidInputError, WrongShardError

SERVICE_NAME = "retrieval.index.v1.IndexService"
MAX_K = 10_000
MAX_HITS = 2_000_000
"""Of one call, all queries together: about half of the largest message."""

_BRIEF_S = 1.5e-4
"""What it takes of a processor to hand a search to a thread and its answer back; searches that take less stay."""

_STATES = {
    State.BUILDING: index_service_pb2.VERSION_STATE_BUILDING,
    State.LOADING: index_service_pb2.VERSION_STATE_LOADING,
    State.AVAILABLE: index_service_pb2.VERSION_STATE_AVAILABLE,
    State.UNLOADING: index_service_pb2.VERSION_STATE_UNLOADING,
    State.FAILED: index_service_pb2.VERSION_STATE_FAILED,
}
_Result = TypeVar("_Result")
_Context = grpc.aio.ServicerContext[Any, Any]


def search_executor(num_threads: int) -> ThreadPoolExecutor:
    """Threads for searches, each of which keeps to one OpenMP thread: FAISS releases the interpreter lock."""
    return ThreadPoolExecutor(num_threads, "search", initializer=faiss.omp_set_num_threads, initargs=(1,))


class IndexServicer(index_service_pb2_grpc.IndexServiceServicer):
    """Answers for one shard."""

    def __init__(self, versions: Versions, executor: ThreadPoolExecutor, shard: int, num_shards: int) -> None:
        self._versions = versions
        self._executor = executor
        self._shard = shard
        self._num_shards = num_shards

    async def Search(  # noqa: N802
        self, request: index_service_pb2.SearchRequest, context: _Context
    ) -> index_service_pb2.SearchResponse:
        """Returns the k best items of this shard for each query embedding."""
        self._require_place(request)
        deadline_s = _deadline_s(context)
        with self._versions.pin(request.checkpoint_version) as view:
            if _is_brief(view, request):
                return _answer(view, request, deadline_s)
            return await self._in_executor(lambda: _answer(view, request, deadline_s))

    async def RankItem(  # noqa: N802
        self, request: index_service_pb2.RankItemRequest, context: _Context
    ) -> index_service_pb2.RankItemResponse:
        """Returns the exact score of one item and how many items of this shard are better, without the index."""
        self._require_place(request)
        deadline_s = _deadline_s(context)
        with self._versions.pin(request.checkpoint_version) as view:
            return await self._in_executor(lambda: _ranked(view, request, deadline_s))

    async def GetShardStatus(  # noqa: N802
        self,
        request: index_service_pb2.GetShardStatusRequest,  # noqa: ARG002
        context: _Context,  # noqa: ARG002
    ) -> index_service_pb2.GetShardStatusResponse:
        """Returns the versions this replica holds and how far each has come."""
        return index_service_pb2.GetShardStatusResponse(
            shard=self._shard,
            num_shards=self._num_shards,
            deployment_revision=self._versions.deployment.revision,
            versions=[_status_message(status) for status in self._versions.statuses()],
        )

    def _require_place(self, request: index_service_pb2.SearchRequest | index_service_pb2.RankItemRequest) -> None:
        if (request.shard, request.num_shards) != (self._shard, self._num_shards):
            raise WrongShardError(
                f"this is shard {self._shard} of {self._num_shards}, the request is for shard {request.shard} of "
                f"{request.num_shards}; correct the caller's list of shards"
            )

    async def _in_executor(self, work: Callable[[], _Result]) -> _Result:
        future = self._executor.submit(work)
        try:
            return await asyncio.wrap_future(future)
        finally:
            # A call that was cancelled leaves its search running, and the caller's pin must outlive that.
            if not future.done():
                await asyncio.wait((asyncio.wrap_future(future),))


def _deadline_s(context: _Context) -> float | None:
    """On the monotonic clock; None where there is none."""
    remaining_s = context.time_remaining()
    return None if remaining_s is None else time.monotonic() + remaining_s


def _require_time(deadline_s: float | None) -> None:
    if deadline_s is not None and time.monotonic() >= deadline_s:
        raise DeadlineError("the deadline passed before the search began")


def _is_brief(view: LiveView, request: index_service_pb2.SearchRequest) -> bool:
    """Whether all that is searched is the built index, and that for no longer than a thread would cost."""
    return (
        not (request.HasField("filter") or request.excluded_item_ids or request.attribute_names)
        and view.num_new_items == 0
        and request.num_queries * view.base.ann.usual_latency_s(request.k) <= _BRIEF_S
    )


def _answer(
    view: LiveView, request: index_service_pb2.SearchRequest, deadline_s: float | None
) -> index_service_pb2.SearchResponse:
    _require_time(deadline_s)
    if not 1 <= request.k <= MAX_K:
        raise InvalidInputError(f"k is {request.k}; ask for 1 to {MAX_K}")
    embeddings = _embeddings(request, view.dim)
    condition = condition_of(request.filter) if request.HasField("filter") else None
    num_hits = request.num_queries * min(request.k, view.num_items)
    if num_hits > MAX_HITS:
        raise InvalidInputError(f"num_queries times k is {num_hits}, more than {MAX_HITS}; ask for fewer at a time")
    hits = view.search(embeddings, request.k, condition, request.excluded_item_ids)
    item_ids, item_id_sizes = view.packed_ids(hits.rows)
    return index_service_pb2.SearchResponse(
        hit_counts=hits.counts.astype("<u4").tobytes(),
        scores=hits.scores.astype("<f4").tobytes(),
        item_ids=item_ids,
        item_id_sizes=item_id_sizes.astype("<u4").tobytes(),
        attributes=[
            feature_pb2.AttributeColumn(
                name=name, values=[_feature_value(value) for value in view.attribute_values(name, hits.rows)]
            )
            for name in request.attribute_names
        ],
        checkpoint_version=view.checkpoint_version,
        catalogue_version=view.catalogue_version,
    )


def _ranked(
    view: LiveView, request: index_service_pb2.RankItemRequest, deadline_s: float | None
) -> index_service_pb2.RankItemResponse:
    _require_time(deadline_s)
    if not request.item_id:
        raise InvalidInputError("item_id is empty; name the item")
    if not math.isfinite(request.score):
        raise InvalidInputError(f"score is {request.score}; expected a finite number")
    found = standing(
        view,
        _embeddings(request, view.dim),
        request.item_id,
        condition_of(request.filter) if request.HasField("filter") else None,
        request.excluded_item_ids,
        request.score if request.HasField("score") else None,
    )
    if found.scores is not None:
        state = index_service_pb2.ITEM_STATE_HELD
    elif found.quarantine_reason is not None:
        state = index_service_pb2.ITEM_STATE_QUARANTINED
    else:
        state = index_service_pb2.ITEM_STATE_NOT_HELD
    return index_service_pb2.RankItemResponse(
        state=state,
        quarantine_reason=found.quarantine_reason or "",
        meets_filter=found.meets_condition,
        scores=b"" if found.scores is None else found.scores.astype("<f4").tobytes(),
        num_better=found.num_better,
        num_counted=found.num_counted,
        checkpoint_version=view.checkpoint_version,
        catalogue_version=view.catalogue_version,
    )


def _embeddings(
    request: index_service_pb2.SearchRequest | index_service_pb2.RankItemRequest, dim: int
) -> NDArray[np.float32]:
    if request.num_queries < 1:
        raise InvalidInputError(f"num_queries is {request.num_queries}; send at least 1")
    size, right_size = len(request.query_embeddings), 4 * request.num_queries * dim
    if size != right_size:
        raise InvalidInputError(
            f"query_embeddings: {size} bytes, but {request.num_queries} float32 embeddings of checkpoint "
            f"{request.checkpoint_version} (dimension {dim}) are {right_size}"
        )
    return np.frombuffer(request.query_embeddings, dtype="<f4").reshape(request.num_queries, dim)  # [B, D]


def _feature_value(value: Any) -> feature_pb2.FeatureValue:
    """An attribute's value: moments and dates as Unix seconds, booleans as `true` and `false`, None as unset."""
    match value:
        case None:
            return feature_pb2.FeatureValue()
        case bool():
            return feature_pb2.FeatureValue(string_value="true" if value else "false")
        case str():
            return feature_pb2.FeatureValue(string_value=value)
        case list():
            return _list_value([entry for entry in value if entry is not None])
        case _:
            return feature_pb2.FeatureValue(number_value=_number(value))


def _list_value(entries: Sequence[Any]) -> feature_pb2.FeatureValue:
    if entries and not isinstance(entries[0], str):
        numbers = feature_pb2.NumberList(values=[_number(entry) for entry in entries])
        return feature_pb2.FeatureValue(number_list=numbers)
    return feature_pb2.FeatureValue(string_list=feature_pb2.StringList(values=entries))


def _number(value: int | float | Decimal | datetime | date) -> float:
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    if isinstance(value, date):
        return datetime(value.year, value.month, value.day, tzinfo=UTC).timestamp()
    return float(value)


def _status_message(status: VersionStatus) -> index_service_pb2.VersionStatus:
    message = index_service_pb2.VersionStatus(
        checkpoint_version=status.version,
        state=_STATES[status.state],
        reason=status.reason,
        is_corrupt=status.is_corrupt,
        progress=status.progress,
    )
    if status.loaded is not None:
        live, manifest = status.loaded.live, status.loaded.manifest
        message.catalogue_version = live.catalogue_version
        message.num_items = live.num_items
        message.num_quarantined = live.num_quarantined
        message.index_type = manifest.index_type
        message.size_bytes = live.size_bytes
        message.loaded_from_store = status.loaded.is_from_store
        message.golden_difference = manifest.golden_difference
        message.num_delta_items = live.num_delta_items
        message.num_tombstones = live.num_tombstones
        message.built_catalogue_version = live.built_catalogue_version
        message.search_settings.extend(
            index_service_pb2.SearchSetting(
                k=setting.k, parameters=setting.parameters, recall=setting.recall, latency_s=setting.latency_s
            )
            for setting in manifest.plan.settings
        )
        message.target_recall = manifest.goal.target_recall
        message.target_k = manifest.goal.target_k
        message.measured_with = manifest.measured_with
        message.item_similarity = manifest.item_similarity
        message.score_mean = manifest.score_mean
        message.score_deviation = manifest.score_deviation
    return message
