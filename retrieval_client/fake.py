"""A query service for the tests of those who use the client: real gRPC, a few items in memory, no towers and no shards.

Deliberately does not retrieve by meaning: the items are ranked as the test says. All else is as in the real service:
k, exclusions, filters, attributes, errors, streams.
"""

import hashlib
import math
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
from retrieval.feature.v1 import feature_pb2, filter_pb2
from retrieval.query.v1 import query_service_pb2, query_service_pb2_grpc

from retrieval_client.answers import AttributeValue, attribute_value
from retrieval_client.values import feature_value

Rank = Callable[[Mapping[str, AttributeValue]], Sequence[str]]
"""From the features of a query to item ids, best first; items that are left out come last."""

_Answer = TypeVar("_Answer")
_DIM = 8
_MAX_K = 1000
_NUM_THREADS = 8


@dataclass(frozen=True)
class FakeItem:
    """An item of the catalogue."""

    item_id: str
    attributes: Mapping[str, Any] = field(default_factory=dict)
    """Strings, numbers, booleans, moments, and lists of strings or numbers."""


class _InvalidError(Exception):
    """The caller's fault."""


class FakeQueryService(query_service_pb2_grpc.QueryServiceServicer):
    """Listens on a free port of this machine while a `with` block runs.

    with FakeQueryService([FakeItem("50", {"title": "Star Wars"})]) as fake, RetrievalClient(fake.address) as client:
        assert client.retrieve({"user_id": "42"}).items[0].attributes["title"] == "Star Wars"
    """

    def __init__(self, items: Iterable[FakeItem], features: Sequence[str] | None = None) -> None:
        """Nothing listens yet.

        Args:
            items: The catalogue, best first.
            features: Names of the features that a query may have; None: any.

        Raises:
            TypeError: an attribute that no catalogue holds.
        """
        self.checkpoint_version = 1
        """What answers say; change it as a promotion does."""
        self.rank: Rank = lambda _: ()
        """How items are ranked; at first as they were given, whatever the query."""
        self.delay_s = 0.0
        """How long each answer takes."""
        self.queries: list[Mapping[str, AttributeValue]] = []
        """Features of all queries so far."""
        self.address = ""
        """`host:port`."""
        self._items = {item.item_id: _columns(item) for item in items}
        self._features = features
        self._failures: list[tuple[grpc.StatusCode, str]] = []

    def fail(self, code: str, message: str = "told to fail", times: int = 1) -> None:
        """Makes the next calls fail; a client tries some again, see `RetrievalClient`.

        Args:
            code: Name of a gRPC status: "UNAVAILABLE".
            message: What is wrong, in words.
            times: How many calls.
        """
        self._failures += [(grpc.StatusCode[code], message)] * times

    def __enter__(self) -> Self:
        self._server = grpc.server(ThreadPoolExecutor(_NUM_THREADS), options=(("grpc.so_reuseport", 0),))
        query_service_pb2_grpc.add_QueryServiceServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.stop(None).wait()

    def Retrieve(  # noqa: N802
        self, request: query_service_pb2.RetrieveRequest, context: grpc.ServicerContext
    ) -> query_service_pb2.RetrieveResponse:
        """Returns the k best items for one query."""
        return self._answer(context, lambda: self._retrieved(request, request.query))

    def BatchRetrieve(  # noqa: N802
        self, request: query_service_pb2.BatchRetrieveRequest, context: grpc.ServicerContext
    ) -> query_service_pb2.BatchRetrieveResponse:
        """Returns the k best items for each of many queries."""

        def answer() -> query_service_pb2.BatchRetrieveResponse:
            results = [self._retrieved(request, query) for query in request.queries]
            return query_service_pb2.BatchRetrieveResponse(results=results)

        return self._answer(context, answer)

    def StreamRetrieve(  # noqa: N802
        self, requests: Iterator[query_service_pb2.StreamRetrieveRequest], context: grpc.ServicerContext
    ) -> Iterator[query_service_pb2.StreamRetrieveResponse]:
        """Returns the k best items for each query of a stream."""
        for index, request in enumerate(requests):
            self._answer(context, lambda: None)
            try:
                retrieved = self._retrieved(request.retrieve, request.retrieve.query)
            except _InvalidError as error:
                code: int = grpc.StatusCode.INVALID_ARGUMENT.value[0]
                failure = query_service_pb2.QueryError(code=code, message=str(error))
                yield query_service_pb2.StreamRetrieveResponse(index=index, error=failure)
            else:
                yield query_service_pb2.StreamRetrieveResponse(index=index, retrieved=retrieved)

    def Explain(  # noqa: N802
        self, request: query_service_pb2.ExplainRequest, context: grpc.ServicerContext
    ) -> query_service_pb2.ExplainResponse:
        """Returns why an item is, or is not, among the best: all but quarantine and a miss of the index."""
        return self._answer(context, lambda: self._explained(request))

    def Embed(  # noqa: N802
        self, request: query_service_pb2.EmbedRequest, context: grpc.ServicerContext
    ) -> query_service_pb2.EmbedResponse:
        """Returns unit vectors of 8 dimensions: the same for the same features, and otherwise without a meaning."""

        def answer() -> query_service_pb2.EmbedResponse:
            vectors = [_vector(self._asked(query), self.checkpoint_version) for query in request.queries]
            return query_service_pb2.EmbedResponse(
                embeddings=b"".join(vectors), dim=_DIM, checkpoint_version=self.checkpoint_version
            )

        return self._answer(context, answer)

    def GetStatus(  # noqa: N802
        self,
        request: query_service_pb2.GetStatusRequest,  # noqa: ARG002
        context: grpc.ServicerContext,
    ) -> query_service_pb2.GetStatusResponse:
        """Returns the version, and the features where they are known."""
        features = [query_service_pb2.QueryFeature(name=name, kind="categorical") for name in self._features or ()]
        status = query_service_pb2.GetStatusResponse(
            deployment_revision=1, live_version=self.checkpoint_version, features=features
        )
        return self._answer(context, lambda: status)

    def _answer(self, context: grpc.ServicerContext, answer: Callable[[], _Answer]) -> _Answer:
        time.sleep(self.delay_s)
        if self._failures:
            context.abort(*self._failures.pop(0))
        try:
            return answer()
        except _InvalidError as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))

    def _asked(self, query: query_service_pb2.Query) -> Mapping[str, AttributeValue]:
        features = {name: attribute_value(value) for name, value in query.features.items()}
        self.queries.append(features)
        for name in features:
            if self._features is not None and name not in self._features:
                raise _InvalidError(f"feature {name!r} is not in the schema; known: {sorted(self._features)}")
        return features

    def _ranked(self, features: Mapping[str, AttributeValue]) -> dict[str, float]:
        """All items with their scores, best first."""
        first = [item_id for item_id in self.rank(features) if item_id in self._items]
        ranked = list(dict.fromkeys((*first, *self._items)))
        return {item_id: 1.0 - place / len(ranked) for place, item_id in enumerate(ranked)}

    def _retrieved(
        self,
        request: query_service_pb2.RetrieveRequest | query_service_pb2.BatchRetrieveRequest,
        query: query_service_pb2.Query,
    ) -> query_service_pb2.RetrieveResponse:
        features = self._asked(query)
        if not 1 <= request.k <= _MAX_K:
            raise _InvalidError(f"k must be from 1 to {_MAX_K}, got {request.k}")
        known = {name for columns in self._items.values() for name in columns}
        for name in request.attribute_names:
            if name not in known:
                raise _InvalidError(f"attribute_names: unknown attribute {name!r}; known: {sorted(known)}")
        best = [
            (item_id, score)
            for item_id, score in self._ranked(features).items()
            if item_id not in request.excluded_item_ids
            and (not request.HasField("filter") or _meets(request.filter, self._items[item_id]))
        ][: request.k]
        return query_service_pb2.RetrieveResponse(
            item_ids=[item_id for item_id, _ in best],
            scores=[score for _, score in best],
            attributes=[
                feature_pb2.AttributeColumn(
                    name=name,
                    values=[self._items[item_id].get(name, feature_pb2.FeatureValue()) for item_id, _ in best],
                )
                for name in request.attribute_names
            ],
            checkpoint_version=self.checkpoint_version,
            shards_answered=1,
            shards_total=1,
        )

    def _explained(self, request: query_service_pb2.ExplainRequest) -> query_service_pb2.ExplainResponse:
        everything = query_service_pb2.RetrieveRequest(
            k=_MAX_K, excluded_item_ids=request.excluded_item_ids, filter=request.filter
        )
        if not request.HasField("filter"):
            everything.ClearField("filter")
        allowed = self._retrieved(everything, request.query)
        k, scores = request.k or 10, self._ranked(self.queries[-1])
        explained = query_service_pb2.ExplainResponse(num_shards=1, checkpoint_version=self.checkpoint_version)
        if allowed.item_ids:
            explained.last_score = allowed.scores[:k][-1]
        if request.item_id not in scores:
            explained.finding = query_service_pb2.FINDING_UNKNOWN_ITEM
            explained.reason = "it is not in the catalogue"
            return explained
        score = scores[request.item_id]
        rank = 1 + sum(scores[other] > score for other in allowed.item_ids)
        if request.item_id in request.excluded_item_ids:
            explained.finding, explained.reason = query_service_pb2.FINDING_EXCLUDED, "it is one of excluded_item_ids"
        elif request.item_id not in allowed.item_ids:
            explained.finding, explained.reason = query_service_pb2.FINDING_FILTERED_OUT, "it does not meet the filter"
        else:
            is_below = rank > k
            explained.finding = query_service_pb2.FINDING_BELOW_K if is_below else query_service_pb2.FINDING_RETURNED
            explained.reason = f"its exact rank is {rank}, and {k} items were asked for"
            explained.found_by_index = True
        explained.score, explained.exact_rank, explained.num_items = score, rank, len(allowed.item_ids)
        return explained


