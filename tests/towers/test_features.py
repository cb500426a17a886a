import json
import math
import os
import string
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
from child_process import tied_python
from hypothesis import given
from hypothesis import strategies as st

from towers.errors import InvalidFeatureError
from towers.features import (
    MISSING_ID,
    UNKNOWN_ID,
    FeatureEncoder,
    category_token,
    stable_hash,
    text_ngrams,
)
from towers.schema import TextFeature, parse_schema

DECLARATIONS: Sequence[Mapping[str, Any]] = (
    {"name": "user_id", "owner": "query", "kind": "categorical"},
    {"name": "country", "owner": "query", "kind": "categorical", "hash_buckets": 7},
    {"name": "interests", "owner": "query", "kind": "categorical_list", "max_length": 5},
    {"name": "history", "owner": "query", "kind": "sequence", "items": "item_id", "max_length": 4},
    {"name": "clicks", "owner": "query", "kind": "sequence", "items": "brand", "max_length": 4},
    {"name": "age", "owner": "query", "kind": "number", "mean": 30.0, "std": 10.0},
    {"name": "income", "owner": "query", "kind": "number", "scaling": "log1p", "mean": 10.0, "std": 2.0},
    {"name": "visits", "owner": "query", "kind": "number", "scaling": "quantile", "boundaries": [0.0, 1.0, 10.0]},
    {"name": "now", "owner": "query", "kind": "timestamp", "reference_time_s": 1_700_000_000.0},
    {"name": "words", "owner": "query", "kind": "text", "hash_buckets": 50, "max_length": 30},
    {"name": "taste", "owner": "query", "kind": "vector", "size": 3},
    {"name": "item_id", "owner": "item", "kind": "categorical"},
    {"name": "brand", "owner": "item", "kind": "categorical", "hash_buckets": 5},
    {"name": "genres", "owner": "item", "kind": "categorical_list", "hash_buckets": 4},
)
SCHEMA = parse_schema(DECLARATIONS)
VOCABULARIES = {
    "user_id": ["1", "42", "ünï", "true"],
    "interests": ["chess", "go"],
    "item_id": [str(number) for number in range(10)],
}
ENCODER = FeatureEncoder(SCHEMA, "query", VOCABULARIES)
ID_FEATURES = ("user_id", "country", "interests", "history", "clicks", "visits", "words")

any_text = st.text(st.characters(), max_size=30) | st.sampled_from(["", "\0", "\ud800", "a\udfffb", "ﬁ Straße ǅ", "42"])
categories = st.none() | any_text | st.integers(-(10**30), 10**30) | st.booleans() | st.integers(-99, 99).map(float)
numbers = st.none() | st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**1000), 2**1000)
float32s = st.floats(width=32, allow_nan=False, allow_infinity=False)
rows = st.fixed_dictionaries(
    {},
    optional={
        "user_id": categories,
        "country": categories,
        "interests": st.none() | st.lists(categories | st.sampled_from(["chess", "go"]), max_size=8),
        "history": st.none() | st.lists(categories | st.integers(0, 12), max_size=8),
        "clicks": st.none() | st.lists(categories, max_size=8),
        "age": numbers,
        "income": numbers,
        "visits": numbers,
        "now": numbers | st.datetimes(timezones=st.none() | st.just(UTC)),
        "words": st.none() | any_text,
        "taste": st.none() | st.just([]) | st.lists(float32s, min_size=3, max_size=3),
    },
)


def _one(name: str, value: Any) -> Any:
    """What one value of one feature becomes."""
    return ENCODER.encode({name: [value]}, 1)[name][0]


