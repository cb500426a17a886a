"""What is asked, from plain Python: checked here as far as it can be without the schema.

Deliberately does not know how a call is made.
"""

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any

from retrieval.feature.v1 import feature_pb2, filter_pb2
from retrieval.query.v1 import query_service_pb2

from retrieval_client.filters import Filter
from retrieval_client.values import feature_value

FeatureValue = str | float | bool | datetime | date | Sequence[str] | Sequence[float] | None
"""A raw value. None, an empty string and an empty list are missing; a time without a zone, and a date, are UTC.

Arrays and scalars of numpy are taken as well.
"""

Features = Mapping[str, FeatureValue]
"""Feature name to raw value, as the live checkpoint's schema declares them. A feature left out is missing."""


@dataclass(frozen=True)
class StreamedQuery:
    """A query of a stream, with items that must not be returned for it alone."""

    features: Features
    excluded_item_ids: Sequence[str] = ()


def retrieve_request(
    features: Features,
    k: int,
    excluded_item_ids: Sequence[str],
    min_shards: int,
    attribute_names: Sequence[str],
    filter: Filter | None,  # noqa: A002
) -> query_service_pb2.RetrieveRequest:
    """Builds the request for one query.

    Raises:
        TypeError: a value of a type that no feature has, or one string where a list is meant; the message names it.
        ValueError: a number that is not finite, or an integer too large to be sent exactly.
    """
    return query_service_pb2.RetrieveRequest(
        query=_query(features), **_shared_fields(k, excluded_item_ids, min_shards, attribute_names, filter)
    )


def batch_retrieve_request(
    queries: Sequence[Features],
    k: int,
    excluded_item_ids: Sequence[str],
    min_shards: int,
    attribute_names: Sequence[str],
    filter: Filter | None,  # noqa: A002
) -> query_service_pb2.BatchRetrieveRequest:
    """Builds the request for many queries; raises as `retrieve_request`."""
    return query_service_pb2.BatchRetrieveRequest(
        queries=_queries(queries), **_shared_fields(k, excluded_item_ids, min_shards, attribute_names, filter)
    )


def stream_request(
    number: int,
    query: Features | StreamedQuery,
    k: int,
    excluded_item_ids: Sequence[str],
    min_shards: int,
    attribute_names: Sequence[str],
    filter: Filter | None,  # noqa: A002
) -> query_service_pb2.StreamRetrieveRequest:
    """Builds the request for one query of a stream; raises as `retrieve_request`, with the query's number."""
    if not isinstance(query, StreamedQuery):
        query = StreamedQuery(query)
    try:
        own = _strings("excluded_item_ids", query.excluded_item_ids)
        excluded = [*_strings("excluded_item_ids", excluded_item_ids), *own]
        retrieve = retrieve_request(query.features, k, excluded, min_shards, attribute_names, filter)
    except (TypeError, ValueError) as error:
        raise type(error)(f"query {number}: {error}") from error
    return query_service_pb2.StreamRetrieveRequest(retrieve=retrieve)


def explain_request(
    features: Features,
    item_id: str,
    k: int,
    excluded_item_ids: Sequence[str],
    filter: Filter | None,  # noqa: A002
    checkpoint_version: int | None,
) -> query_service_pb2.ExplainRequest:
    """Builds the question where an item stands; raises as `retrieve_request`."""
    [named] = _strings("item_id", [item_id])
    return query_service_pb2.ExplainRequest(
        query=_query(features),
        item_id=named,
        k=_int32("k", k),
        excluded_item_ids=_strings("excluded_item_ids", excluded_item_ids),
        filter=_filter_message(filter),
        checkpoint_version=checkpoint_version or 0,
    )


def embed_request(queries: Sequence[Features]) -> query_service_pb2.EmbedRequest:
    """Builds the request for embeddings; raises as `retrieve_request`."""
    return query_service_pb2.EmbedRequest(queries=_queries(queries))


def _shared_fields(
    k: int,
    excluded_item_ids: Sequence[str],
    min_shards: int,
    attribute_names: Sequence[str],
    filter: Filter | None,  # noqa: A002
) -> dict[str, Any]:
    return {
        "k": _int32("k", k),
        "excluded_item_ids": _strings("excluded_item_ids", excluded_item_ids),
        "min_shards": _int32("min_shards", min_shards),
        "attribute_names": _strings("attribute_names", attribute_names),
        "filter": _filter_message(filter),
    }


def _filter_message(filter: Filter | None) -> filter_pb2.Filter | None:  # noqa: A002
    if filter is not None and not isinstance(filter, Filter):
        got = type(filter).__name__
        raise TypeError(f"filter: expected a Filter, for example attribute('year').exists(), got {got}")
    return None if filter is None else filter.message


def _queries(queries: Sequence[Features]) -> list[query_service_pb2.Query]:
    if isinstance(queries, Mapping):
        raise TypeError("queries: expected a list of feature mappings, got one mapping")
    built = []
    for position, features in enumerate(queries):
        try:
            built.append(_query(features))
        except (TypeError, ValueError) as error:
            raise type(error)(f"query {position}: {error}") from error
    return built


def _query(features: Features) -> query_service_pb2.Query:
    if not isinstance(features, Mapping):
        raise TypeError(f"expected a mapping from feature name to value, got {type(features).__name__}")
    return query_service_pb2.Query(features={name: _value(name, value) for name, value in features.items()})


def _value(name: str, value: FeatureValue) -> feature_pb2.FeatureValue:
    if not isinstance(name, str):
        raise TypeError(f"feature {name!r}: its name must be a string")
    return feature_value(f"feature {name!r}", value)


def _strings(name: str, values: Sequence[str]) -> list[str]:
    if isinstance(values, str):
        raise TypeError(f"{name}: expected a list of strings, got the string {values[:40]!r}")
    strings = list(values)
    for value in strings:
        if not isinstance(value, str):
            raise TypeError(f"{name}: expected strings, got {type(value).__name__} {value!r}")
    return strings


def _int32(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if not -(2**31) <= value < 2**31:
        raise ValueError(f"{name}: {value} is out of range")
    return int(value)
