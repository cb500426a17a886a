import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from towers.errors import CrossTowerFeatureError, InvalidSchemaError
from towers.schema import FeatureSchema, parse_schema, schema_from_json

USER = {"name": "user_id", "owner": "query", "kind": "categorical"}
ITEM = {"name": "item_id", "owner": "item", "kind": "categorical"}

ALL_KINDS: Sequence[Mapping[str, Any]] = (
    USER,
    ITEM,
    {"name": "country", "owner": "query", "kind": "categorical", "hash_buckets": 7, "embedding_dim": 4},
    {"name": "genres", "owner": "item", "kind": "categorical_list", "min_count": 3, "max_length": 5},
    {"name": "history", "owner": "query", "kind": "sequence", "items": "item_id", "max_length": 20},
    {"name": "price", "owner": "item", "kind": "number", "scaling": "log1p", "mean": 1.5, "std": 0.1},
    {"name": "rank", "owner": "item", "kind": "number", "scaling": "quantile", "boundaries": [1, 2.5]},
    {"name": "released", "owner": "item", "kind": "timestamp", "reference_time_s": 1.7e9, "column": "release_date"},
    {"name": "title", "owner": "item", "kind": "text", "word_ngrams": [1], "char_ngrams": []},
    {"name": "image", "owner": "item", "kind": "vector", "size": 128},
)


def test_round_trip_and_fingerprint() -> None:
    schema = parse_schema(ALL_KINDS)
    again = schema_from_json(schema.to_json())
    assert again == schema
    assert again.to_json() == schema.to_json()
    assert again.fingerprint == schema.fingerprint
    assert [feature.name for feature in schema.features] == [declaration["name"] for declaration in ALL_KINDS]
    shuffled = [dict(reversed(declaration.items())) for declaration in ALL_KINDS]
    assert parse_schema(shuffled).fingerprint == schema.fingerprint, "the order of fields means nothing"


@pytest.mark.parametrize(
    "change",
    [
        {"owner": "query", "name": "item_id2"},
        {"hash_buckets": 100},
        {"min_count": 2},
        {"column": "other"},
        {"embedding_dim": 8},
    ],
)
def test_the_fingerprint_sees_every_change(change: Mapping[str, Any]) -> None:
    extra = {"name": "brand", "owner": "item", "kind": "categorical"}
    base = parse_schema([USER, ITEM, extra]).fingerprint
    assert parse_schema([USER, ITEM, {**extra, **change}]).fingerprint != base
    assert parse_schema([USER, extra, ITEM]).fingerprint != base, "towers concatenate in this order"


def test_defaults_follow_the_owner() -> None:
    features = {feature.name: feature for feature in parse_schema(ALL_KINDS).features}
    assert {name: feature.source for name, feature in features.items()} == {
        "user_id": "users",
        "item_id": "items",
        "country": "users",
        "genres": "items",
        "history": "history",
        "price": "items",
        "rank": "items",
        "released": "items",
        "title": "items",
        "image": "items",
    }
    assert features["released"].column == "release_date"
    assert features["title"].column == "title"


def test_owners_and_vocabularies() -> None:
    schema = parse_schema(ALL_KINDS)
    assert [feature.name for feature in schema.of("query")] == ["user_id", "country", "history"]
    # The query tower needs the items of the history, and nothing else of the other side.
    assert schema.vocabulary_names("query") == ("user_id", "item_id")
    assert schema.vocabulary_names("item") == ("item_id", "genres")


@pytest.mark.parametrize("owner", ["query", "item"])
@pytest.mark.parametrize("kind", ["categorical", "number", "anything"])
def test_a_feature_of_the_pair_is_refused_by_name(owner: str, kind: str) -> None:
    clicked = {"name": "has_clicked", "owner": owner, "kind": kind, "source": "interactions"}
    with pytest.raises(CrossTowerFeatureError) as caught:
        parse_schema([USER, ITEM, clicked])
    assert "'has_clicked'" in str(caught.value)
    assert "reranker" in str(caught.value)
    with pytest.raises(CrossTowerFeatureError, match="reranker"):
        schema_from_json(json.dumps({"features": [USER, ITEM, clicked]}).encode())


HISTORY = {"name": "history", "owner": "query", "kind": "sequence", "items": "item_id"}
NUMBER = {"name": "price", "owner": "item", "kind": "number"}
TEXT = {"name": "title", "owner": "item", "kind": "text"}