@given(st.lists(rows, max_size=4))
def test_arrays_are_what_the_towers_were_promised(batch: list[dict[str, Any]]) -> None:
    arrays = ENCODER.encode_rows(batch)
    assert list(arrays) == [feature.name for feature in SCHEMA.of("query")]
    for name, array in arrays.items():
        assert len(array) == len(batch)
        assert np.isfinite(array).all(), name
        if name in ID_FEATURES:
            assert array.dtype == np.int64
            assert ((array >= 0) & (array < ENCODER.num_ids(name))).all(), name
        else:
            assert array.dtype == np.float32
    assert {name: array.shape[1:] for name, array in arrays.items() if array.dtype == np.float32} == {
        "age": (2,),
        "income": (2,),
        "now": (6,),
        "taste": (3,),
    }


@given(st.lists(rows, min_size=1, max_size=5))
def test_a_batch_is_its_rows_and_padding(batch: list[dict[str, Any]]) -> None:
    together = ENCODER.encode_rows(batch)
    for position, row in enumerate(batch):
        alone = ENCODER.encode_rows([row])
        for name, array in alone.items():
            same = together[name][position]
            if array.ndim == 2 and array.dtype == np.int64:
                length = array.shape[1]
                np.testing.assert_array_equal(same[:length], array[0])
                assert not same[length:].any(), "padding is 0, at the end, and nothing else"
            else:
                np.testing.assert_array_equal(same, array[0])


@given(st.lists(rows, min_size=1, max_size=3))
def test_missing_is_missing_however_it_is_said(batch: list[dict[str, Any]]) -> None:
    said = [{name: row.get(name) for name in (feature.name for feature in SCHEMA.of("query"))} for row in batch]
    for name, array in ENCODER.encode_rows(said).items():
        np.testing.assert_array_equal(array, ENCODER.encode_rows(batch)[name])


@given(st.integers(-(2**53), 2**53))
def test_numbers_and_their_strings_are_one_category(number: int) -> None:
    assert category_token(number) == category_token(float(number)) == category_token(str(number)) == str(number)
    for name in ("country", "user_id"):
        assert _one(name, number) == _one(name, float(number)) == _one(name, str(number))


def test_42_in_every_form() -> None:
    for value in (42, 42.0, "42", np.int64(42), np.float64(42)):
        assert _one("user_id", value) == 3
        assert list(_one("interests", [value])) == [UNKNOWN_ID]
        assert list(_one("history", [value, 7])) == [9]
    assert _one("user_id", True) == _one("user_id", "true") == 5
    assert _one("user_id", -0.0) == _one("user_id", 0)


def test_missing_and_unknown_ids() -> None:
    assert _one("user_id", None) == _one("user_id", "") == MISSING_ID
    assert _one("user_id", "stranger") == _one("user_id", "\ud800") == UNKNOWN_ID
    assert [_one("user_id", token) for token in VOCABULARIES["user_id"]] == [2, 3, 4, 5]
    assert _one("country", "") == MISSING_ID
    assert list(_one("interests", ["go", "", None, "tennis", "chess"])) == [3, UNKNOWN_ID, 2]
    assert list(_one("interests", [])) == [MISSING_ID]
    assert _one("visits", None) == MISSING_ID
    assert [int(_one("visits", value)) for value in (-1, 0, 0.5, 1, 9, 10, 1e9)] == [1, 2, 2, 3, 3, 4, 4]


def test_sequences_keep_the_newest_known_items() -> None:
    assert list(_one("history", ["1", "nothing", "2", "3", "4", "5", None])) == [4, 5, 6, 7]
    assert list(_one("history", ["nothing"])) == [MISSING_ID]


def test_a_sequence_of_hashed_items_loses_none() -> None:
    # With hash buckets, id 1 is a bucket like others, not "unknown".
    item_encoder = FeatureEncoder(SCHEMA, "item", VOCABULARIES)
    brands = list(string.ascii_lowercase)
    ids = item_encoder.encode({"brand": brands}, len(brands))["brand"]
    assert set(ids.tolist()) == {1, 2, 3, 4, 5}
    for brand, brand_id in zip(brands, ids, strict=True):
        assert list(_one("clicks", [brand])) == [brand_id]


