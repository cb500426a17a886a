"""Requests as they arrive: checked, and turned into raw features and encoded arrays.

Deliberately does not know which version answers, nor what the arrays are for.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

from retrieval.feature.v1 import feature_pb2, filter_pb2
from retrieval.query.v1 import query_service_pb2

from query_service.versions import Pin
from towers.errors import InvalidFeatureError, InvalidInputError
from towers.features import Arrays, RawValue

RawFeatures = Mapping[str, RawValue]
"""Feature name to raw value."""


@dataclass(frozen=True)
class Limits:
    """What a request may ask for."""

    max_k: int
    max_batch_size: int
    num_shards: int
    """Of the largest layout."""


@dataclass(frozen=True)
class Question:
    """What was asked, for B queries alike."""

    queries: Sequence[RawFeatures]
    k: int
    excluded_item_ids: Sequence[str]
    num_shards_needed: int
    """At least 1."""
    attribute_names: Sequence[str]
    filter: filter_pb2.Filter | None
    """Which items may be returned; None: all. The shards know what it means."""
    may_fall_back: bool = False
    """Whether something that no shard was asked for will do where no shard answers."""
    is_canary: bool = False
    """Whether the standby version is to answer, where it can."""
    num_requests: int = 1
    """That ask this together."""


class InvalidQueriesError(InvalidFeatureError):
    """Some queries of several cannot be embedded; the others can."""

    def __init__(self, failures: Mapping[int, InvalidFeatureError], num_queries: int) -> None:
        """Says what is wrong with the first.

        Args:
            failures: By position of the query.
            num_queries: Of all.
        """
        first = min(failures)
        super().__init__(failures[first].reason if num_queries == 1 else f"query {first}: {failures[first].reason}")
        self.failures = failures


def question_of(
    request: query_service_pb2.RetrieveRequest | query_service_pb2.BatchRetrieveRequest,
    queries: Sequence[query_service_pb2.Query],
    limits: Limits,
) -> Question:
    """Checks a request.

    Args:
        request: The request; its queries aside, both kinds ask for the same.
        queries: Its B queries.
        limits: What it may ask for.

    Raises:
        InvalidInputError: a field is out of its range; the message names it.
    """
    raw_features = features_of(queries, limits)
    if not 1 <= request.k <= limits.max_k:
        raise InvalidInputError(f"k must be from 1 to {limits.max_k}, got {request.k}")
    if not 0 <= request.min_shards <= limits.num_shards:
        raise InvalidInputError(f"min_shards must be from 0 to {limits.num_shards}, got {request.min_shards}")
    return Question(
        queries=raw_features,
        k=request.k,
        excluded_item_ids=request.excluded_item_ids,
        num_shards_needed=max(1, request.min_shards),
        attribute_names=request.attribute_names,
        filter=request.filter if request.HasField("filter") else None,
        may_fall_back=not request.min_shards,
    )


def kind_of(question: Question) -> Hashable:
    """What a question asks besides its queries: those of equal kinds can be answered together."""
    return (
        question.is_canary,
        question.may_fall_back,
        question.k,
        question.num_shards_needed,
        tuple(question.attribute_names),
        tuple(question.excluded_item_ids),
        question.filter and question.filter.SerializeToString(deterministic=True),
    )


def joined(questions: Sequence[Question]) -> Question:
    """One question that asks all queries of questions of equal kinds."""
    if len(questions) == 1:
        return questions[0]
    queries = [query for question in questions for query in question.queries]
    return replace(questions[0], queries=queries, num_requests=len(questions))


def features_of(queries: Sequence[query_service_pb2.Query], limits: Limits) -> list[RawFeatures]:
    """Raw features of B queries.

    Raises:
        InvalidInputError: no query, or too many.
    """
    if not 1 <= len(queries) <= limits.max_batch_size:
        raise InvalidInputError(f"queries must be from 1 to {limits.max_batch_size}, got {len(queries)}")
    return [{name: _raw_value(value) for name, value in query.features.items()} for query in queries]


def encode(queries: Sequence[RawFeatures], pin: Pin) -> Arrays:
    """Encodes queries for the tower of one version.

    A feature that only the other loaded version knows is left out, so that callers need not change at the moment of
    a swap.

    Args:
        queries: Raw features of B queries.
        pin: The version.

    Returns:
        Arrays of B rows.

    Raises:
        InvalidQueriesError: an unknown feature, a value of the wrong type or one that is not finite; the message names
            the feature and, of several queries, the query.
    """
    if pin.tolerated_features:
        queries = [
            {name: value for name, value in query.items() if name not in pin.tolerated_features} for query in queries
        ]
    encoder = pin.tower.encoder
    try:
        return encoder.encode_rows(queries)
    except InvalidFeatureError:
        failures = {}
        for position, query in enumerate(queries):
            try:
                encoder.encode_rows([query])
            except InvalidFeatureError as error:
                failures[position] = InvalidFeatureError(error.reason)
        if not failures:
            raise
        raise InvalidQueriesError(failures, len(queries)) from None


def _raw_value(value: feature_pb2.FeatureValue) -> RawValue:
    match value.WhichOneof("value"):
        case "string_value":
            return value.string_value
        case "number_value":
            return value.number_value
        case "string_list":
            return list(value.string_list.values)
        case "number_list":
            return list(value.number_list.values)
        case None:
            return None