@pytest.mark.parametrize(
    ("declaration", "parts"),
    [
        ({"owner": "item", "kind": "number"}, ["'number 3'", "name", "required"]),
        ({**NUMBER, "name": "1price"}, ["'1price'", "name"]),
        ({**NUMBER, "name": "pri ce"}, ["'pri ce'", "name"]),
        ({**NUMBER, "name": "price\n"}, ["name"]),
        ({**NUMBER, "name": "p" * 65}, ["name", "64"]),
        ({**NUMBER, "owner": "user"}, ["'price'", "owner", "'query' or 'item'"]),
        ({"name": "price", "kind": "number"}, ["'price'", "owner", "required"]),
        ({"name": "price", "owner": "item"}, ["'price'", "kind"]),
        ({**NUMBER, "kind": "float"}, ["'price'", "float", "'number'"]),
        ({**NUMBER, "scale": "log"}, ["'price'", "scale", "Extra"]),
        ({**NUMBER, "scaling": "log"}, ["'price'", "scaling", "'log1p'"]),
        ({**NUMBER, "std": 0}, ["'price'", "std", "greater than 0"]),
        ({**NUMBER, "mean": float("nan")}, ["'price'", "mean", "finite"]),
        ({**NUMBER, "num_buckets": 1}, ["'price'", "num_buckets"]),
        ({**NUMBER, "source": "users"}, ["'price'", "'users'", "item tower", "items"]),
        ({**HISTORY, "source": "items"}, ["'history'", "'items'", "query tower"]),
        ({**HISTORY, "source": "users"}, ["'history'", "sequence"]),
        ({**HISTORY, "owner": "item"}, ["'history'"]),
        ({**HISTORY, "items": "user_id"}, ["'history'", "'user_id'", "categorical item feature"]),
        ({**HISTORY, "items": "nothing"}, ["'history'", "'nothing'"]),
        ({**HISTORY, "pooling": "max"}, ["'history'", "pooling"]),
        ({**HISTORY, "max_length": 0}, ["'history'", "max_length"]),
        ({"name": "history", "owner": "query", "kind": "sequence"}, ["'history'", "items", "required"]),
        ({**USER, "name": "country", "hash_buckets": 0}, ["'country'", "hash_buckets"]),
        ({**USER, "name": "country", "min_count": "many"}, ["'country'", "min_count", "integer"]),
        ({**USER, "name": "country", "embedding_dim": 5000}, ["'country'", "embedding_dim"]),
        ({**TEXT, "word_ngrams": [], "char_ngrams": []}, ["'title'", "word_ngrams", "char_ngrams"]),
        ({**TEXT, "char_ngrams": [0]}, ["'title'", "char_ngrams"]),
        ({**TEXT, "word_ngrams": [11]}, ["'title'", "word_ngrams"]),
        ({"name": "image", "owner": "item", "kind": "vector"}, ["'image'", "size", "required"]),
        (ITEM, ["'item_id'", "unique"]),
    ],
)
def test_a_wrong_declaration_names_feature_and_field(declaration: Mapping[str, Any], parts: Sequence[str]) -> None:
    with pytest.raises(InvalidSchemaError) as caught:
        parse_schema([USER, ITEM, declaration])
    for part in parts:
        assert part in str(caught.value)


def test_all_wrong_declarations_are_named_at_once() -> None:
    with pytest.raises(InvalidSchemaError, match=r"'price', std.*; .*'title', max_length"):
        parse_schema([USER, ITEM, {**NUMBER, "std": -1}, {**TEXT, "max_length": -1}])


@pytest.mark.parametrize(("present", "owner"), [(USER, "item"), (ITEM, "query")])
def test_both_towers_need_a_feature(present: Mapping[str, Any], owner: str) -> None:
    with pytest.raises(InvalidSchemaError, match=f"the {owner} tower has no feature"):
        parse_schema([present])


@pytest.mark.parametrize(
    "content", [b"", b"\xff", b"[]", b"null", b"{}", b'{"features": 5}', b'{"features": "ab"}', b'{"features": [1]}']
)
def test_bytes_that_are_no_schema(content: bytes) -> None:
    with pytest.raises(InvalidSchemaError):
        schema_from_json(content)


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_no_json_breaks_the_reader(value: Any) -> None:
    for content in (value, {"features": value}, {"features": [value, USER]}):
        with pytest.raises(InvalidSchemaError):
            schema_from_json(json.dumps(content).encode())


def test_a_schema_is_frozen() -> None:
    schema: FeatureSchema = parse_schema([USER, ITEM])
    with pytest.raises(ValidationError, match="frozen"):
        schema.features[0].name = "other"
