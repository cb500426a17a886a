"""Why an item is, or is not, among the best for a query: its exact score and rank, and what stands in its way.

Deliberately does not know how shards rank. All parts are of one pinned version, or there is no explanation.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto

import numpy as np
from numpy.typing import NDArray
from retrieval.index.v1 import index_service_pb2
from retrieval.query.v1 import query_service_pb2

from query_service.deadline import Deadline
from query_service.embed import Embedder
from query_service.fan_out import Search, Shards
from query_service.merge import Ranking, merge
from query_service.parse import Limits, Question, RawFeatures, question_of
from query_service.versions import Pin, Versions
from towers.errors import InvalidFeatureError, InvalidInputError, VersionNotLoadedError
from towers.placement import shard_of

DEFAULT_K = 10


class Finding(Enum):
    """What became of the item; the names are those of the protocol."""

    RETURNED = auto()
    BELOW_K = auto()
    MISSED_BY_INDEX = auto()
    FILTERED_OUT = auto()
    EXCLUDED = auto()
    QUARANTINED = auto()
    UNKNOWN_ITEM = auto()


@dataclass(frozen=True)
class Explanation:
    """Of one item for one query."""

    finding: Finding
    reason: str
    pin: Pin
    shard: int
    catalogue_version: str
    """Of that shard."""
    last_score: float | None
    """Of the last item that is returned; None where there is none."""
    score: float | None = None
    """None where the item has no embedding; so are those below."""
    exact_rank: int | None = None
    num_counted: int | None = None
    """Items that may be returned, of all shards."""
    is_found: bool | None = None
    """Whether the index finds the item when asked for as many as its rank; None where that cannot be asked."""
    contributions: Sequence[tuple[str, float | None]] = ()


class Explainer:
    """Explains answers of the live version, and of the one that stands by."""

    def __init__(self, versions: Versions, embedder: Embedder, shards: Shards, limits: Limits) -> None:
        self._versions = versions
        self._embedder = embedder
        self._shards = shards
        self._limits = limits

    async def explain(self, request: query_service_pb2.ExplainRequest, deadline: Deadline) -> Explanation:
        """Explains where one item stands.

        Raises:
            InvalidInputError: the request is wrong; the message names the field or feature.
            NotReadyError: no version is loaded yet.
            VersionNotLoadedError: the version asked for is neither live nor standing by.
            TooFewShardsError: a shard did not answer.
            DeadlineError: there was not enough time.
        """
        deadline.require_time()
        if not request.item_id:
            raise InvalidInputError("item_id is empty; name the item")
        retrieve = query_service_pb2.RetrieveRequest(
            k=request.k or DEFAULT_K,
            excluded_item_ids=request.excluded_item_ids,
            filter=request.filter if request.HasField("filter") else None,
        )
        question = question_of(retrieve, [request.query], self._limits)
        pin = self._pin(request.checkpoint_version)
        try:
            return await self._explain(question, request.item_id, pin, deadline)
        except VersionNotLoadedError:
            # A shard follows a newer record than this replica.
            await self._versions.refresh(deadline)
            newer = self._pin(request.checkpoint_version)
            if newer.place == pin.place:
                raise
            return await self._explain(question, request.item_id, newer, deadline)

    def _pin(self, version: int) -> Pin:
        live, standby = self._versions.pin(), self._versions.standby_pin
        if version in (0, live.version):
            return live
        if standby is not None and version == standby.version:
            return standby
        raise VersionNotLoadedError(
            f"checkpoint_version {version} is not loaded; {live.version} is live, "
            f"{standby.version if standby else 'none'} stands by"
        )

    async def _explain(self, question: Question, item_id: str, pin: Pin, deadline: Deadline) -> Explanation:
        [features] = question.queries
        embedding = (await self._embedder.embed([features], pin)).embeddings  # [1, D]
        names = sorted(features)
        without = [await self._embedding_without(features, name, pin) for name in names]
        home = shard_of(item_id, pin.num_shards)
        rank = index_service_pb2.RankItemRequest(
            checkpoint_version=pin.version,
            item_id=item_id,
            excluded_item_ids=question.excluded_item_ids,
            filter=question.filter,
            num_shards=pin.num_shards,
        )
        known = [embedding, *(one for one in without if one is not None)]
        held = await self._shards.rank_item(_request(rank, home, np.concatenate(known)), deadline)
        ranking = await self._ranking(question, embedding, pin, question.k, deadline)
        last_score = float(ranking.scores[-1]) if len(ranking.scores) else None
        place = Explanation(Finding.UNKNOWN_ITEM, "", pin, home, held.catalogue_version, last_score)
        if held.state == index_service_pb2.ITEM_STATE_QUARANTINED:
            reason = f"it has no embedding at checkpoint {pin.version}: {held.quarantine_reason}"
            return replace(place, finding=Finding.QUARANTINED, reason=reason)
        if held.state != index_service_pb2.ITEM_STATE_HELD:
            reason = (
                f"it is not in the catalogue at version {held.catalogue_version}; its shard would be {home} of "
                f"{pin.num_shards}"
            )
            return replace(place, reason=reason)
        scores = np.frombuffer(held.scores, dtype="<f4")  # [1 + features that can be left out]
        elsewhere = await asyncio.gather(
            *(
                self._shards.rank_item(_request(rank, shard, embedding, float(scores[0])), deadline)
                for shard in range(pin.num_shards)
                if shard != home
            )
        )
        exact_rank = 1 + held.num_better + sum(other.num_better for other in elsewhere)
        is_returned = item_id in ranking.item_ids
        may_be_returned = held.meets_filter and item_id not in question.excluded_item_ids
        is_found: bool | None = is_returned or None
        if may_be_returned and not is_returned and exact_rank <= self._limits.max_k:
            as_far = await self._ranking(question, embedding, pin, max(question.k, exact_rank), deadline)
            is_found = item_id in as_far.item_ids
        without_scores = iter(scores[1:].tolist())
        explanation = replace(
            place,
            score=float(scores[0]),
            exact_rank=exact_rank,
            num_counted=held.num_counted + sum(other.num_counted for other in elsewhere),
            is_found=is_found,
            contributions=[
                (name, None if one is None else float(scores[0]) - next(without_scores))
                for name, one in zip(names, without, strict=True)
            ],
        )
        finding, reason = _verdict(explanation, question, item_id, held.meets_filter, is_returned)
        return replace(explanation, finding=finding, reason=reason)

    async def _embedding_without(self, features: RawFeatures, name: str, pin: Pin) -> NDArray[np.float32] | None:
        """`[1, D]` of the query without one feature; None where there is no finite one."""
        rest = {other: value for other, value in features.items() if other != name}
        try:
            return (await self._embedder.embed([rest], pin)).embeddings
        except InvalidFeatureError:
            return None

    async def _ranking(
        self, question: Question, embedding: NDArray[np.float32], pin: Pin, k: int, deadline: Deadline
    ) -> Ranking:
        """What `Retrieve` returns."""
        search = Search(
            version=pin.version,
            embeddings=embedding,
            k=k,
            excluded_item_ids=question.excluded_item_ids,
            attribute_names=(),
            filter=question.filter,
            num_shards=pin.num_shards,
        )
        outcome = await self._shards.search(search, pin.num_shards, deadline)
        if outcome.lacks_version:
            raise VersionNotLoadedError("; ".join(failure.reason for failure in outcome.failures))
        outcome.require(pin.num_shards)
        [ranking] = merge(outcome.hits, 1, k, 0)
        return ranking


def _request(
    rank: index_service_pb2.RankItemRequest, shard: int, embeddings: NDArray[np.float32], score: float | None = None
) -> index_service_pb2.RankItemRequest:
    request = index_service_pb2.RankItemRequest(
        shard=shard,
        query_embeddings=embeddings.astype("<f4", copy=False).tobytes(),
        num_queries=len(embeddings),
        score=score,
    )
    request.MergeFrom(rank)
    return request


def _verdict(
    explanation: Explanation, question: Question, item_id: str, meets_filter: bool, is_returned: bool
) -> tuple[Finding, str]:
    rank, k = explanation.exact_rank, question.k
    assert rank is not None
    if item_id in question.excluded_item_ids:
        return Finding.EXCLUDED, f"it is one of excluded_item_ids; without them its rank would be about {rank}"
    if not meets_filter:
        return Finding.FILTERED_OUT, f"it does not meet the filter; otherwise its rank would be {rank}"
    if is_returned:
        return Finding.RETURNED, f"it is among the {k} best: its exact rank is {rank}"
    if rank > k:
        return Finding.BELOW_K, f"its exact rank is {rank}, and {k} items were asked for"
    return Finding.MISSED_BY_INDEX, f"its exact rank is {rank} of the {k} asked for, but the index does not find it"