def _columns(item: FakeItem) -> dict[str, feature_pb2.FeatureValue]:
    return {
        name: feature_value(f"item {item.item_id!r}: attribute {name!r}", value)
        for name, value in item.attributes.items()
    }


def _meets(condition: filter_pb2.Filter, columns: Mapping[str, feature_pb2.FeatureValue]) -> bool:
    """The rules of `filter.proto`."""

    def entries(name: str) -> tuple[Any, ...]:
        return _entries(columns[name]) if name in columns else ()

    match condition.WhichOneof("condition"):
        case "equals":
            return _entries(condition.equals.value)[0] in entries(condition.equals.attribute)
        case "one_of":
            return bool(set(_entries(condition.one_of.values)) & set(entries(condition.one_of.attribute)))
        case "none_of":
            own = set(entries(condition.none_of.attribute))
            return bool(own) and not own & set(_entries(condition.none_of.values))
        case "range":
            bounds = condition.range
            return any(
                not (bounds.HasField("at_least") and entry < bounds.at_least)
                and not (bounds.HasField("greater_than") and entry <= bounds.greater_than)
                and not (bounds.HasField("at_most") and entry > bounds.at_most)
                and not (bounds.HasField("less_than") and entry >= bounds.less_than)
                for entry in entries(bounds.attribute)
            )
        case "exists":
            return bool(entries(condition.exists.attribute))
        case "all_met":
            return all(_meets(part, columns) for part in condition.all_met.filters)
        case "any_met":
            return any(_meets(part, columns) for part in condition.any_met.filters)
        case "not_met":
            return not _meets(condition.not_met, columns)
        case None:
            raise _InvalidError("filter: no condition is set")


def _entries(value: feature_pb2.FeatureValue) -> tuple[Any, ...]:
    plain = attribute_value(value)
    if plain is None:
        return ()
    return plain if isinstance(plain, tuple) else (plain,)


def _vector(features: Mapping[str, AttributeValue], version: int) -> bytes:
    digest = hashlib.blake2b(repr((version, sorted(features.items()))).encode(), digest_size=_DIM).digest()
    numbers = [byte - 127.5 for byte in digest]
    length = math.hypot(*numbers)
    return struct.pack(f"<{_DIM}f", *(number / length for number in numbers))