def test_numbers_by_hand() -> None:
    assert _one("age", 50.0).tolist() == [2.0, 0.0]
    assert _one("age", None).tolist() == [0.0, 1.0]
    assert _one("age", 10**300).tolist() == [1e6, 0.0]
    assert _one("income", -math.expm1(4)).tolist() == pytest.approx([-7.0, 0.0])


def test_timestamps_by_hand() -> None:
    noon_on_a_thursday = 12 * 3600  # 1 January 1970
    expected = [math.log1p((1_700_000_000 - 43_200) / 86_400) / 10, 0, -1, math.sin(math.pi / 7), math.cos(math.pi / 7)]
    assert _one("now", noon_on_a_thursday).tolist() == pytest.approx([*expected, 0], abs=1e-6)
    assert _one("now", None).tolist() == [0, 0, 0, 0, 0, 1]
    for moment in (datetime(1970, 1, 1, 12), datetime(1970, 1, 1, 12, tzinfo=UTC)):
        np.testing.assert_array_equal(_one("now", moment), _one("now", noon_on_a_thursday))
    later = _one("now", 1_700_000_000 + 86_400)
    assert later[0] == pytest.approx(-math.log1p(1) / 10), "the future is a negative age"


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("user_id", 1.5, "expected a string or an integer, got float 1.5"),
        ("user_id", math.nan, "expected a string or an integer"),
        ("user_id", ["1"], "expected a string or an integer, got a list"),
        ("user_id", np.array([1, 2]), "expected a string or an integer, got a list"),
        ("country", b"de", "expected a string or an integer"),
        ("interests", "chess", "expected a list, got the string 'chess'"),
        ("interests", 5, "expected a list"),
        ("interests", [["chess"]], "in its list: expected a string or an integer, got a list"),
        ("history", "1", "expected a list"),
        ("history", [1.5], "in its list"),
        ("age", "30", "expected a number, got the string '30'"),
        ("age", True, "expected a number"),
        ("age", [30], "expected a number, got a list"),
        ("age", math.nan, "expected a finite number, got nan"),
        ("age", -math.inf, "expected a finite number, got -inf"),
        ("age", 10**400, "expected a number that fits 64 bits"),
        ("visits", math.inf, "expected a finite number"),
        ("now", "2024-01-01", "expected a number"),
        ("now", math.nan, "expected a finite number"),
        ("words", 5, "expected a string, got int 5"),
        ("words", ["a"], "expected a string, got a list"),
        ("taste", [1.0, 2.0], "expected 3 numbers, got 2"),
        ("taste", "abc", "expected a list of 3 numbers, got the string 'abc'"),
        ("taste", 1.0, "expected a list of 3 numbers"),
        ("taste", ["1", "2", "3"], "expected a list of numbers"),
        ("taste", [True, False, True], "expected a list of numbers"),
        ("taste", [None, 1.0, 2.0], "expected a list of numbers"),
        ("taste", [[1.0], [2.0], [3.0]], "expected a list of numbers"),
        ("taste", [[1.0], [2.0, 3.0], 1.0], "expected a list of numbers"),
        ("taste", [10**400, 1, 1], "expected a list of numbers"),
        ("taste", [1.0, math.nan, 2.0], "expected finite numbers"),
        ("taste", [1e300, 1.0, 1.0], "expected finite numbers"),
    ],
)
def test_what_is_refused_names_feature_and_row(name: str, value: Any, reason: str) -> None:
    with pytest.raises(InvalidFeatureError) as caught:
        ENCODER.encode({name: [None, value]}, 2)
    assert str(caught.value).startswith(f"row 1: feature {name!r}: ")
    assert reason in str(caught.value)


@pytest.mark.parametrize("name", ["typo", "item_id"])
def test_a_feature_of_nobody_or_of_the_other_tower_is_refused(name: str) -> None:
    with pytest.raises(InvalidFeatureError, match=f"unknown feature '{name}'; the query tower knows"):
        ENCODER.encode_rows([{}, {name: "1"}])


