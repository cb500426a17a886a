"""One request from end to end: parse, pin the version, embed (through the cache), fan out, merge, reply.

Where no shard answers there may be something to fall back on. From the pin on, requests that ask alike go the way
together. Deliberately knows nothing of how any of these is done.
"""

import logging
import time
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from retrieval.feature.v1 import feature_pb2
from retrieval.query.v1 import query_service_pb2

from query_service.canary import is_canary
from query_service.deadline import Deadline
from query_service.embed import Embedded, Embedder
from query_service.fallback import Fallback
from query_service.fan_out import Outcome, Search, Shards
from query_service.merge import Ranking, merge
from query_service.micro_batch import MicroBatches
from query_service.offload import Offload
from query_service.parse import InvalidQueriesError, Limits, Question, features_of, joined, kind_of, question_of
from query_service.shadow import ItemIds, Shadow
from query_service.traffic import Tally, Traffic
from query_service.versions import Pin, Versions
from towers.errors import InvalidFeatureError, InvalidInputError, NotReadyError, TwoTowerError, VersionNotLoadedError

_CANARY_TIME_SHARE = 0.5
"""Of the time that is left: the rest is for the live version, should the standby version fail."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """What the shards found, all at one version and on one layout."""

    pin: Pin
    embedded: Embedded
    outcome: Outcome
    started_s: float
    """On the clock of `time.perf_counter`."""
    shortfall: TwoTowerError | None = None
    """Why it is none, but where the question may fall back on something else."""

    @property
    def seconds(self) -> float:
        """Since the version was asked."""
        return time.perf_counter() - self.started_s


Responses = Sequence[query_service_pb2.RetrieveResponse]


class Retriever:
    """Answers queries. A single query is a batch of one, or goes with others."""

    def __init__(
        self,
        versions: Versions,
        embedder: Embedder,
        shards: Shards,
        offload: Offload,
        traffic: Traffic,
        shadow: Shadow,
        fallback: Fallback,
        limits: Limits,
        max_micro_batch: int,
    ) -> None:
        self._versions = versions
        self._embedder = embedder
        self._shards = shards
        self._offload = offload
        self._traffic = traffic
        self._shadow = shadow
        self._fallback = fallback
        self._limits = limits
        self.micro_batches: MicroBatches[Question, Responses] = MicroBatches(self._respond_to_each, max_micro_batch)

    async def close(self) -> None:
        """Drops what is under way."""
        await self.micro_batches.close()

    async def retrieve(
        self,
        request: query_service_pb2.RetrieveRequest | query_service_pb2.BatchRetrieveRequest,
        queries: Sequence[query_service_pb2.Query],
        deadline: Deadline,
    ) -> Responses:
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
        if self._versions.standby and is_canary(question.queries, self._versions.canary_share):
            question = replace(question, is_canary=True)
        if len(queries) > 1:
            return await self._respond(question, deadline)
        return await self.micro_batches.ask(kind_of(question), question, deadline)

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

    async def _respond_to_each(
        self, questions: Sequence[Question], deadline: Deadline
    ) -> list[Responses | InvalidFeatureError]:
        """Answers requests for one query each that ask alike; a query that cannot be embedded fails alone."""
        try:
            responses = await self._respond(joined(questions), deadline)
        except InvalidQueriesError as error:
            others = [question for position, question in enumerate(questions) if position not in error.failures]
            answered = iter(await self._respond_to_each(others, deadline) if others else ())
            return [error.failures.get(position) or next(answered) for position in range(len(questions))]
        return [[response] for response in responses]

    async def _respond(self, question: Question, deadline: Deadline) -> Responses:
        tally = self._traffic.under(self._versions.deployment.revision)
        answer = await self._answer(question, tally, deadline)
        if answer.shortfall is not None:
            return self._fallen_back(question, answer, answer.shortfall)
        rankings, responses = await self._offload.run(len(question.queries), _concluded, question, answer)
        tally.count(answer.pin.place, answer.seconds, is_error=False, num_requests=question.num_requests)
        if answer.outcome.failures:
            self._fallback.counts.num_partial += len(responses)
        else:
            self._fallback.count(answer.pin.version, rankings)
            if self._fallback.keeps_answers:
                for key, response in zip(_keys(question, answer), responses, strict=True):
                    self._fallback.remember(key, response)
        self._let_standby_follow(question, answer, rankings)
        return responses

    def _fallen_back(self, question: Question, answer: Answer, shortfall: TwoTowerError) -> Responses:
        """Answers by what was said before, or by what is popular; raises the shortfall where neither is known."""
        reasons = [failure.reason for failure in answer.outcome.failures]
        # What is popular may not meet a filter, and has no attributes here.
        is_plain = question.filter is None and not question.attribute_names
        responses = []
        for key, is_cached in zip(_keys(question, answer), answer.embedded.is_cached, strict=True):
            response = self._fallback.earlier(key)
            if response is None and is_plain:
                response = self._fallback.popular(answer.pin.version, question.k, question.excluded_item_ids)
            if response is None:
                raise shortfall
            response.shards_answered = 0
            response.shards_total = answer.outcome.num_shards
            response.embedding_cached = is_cached
            response.degraded_reasons.extend(reasons)
            responses.append(response)
        return responses

    async def _answer(self, question: Question, tally: Tally, deadline: Deadline) -> Answer:
        """By the live version or, for the canary's share, by the standby version as a whole, where it can."""
        standby = self._versions.standby
        if standby is None or not (question.is_canary and self._versions.canary_share):
            return await self._live_answer(question, tally, deadline)
        started_s = time.perf_counter()
        try:
            return await self._standby_answer(question, deadline.share(_CANARY_TIME_SHARE))
        except Exception as error:  # Whatever it is, the live version may know the answer.
            seconds = time.perf_counter() - started_s
            # What the live version fails at too says nothing against the standby version.
            answer = await self._live_answer(question, tally, deadline)
            if answer.shortfall is not None:
                return answer
            if not tally.num_errors(standby):
                is_bug = not isinstance(error, TwoTowerError)
                _log.warning("version %d fails as a canary: %s", standby.version, error, exc_info=is_bug)
            tally.count(standby, seconds, is_error=True, num_requests=question.num_requests)
            return answer

    async def _live_answer(self, question: Question, tally: Tally, deadline: Deadline) -> Answer:
        pin, started_s = self._versions.pin(), time.perf_counter()
        try:
            answer = await self._ask(question, pin, deadline)
            if answer.outcome.lacks_version:
                # A shard follows a newer record than this replica.
                await self._versions.refresh(deadline)
                newer = self._versions.pin()
                if newer.place != pin.place:
                    pin = newer
                    answer = await self._ask(question, pin, deadline)
            shortfall = answer.outcome.shortfall(question.num_shards_needed)
            if shortfall is not None and not question.may_fall_back:
                raise shortfall
        except InvalidInputError:
            raise
        except Exception:
            seconds = time.perf_counter() - started_s
            tally.count(pin.place, seconds, is_error=True, num_requests=question.num_requests)
            raise
        if shortfall is not None:
            tally.count(pin.place, answer.seconds, is_error=True, num_requests=question.num_requests)
            return replace(answer, shortfall=shortfall)
        return answer

    async def _standby_answer(self, question: Question, deadline: Deadline) -> Answer:
        pin = self._versions.standby_pin
        if pin is None:
            raise NotReadyError("the standby version is not loaded here")
        answer = await self._ask(question, pin, deadline)
        if answer.outcome.lacks_version:
            raise VersionNotLoadedError("; ".join(failure.reason for failure in answer.outcome.failures))
        answer.outcome.require(question.num_shards_needed)
        return answer

    async def _ask(self, question: Question, pin: Pin, deadline: Deadline) -> Answer:
        started_s = time.perf_counter()
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
        outcome = await self._shards.search(search, question.num_shards_needed, deadline)
        return Answer(pin, embedded, outcome, started_s)

    def _let_standby_follow(self, question: Question, answer: Answer, rankings: Sequence[Ranking]) -> None:
        """Has the standby version answer too what belongs to the sample, once the live answer has left."""
        standby = self._versions.standby_pin
        if standby is None or standby.place == answer.pin.place or answer.outcome.failures:
            return
        num_queries = len(question.queries) // question.num_requests
        for first in range(0, len(question.queries), num_queries):
            if self._shadow.wants(num_queries):
                request = slice(first, first + num_queries)
                self._shadow.compare(
                    live=answer.pin.place,
                    standby=standby.place,
                    item_ids=[ranking.item_ids for ranking in rankings[request]],
                    live_s=answer.seconds,
                    ask=partial(
                        self._shadow_item_ids,
                        replace(question, queries=question.queries[request], num_requests=1, attribute_names=()),
                        standby,
                    ),
                )

    async def _shadow_item_ids(self, question: Question, standby: Pin, deadline: Deadline) -> ItemIds:
        answer = await self._ask(question, standby, deadline)
        if answer.outcome.lacks_version:
            raise VersionNotLoadedError(f"a shard does not hold version {standby.version}")
        answer.outcome.require(answer.outcome.num_shards)
        rankings = await self._offload.run(len(question.queries), _rankings, question, answer)
        return [ranking.item_ids for ranking in rankings]


