"""Digests: the same embedding's input, the same digest, in every batch; another input, another digest."""

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from query_service.digest import digests_of
from towers.features import FeatureEncoder
from towers.schema import parse_schema

KEY = b"tower"
SCHEMA = parse_schema(
    [
        {"name": "user", "owner": "query", "kind": "categorical"},
        {"name": "tags", "owner": "query", "kind": "categorical_list", "hash_buckets": 50, "max_length": 5},
        {"name": "history", "owner": "query", "kind": "sequence", "items": "item", "max_length": 4},
        {"name": "age", "owner": "query", "kind": "number"},
        {"name": "income", "owner": "query", "kind": "number", "scaling": "quantile"},
        {"name": "seen", "owner": "query", "kind": "timestamp"},
        {"name": "text", "owner": "query", "kind": "text", "hash_buckets": 100, "max_length": 8},
        {"name": "image", "owner": "query", "kind": "vector", "size": 3},
        {"name": "item", "owner": "item", "kind": "categorical"},
    ]
)
ENCODER = FeatureEncoder(SCHEMA, "query", {"user": list("abc"), "item": list("wxyz")})

tokens = st.text("abcwxyz", max_size=2)
numbers = st.floats(-1e6, 1e6, width=32)
rows = st.fixed_dictionaries(
    {},
    optional={
        "user": tokens,
        "tags": st.lists(tokens, max_size=7),
        "history": st.lists(tokens, max_size=7),
        "age": numbers,
        "income": numbers,
        "seen": numbers,
        "text": st.text("ab ", max_size=9),
        "image": st.lists(numbers, min_size=3, max_size=3),
    },
)


def digest_alone(row: dict[str, Any], key: bytes = KEY) -> bytes:
    [digest] = digests_of(ENCODER.encode_rows([row]), key)
    return digest


@given(st.lists(rows, min_size=1, max_size=6))
@settings(max_examples=100, deadline=None)
def test_a_row_has_the_same_digest_in_every_batch(batch: list[dict[str, Any]]) -> None:
    assert digests_of(ENCODER.encode_rows(batch), KEY) == [digest_alone(row) for row in batch]


@given(rows, rows)
@settings(max_examples=100, deadline=None)
def test_digests_are_equal_exactly_when_the_encoded_rows_are(first: dict[str, Any], second: dict[str, Any]) -> None:
    together = ENCODER.encode_rows([first, second])
    # By bits, as the tower may tell 0.0 from -0.0.
    is_equal = all(array[0].tobytes() == array[1].tobytes() for array in together.values())
    assert (digest_alone(first) == digest_alone(second)) == is_equal


def test_values_do_not_move_from_one_feature_to_the_next() -> None:
    one = {"a": np.array([[1, 2]]), "b": np.array([[3, 0]])}
    other = {"a": np.array([[1, 0]]), "b": np.array([[2, 3]])}
    assert digests_of(one, KEY) != digests_of(other, KEY)


def test_names_and_types_count() -> None:
    values = np.array([[1, 2]])
    digests = [digests_of(arrays, KEY) for arrays in ({"a": values}, {"b": values}, {"a": values.view(np.float64)})]
    assert len({digest for [digest] in digests}) == 3


def test_zeros_inside_a_vector_are_no_padding() -> None:
    assert digest_alone({"image": [1.0, 0.0, 0.0]}) != digest_alone({"image": [0.0, 0.0, 1.0]})
    short, long = {"v": np.zeros((1, 2), np.float32)}, {"v": np.zeros((1, 3), np.float32)}
    assert digests_of(short, KEY) != digests_of(long, KEY)


def test_towers_do_not_share_digests() -> None:
    assert digest_alone({"user": "a"}, b"one tower") != digest_alone({"user": "a"}, b"another")