def test_a_missing_vocabulary_is_named() -> None:
    with pytest.raises(InvalidFeatureError, match="'interests': its vocabulary is missing"):
        FeatureEncoder(SCHEMA, "query", {name: tokens for name, tokens in VOCABULARIES.items() if name != "interests"})


def test_sizes_of_the_embedding_tables() -> None:
    names = ("user_id", "country", "interests", "history", "clicks", "visits", "words", "item_id", "brand", "genres")
    sizes = {name: ENCODER.num_ids(name) for name in names}
    assert sizes == {
        "user_id": 6,
        "country": 8,
        "interests": 4,
        "history": 12,
        "clicks": 6,
        "visits": 5,
        "words": 51,
        "item_id": 12,
        "brand": 6,
        "genres": 5,
    }
    with pytest.raises(InvalidFeatureError, match="'age': kind number has no ids"):
        ENCODER.num_ids("age")


def test_ngrams_by_hand() -> None:
    feature = TextFeature(name="t", owner="item", word_ngrams=(1, 2), char_ngrams=(3,))
    assert text_ngrams(feature, "The CAT,  sat") == [
        "w the",
        "w cat",
        "w sat",
        "w the cat",
        "w cat sat",
        *("c <th", "c the", "c he>", "c <ca", "c cat", "c at>", "c <sa", "c sat", "c at>"),
    ]
    assert text_ngrams(feature, "ﬁ STRASSE") == text_ngrams(feature, "FI straße"), "NFKC, then case folding"
    assert text_ngrams(feature, " .,!?\0\ud800") == []


def test_text_is_cut_and_hashed() -> None:
    words = _one("words", "one two three four five six seven eight nine ten eleven twelve")
    assert len(words) == 30
    assert _one("words", "one two").tolist()[0] == 1 + stable_hash("w one") % 50
    assert list(_one("words", "")) == list(_one("words", None)) == [MISSING_ID]


_SHOW = """
import json, sys
from towers.features import FeatureEncoder
from towers.schema import parse_schema

declarations, vocabularies, rows = json.loads(sys.stdin.read())
arrays = FeatureEncoder(parse_schema(declarations), "query", vocabularies).encode_rows(rows)
print(json.dumps({name: array.tolist() for name, array in arrays.items()}))
"""


@pytest.mark.parametrize("seed", ["0", "12345"])
def test_every_process_encodes_alike(seed: str) -> None:
    batch: list[dict[str, Any]] = [
        {"user_id": "42", "country": "de", "interests": ["go", "tea"], "history": ["3", 4], "clicks": ["x", "y"]},
        {"words": "Ein schöner Tag 🎬", "age": 33.3, "income": 12.5, "now": 1.7e9, "visits": 3, "taste": [1, 2, 3.5]},
        {"country": "\ud800", "words": "\0 nul"},
    ]
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    done = subprocess.run(
        tied_python(_SHOW),
        input=json.dumps([DECLARATIONS, VOCABULARIES, batch]),
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    here = {name: array.tolist() for name, array in ENCODER.encode_rows(batch).items()}
    assert json.loads(done.stdout) == here


def test_hashes_never_change() -> None:
    # Published checkpoints depend on these: another value would be silent nonsense.
    assert stable_hash("") == 0x2D06800538D394C2
    assert stable_hash("42") == 1303733993043075473
    assert stable_hash("\ud800") == stable_hash("\ud800") != stable_hash("\udfff")


def test_towers_know_only_their_own_features() -> None:
    assert set(FeatureEncoder(SCHEMA, "item", VOCABULARIES).encode({}, 2)) == {"item_id", "brand", "genres"}
    assert set(ENCODER.encode({}, 2)) == {feature.name for feature in SCHEMA.of("query")}