def _concluded(question: Question, answer: Answer) -> tuple[list[Ranking], list[query_service_pb2.RetrieveResponse]]:
    rankings = _rankings(question, answer)
    return rankings, _responses(question, answer, rankings)


def _keys(question: Question, answer: Answer) -> Iterator[Hashable]:
    """For each query, all that its answer depends on but the catalogue."""
    shared = kind_of(question)
    return ((answer.pin.version, shared, embedding.tobytes()) for embedding in answer.embedded.embeddings)


def _rankings(question: Question, answer: Answer) -> list[Ranking]:
    return merge(answer.outcome.hits, len(question.queries), question.k, len(question.attribute_names))


def _responses(
    question: Question, answer: Answer, rankings: Sequence[Ranking]
) -> list[query_service_pb2.RetrieveResponse]:
    reasons = [failure.reason for failure in answer.outcome.failures]
    return [
        query_service_pb2.RetrieveResponse(
            item_ids=ranking.item_ids,
            scores=ranking.scores,
            attributes=[
                feature_pb2.AttributeColumn(name=name, values=values)
                for name, values in zip(question.attribute_names, ranking.attributes, strict=True)
            ],
            checkpoint_version=answer.pin.version,
            shards_answered=len(answer.outcome.hits),
            shards_total=answer.outcome.num_shards,
            degraded_reasons=reasons,
            embedding_cached=is_cached,
        )
        for ranking, is_cached in zip(rankings, answer.embedded.is_cached, strict=True)
    ]
