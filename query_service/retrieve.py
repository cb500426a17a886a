"""One request from end to end: parse, pin the version, embed (through the cache), fan out, merge, reply.

Deliberately knows nothing of how any of these is done.
"""

from collections.abc import Sequence

from retrieval.feature.v1 import feature_pb2
from retrieval.query.v1 import query_service_pb2

from query_service.deadline import Deadline
from query_service.embed import Embedded, Embedder
from query_service.fan_out import Outcome, Search, Shards
from query_service.merge import Ranking, merge
from query_service.offload import Offload
from query_service.parse import Limits, Question, features_of, question_of
from query_service.versions import Pin, Versions


class Retriever:
    """Answers queries. A single query is a batch of one."""

    def __init__(
        self, versions: Versions, embedder: Embedder, shards: Shards, offload: Offload, limits: Limits
    ) -> None:
        self._versions = versions
        self._embedder = embedder
        self._shards = shards
        self._offload = offload
        self._limits = limits

    async def retrieve(
        self,
        request: query_service_pb2.RetrieveRequest | query_service_pb2.BatchRetrieveRequest,
        queries: Sequence[query_service_pb2.Query],
        deadline: Deadline,
    ) -> list[query_service_pb2.RetrieveResponse]:
        """Finds the best items of each query, all at one checkpoint version.

        Args:
            request: What is asked for all queries alike.
            queries: The B queries.
            deadline: When the answer must be there.

        Returns:
            B responses.

        Raises:
            InvalidInputError: the request is wrong; the message names the field or feature.
            NotReadyError: no version is loaded yet.
            TooFewShardsError: fewer shards answered than the request needs.
            DeadlineError: none of those that failed to answer had enough time.
        """
        deadline.require_time()
        question = question_of(request, queries, self._limits)
        pin = self._versions.pin()
        embedded, outcome = await self._search(question, pin, deadline)
        if outcome.lacks_version:
            # A shard follows a newer record than this replica.
            await self._versions.refresh(deadline)
            newer = self._versions.pin()
            if newer.place != pin.place:
                pin = newer
                embedded, outcome = await self._search(question, pin, deadline)
        outcome.require(question.num_shards_needed)
        num_queries, num_attributes = len(question.queries), len(question.attribute_names)
        rankings = await self._offload.run(num_queries, merge, outcome.hits, num_queries, question.k, num_attributes)
        return await self._offload.run(num_queries, _responses, question, pin, embedded, outcome, rankings)

    async def embed(
        self, queries: Sequence[query_service_pb2.Query], deadline: Deadline
    ) -> query_service_pb2.EmbedResponse:
        """Embeds queries, all at one checkpoint version.

        Raises:
            InvalidInputError: the request is wrong; the message names the field or feature.
            NotReadyError: no version is loaded yet.
        """
        deadline.require_time()
        raw_features = features_of(queries, self._limits)
        pin = self._versions.pin()
        embedded = await self._embedder.embed(raw_features, pin)
        return query_service_pb2.EmbedResponse(
            embeddings=embedded.embeddings.astype("<f4", copy=False).tobytes(),
            dim=pin.tower.dim,
            checkpoint_version=pin.version,
        )

    async def _search(self, question: Question, pin: Pin, deadline: Deadline) -> tuple[Embedded, Outcome]:
        embedded = await self._embedder.embed(question.queries, pin)
        deadline.require_time()
        search = Search(
            version=pin.version,
            embeddings=embedded.embeddings,
            k=question.k,
            excluded_item_ids=question.excluded_item_ids,
            attribute_names=question.attribute_names,
            filter=question.filter,
            num_shards=pin.num_shards,
        )
        return embedded, await self._shards.search(search, question.num_shards_needed, deadline)


def _responses(
    question: Question, pin: Pin, embedded: Embedded, outcome: Outcome, rankings: Sequence[Ranking]
) -> list[query_service_pb2.RetrieveResponse]:
    reasons = [failure.reason for failure in outcome.failures]
    return [
        query_service_pb2.RetrieveResponse(
            item_ids=ranking.item_ids,
            scores=ranking.scores.tolist(),
            attributes=[
                feature_pb2.AttributeColumn(name=name, values=values)
                for name, values in zip(question.attribute_names, ranking.attributes, strict=True)
            ],
            checkpoint_version=pin.version,
            shards_answered=len(outcome.hits),
            shards_total=outcome.num_shards,
            degraded_reasons=reasons,
            embedding_cached=is_cached,
        )
        for ranking, is_cached in zip(rankings, embedded.is_cached, strict=True)
    ]
