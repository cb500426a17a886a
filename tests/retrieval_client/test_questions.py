"""Python values as requests, and what cannot be one."""

import array
import math
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from retrieval.feature.v1 import feature_pb2

from retrieval_client import attribute
from retrieval_client.questions import batch_retrieve_request, embed_request, retrieve_request

Value = feature_pb2.FeatureValue


def strings(*values: str) -> Value:
    return Value(string_list=feature_pb2.StringList(values=values))


def floats(*values: float) -> Value:
    return Value(number_list=feature_pb2.NumberList(values=values))


def value_sent(value: Any) -> Value:
    return retrieve_request({"f": value}, 1, (), 0, (), None).query.features["f"]


@pytest.mark.parametrize(
    ("value", "sent"),
    [
        (None, Value()),
        ("", Value(string_value="")),
        ("42", Value(string_value="42")),
        ("naïve 漢\0", Value(string_value="naïve 漢\0")),
        (42, Value(number_value=42.0)),
        (-(2**53), Value(number_value=-(2.0**53))),
        (2.5, Value(number_value=2.5)),
        (True, Value(string_value="true")),
        (False, Value(string_value="false")),
        (datetime(2024, 1, 1), Value(number_value=1704067200.0)),
        (datetime(2024, 1, 1, tzinfo=UTC), Value(number_value=1704067200.0)),
        (datetime(2024, 1, 1, 2, tzinfo=timezone(timedelta(hours=2))), Value(number_value=1704067200.0)),
        ([], strings()),
        (["50", "181"], strings("50", "181")),
        (("50",), strings("50")),
        ([50, 181.0], floats(50.0, 181.0)),
        (range(3), floats(0.0, 1.0, 2.0)),
        (array.array("d", [0.5]), floats(0.5)),
        (np.float32(0.5), Value(number_value=0.5)),
        (np.int64(7), Value(number_value=7.0)),
        (np.str_("a"), Value(string_value="a")),
        (np.array([0.5, 0.25], dtype=np.float32), floats(0.5, 0.25)),
        (np.array(["a", "b"]), strings("a", "b")),
    ],
)
def test_a_value_is_sent_as_it_is(value: Any, sent: Value) -> None:
    assert value_sent(value) == sent


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (b"bytes", TypeError),
        (object(), TypeError),
        (Decimal("1.5"), TypeError),
        ({"a": 1}, TypeError),
        ({"a"}, TypeError),
        (1j, TypeError),
        (["a", 1], TypeError),
        ([1, None], TypeError),
        ([True], TypeError),
        ([["a"]], TypeError),
        (np.zeros((2, 2)), TypeError),
        (math.nan, ValueError),
        (math.inf, ValueError),
        ([1.0, -math.inf], ValueError),
        (2**53 + 1, ValueError),
        ([2**60], ValueError),
        ("\ud800", ValueError),
        (["\ud800"], ValueError),
    ],
)
def test_what_cannot_be_a_feature_is_refused_by_name(value: Any, problem: type[Exception]) -> None:
    with pytest.raises(problem, match="feature 'age': "):
        retrieve_request({"age": value}, 1, (), 0, (), None)
    with pytest.raises(problem, match="query 1: feature 'age': "):
        batch_retrieve_request([{}, {"age": value}], 1, (), 0, (), None)
    with pytest.raises(problem, match="query 1: feature 'age': "):
        embed_request([{}, {"age": value}])


@pytest.mark.parametrize(
    ("fields", "problem", "told"),
    [
        ({"features": [("a", 1)]}, TypeError, "expected a mapping"),
        ({"features": {1: "a"}}, TypeError, "feature 1: its name must be a string"),
        ({"k": 2.0}, TypeError, "k: expected an integer"),
        ({"k": True}, TypeError, "k: expected an integer"),
        ({"k": 2**31}, ValueError, "k: 2147483648 is out of range"),
        ({"min_shards": "2"}, TypeError, "min_shards: expected an integer"),
        ({"excluded_item_ids": "50"}, TypeError, "excluded_item_ids: expected a list of strings, got the string '50'"),
        ({"excluded_item_ids": [50]}, TypeError, "excluded_item_ids: expected strings, got int 50"),
        ({"filter": "year>=1990"}, TypeError, "filter: expected a Filter, for example .*, got str"),
        ({"attribute_names": "title"}, TypeError, "attribute_names: expected a list of strings"),
    ],
)
def test_wrong_fields_are_refused_by_name(fields: Mapping[str, Any], problem: type[Exception], told: str) -> None:
    right = {"features": {}, "k": 1, "excluded_item_ids": (), "min_shards": 0, "attribute_names": (), "filter": None}
    with pytest.raises(problem, match=told):
        retrieve_request(**{**right, **fields})


def test_one_mapping_is_no_batch() -> None:
    with pytest.raises(TypeError, match="queries: expected a list of feature mappings, got one mapping"):
        embed_request({"user_id": "1"})  # type: ignore[arg-type]


def test_all_fields_are_sent() -> None:
    request = retrieve_request(
        {"user_id": "1", "age": 3}, np.int32(5), ["a", "b"], 2, ("title",), attribute("year").exists()
    )
    assert set(request.query.features) == {"user_id", "age"}
    assert (request.k, request.min_shards) == (5, 2)
    assert (list(request.excluded_item_ids), list(request.attribute_names)) == (["a", "b"], ["title"])
    assert request.filter == attribute("year").exists().message
    batch = batch_retrieve_request([{"user_id": "1"}, {}], 5, ["a"], 1, ["title"], None)
    assert [set(query.features) for query in batch.queries] == [{"user_id"}, set()]
    assert (batch.k, batch.min_shards) == (5, 1)
    assert (list(batch.excluded_item_ids), list(batch.attribute_names)) == (["a"], ["title"])
    assert not batch.HasField("filter")
