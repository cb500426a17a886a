"""What is asked, from plain Python: checked here as far as it can be without the schema.

Deliberately does not know how a call is made.
"""

import math
import numbers
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from retrieval.feature.v1 import feature_pb2
from retrieval.query.v1 import query_service_pb2

FeatureValue = str | float | bool | datetime | Sequence[str] | Sequence[float] | None
"""A raw value. None, an empty string and an empty list are missing; a time without a zone is UTC.

Arrays and scalars of numpy are taken as well.
"""

Features = Mapping[str, FeatureValue]
"""Feature name to raw value, as the live checkpoint's schema declares them. A feature left out is missing."""

_LARGEST_EXACT_INTEGER = 2**53


def retrieve_request(
    features: Features, k: int, excluded_item_ids: Sequence[str], min_shards: int, attribute_names: Sequence[str]
) -> query_service_pb2.RetrieveRequest:
    """Builds the request for one query.

    Raises:
        TypeError: a value of a type that no feature has, or one string where a list is meant; the message names it.
        ValueError: a number that is not finite, or an integer too large to be sent exactly.
    """
    return query_service_pb2.RetrieveRequest(
        query=_query(features), **_shared_fields(k, excluded_item_ids, min_shards, attribute_names)
    )


def batch_retrieve_request(
    queries: Sequence[Features],
    k: int,
    excluded_item_ids: Sequence[str],
    min_shards: int,
    attribute_names: Sequence[str],
) -> query_service_pb2.BatchRetrieveRequest:
    """Builds the request for many queries; raises as `retrieve_request`."""
    return query_service_pb2.BatchRetrieveRequest(
        queries=_queries(queries), **_shared_fields(k, excluded_item_ids, min_shards, attribute_names)
    )


def embed_request(queries: Sequence[Features]) -> query_service_pb2.EmbedRequest:
    """Builds the request for embeddings; raises as `retrieve_request`."""
    return query_service_pb2.EmbedRequest(queries=_queries(queries))


def _shared_fields(
    k: int, excluded_item_ids: Sequence[str], min_shards: int, attribute_names: Sequence[str]
) -> dict[str, Any]:
    return {
        "k": _int32("k", k),
        "excluded_item_ids": _strings("excluded_item_ids", excluded_item_ids),
        "min_shards": _int32("min_shards", min_shards),
        "attribute_names": _strings("attribute_names", attribute_names),
    }


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


def _value(name: str, value: Any) -> feature_pb2.FeatureValue:
    if not isinstance(name, str):
        raise TypeError(f"feature {name!r}: its name must be a string")
    if hasattr(value, "tolist"):
        value = value.tolist()
    if value is None:
        return feature_pb2.FeatureValue()
    if isinstance(value, str):
        return feature_pb2.FeatureValue(string_value=_encodable(name, value))
    if isinstance(value, bool):
        return feature_pb2.FeatureValue(string_value="true" if value else "false")
    if isinstance(value, datetime):
        moment = value if value.tzinfo else value.replace(tzinfo=UTC)
        return feature_pb2.FeatureValue(number_value=moment.timestamp())
    if isinstance(value, numbers.Real):
        return feature_pb2.FeatureValue(number_value=_number(name, value))
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return _list_value(name, value)
    raise TypeError(
        f"feature {name!r}: expected a string, a number, a list of strings or a list of numbers, "
        f"got {type(value).__name__}"
    )


def _list_value(name: str, values: Sequence[Any]) -> feature_pb2.FeatureValue:
    if all(isinstance(entry, str) for entry in values):
        strings = [_encodable(name, entry) for entry in values]
        return feature_pb2.FeatureValue(string_list=feature_pb2.StringList(values=strings))
    if all(isinstance(entry, numbers.Real) and not isinstance(entry, bool) for entry in values):
        floats = [_number(name, entry) for entry in values]
        return feature_pb2.FeatureValue(number_list=feature_pb2.NumberList(values=floats))
    types = sorted({type(entry).__name__ for entry in values})
    raise TypeError(f"feature {name!r}: a list holds only strings or only numbers, got {', '.join(types)}")


def _number(name: str, value: numbers.Real) -> float:
    if isinstance(value, numbers.Integral) and abs(int(value)) > _LARGEST_EXACT_INTEGER:
        raise ValueError(f"feature {name!r}: {value} is too large to be sent exactly; pass an id as a string")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"feature {name!r}: expected a finite number, got {number}")
    return number


def _encodable(name: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"feature {name!r}: {text[:40]!r} is not valid Unicode") from error
    return text


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
