"""Filters against a naive evaluation, row by row, in Python."""

import datetime as dt
import math
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from retrieval.feature.v1 import feature_pb2
from retrieval.feature.v1.filter_pb2 import Equals, Filter, Filters, NoneOf
from retrieval.feature.v1.filter_pb2 import Exists as ExistsMessage
from retrieval.feature.v1.filter_pb2 import OneOf as OneOfMessage
from retrieval.feature.v1.filter_pb2 import Range as RangeMessage

from index_service.attributes import Attributes
from index_service.filter_message import MAX_CONDITIONS, MAX_DEPTH, MAX_VALUES, condition_of
from index_service.filters import AllMet, AnyMet, Exists, NotMet, OneOf, Range
from index_service.row_set import RowSet
from towers.errors import InvalidInputError

EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
TYPES = {
    "brand": pa.string(),
    "stock": pa.int64(),
    "price": pa.float64(),
    "rating": pa.float32(),
    "is_new": pa.bool_(),
    "added": pa.timestamp("us", "UTC"),
    "released": pa.date32(),
    "genres": pa.list_(pa.string()),
    "sizes": pa.list_(pa.float64()),
    "nothing": pa.null(),
}
STRINGS = st.sampled_from(["", "a", "b", "ü", "\U0001f600", "a\0"]) | st.text(st.characters(exclude_categories=["Cs"]))
INTEGERS = st.integers(-3, 3) | st.sampled_from([2**53, 2**53 + 1, 2**63 - 1, -(2**63)])
FLOATS = st.sampled_from([0.0, -0.0, 0.1, 1.0, 1.5, math.nan, math.inf, -math.inf]) | st.floats(width=32)
MOMENTS = st.sampled_from([EPOCH, EPOCH + dt.timedelta(days=1)]) | st.datetimes(
    dt.datetime(1900, 1, 1), dt.datetime(2100, 1, 1), timezones=st.just(dt.UTC)
)
VALUES = {
    "brand": STRINGS,
    "stock": INTEGERS,
    "price": FLOATS,
    "rating": FLOATS,
    "is_new": st.booleans(),
    "added": MOMENTS,
    "released": MOMENTS.map(dt.datetime.date),
    "genres": st.lists(STRINGS | st.none(), max_size=4),
    "sizes": st.lists(FLOATS | st.none(), max_size=4),
    "nothing": st.none(),
}
ROWS = st.lists(st.fixed_dictionaries({name: st.none() | values for name, values in VALUES.items()}), max_size=80)


def attributes_of(rows, filterable=tuple(TYPES), **how):
    table = pa.table({name: pa.array([row[name] for row in rows], type_) for name, type_ in TYPES.items()})
    return Attributes(table, filterable, **how)


def comparable(name, value):
    """The entries of an attribute as a filter names them; none where it is missing."""
    entries = value if isinstance(value, list) else [value]
    return [as_named(name, entry) for entry in entries if entry is not None and entry == entry]


def as_named(name, entry):
    match entry:
        case bool():
            return str(entry).lower()
        case dt.datetime():
            return (entry - EPOCH) // dt.timedelta(microseconds=1) / 10**6
        case dt.date():
            return float((entry - EPOCH.date()).days * 86_400)
        case float() if name == "rating":
            return rounded(name, entry)
        case _:
            return entry


def rounded(name, number):
    """A number as the column's values are: singles, moments in microseconds."""
    with np.errstate(over="ignore"):
        match name:
            case "rating":
                return float(np.float32(number))
            case "added" | "released":
                return float(np.round(number * 1e6) / 1e6)
            case _:
                return number


def is_met(condition, row):
    match condition:
        case AllMet(conditions):
            return all(is_met(part, row) for part in conditions)
        case AnyMet(conditions):
            return any(is_met(part, row) for part in conditions)
        case NotMet(inner):
            return not is_met(inner, row)
        case Exists(name):
            return bool(comparable(name, row[name]))
        case OneOf(name, values):
            return any(
                entry == value if isinstance(value, str) else entry == rounded(name, value)
                for entry in comparable(name, row[name])
                for value in values
            )
        case Range(name):
            return any(is_within(condition, entry) for entry in comparable(name, row[name]))


def is_within(bounds, entry):
    name = bounds.attribute
    return (
        (bounds.at_least is None or entry >= rounded(name, bounds.at_least))
        and (bounds.greater_than is None or entry > rounded(name, bounds.greater_than))
        and (bounds.at_most is None or entry <= rounded(name, bounds.at_most))
        and (bounds.less_than is None or entry < rounded(name, bounds.less_than))
    )


def named_values(name):
    """Values that a filter may compare an attribute with; most of them occur."""
    match name:
        case "brand" | "genres":
            return STRINGS
        case "is_new":
            return st.sampled_from(["true", "false"])
        case "added" | "released":
            return MOMENTS.map(lambda moment: as_named(name, moment)) | st.floats(-1e300, 1e300)
        case _:
            finite = FLOATS.filter(math.isfinite) | st.floats(allow_nan=False, allow_infinity=False)
            return finite | INTEGERS.map(float)


def leaves(name):
    values = named_values(name)
    any_leaf = st.builds(OneOf, st.just(name), st.frozensets(values, max_size=4)) | st.builds(Exists, st.just(name))
    if name in ("brand", "genres", "is_new"):
        return any_leaf
    bound = st.none() | values
    return any_leaf | st.builds(Range, st.just(name), bound, bound, bound, bound)


CONDITIONS = st.recursive(
    st.sampled_from(sorted(TYPES)).flatmap(leaves),
    lambda inner: (
        st.builds(AllMet, st.lists(inner, max_size=3).map(tuple))
        | st.builds(AnyMet, st.lists(inner, max_size=3).map(tuple))
        | st.builds(NotMet, inner)
    ),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(ROWS, CONDITIONS, st.sampled_from([0, 1_000]))
def test_a_filter_is_what_python_says_row_by_row(rows, condition, bitmaps_from):
    attributes = attributes_of(rows, bitmaps_from=bitmaps_from)
    expected = [is_met(condition, row) for row in rows]
    assert attributes.mask(condition).tolist() == expected
    assert attributes.matching(condition).rows.tolist() == np.flatnonzero(expected).tolist()
    assert attributes.matching(condition).count == sum(expected)


@pytest.mark.parametrize("bitmaps_from", [10_000, 30_000])
def test_a_large_table(bitmaps_from):
    random = np.random.default_rng(1)
    num = 20_000
    years = random.integers(1950, 2025, num)
    prices = random.random(num)
    genres = [list(random.choice(["drama", "crime", "rare"], 2, p=[0.6, 0.399, 0.001])) for _ in range(num)]
    ids = [f"maker {i}" for i in random.integers(0, 5000, num)]
    is_known = random.random(num) < 0.9
    table = pa.table(
        {
            "year": pa.array(years, mask=~is_known),
            "price": prices,
            "genres": pa.array([list(map(str, entries)) for entries in genres]),
            "maker": ids,
        }
    )
    attributes = Attributes(table, ["year", "price", "genres", "maker"], bitmaps_from=bitmaps_from)
    unfiltered_bytes = attributes.size_bytes
    has = {name: np.array([name in entries for entries in genres]) for name in ("drama", "crime", "rare")}
    makers = np.array(ids)
    for condition, expected in (
        (Range("year", at_least=1990.0), is_known & (years >= 1990)),
        (Range("year", at_least=1950.0), is_known),
        (Range("year", greater_than=1960.0, less_than=1962.0), is_known & (years == 1961)),
        (Range("year", at_least=2030.0), np.zeros(num, bool)),
        (Range("price", at_least=0.25, less_than=0.75), (prices >= 0.25) & (prices < 0.75)),
        (Range("price", at_most=0.0004), prices <= 0.0004),
        (OneOf("genres", frozenset({"drama"})), has["drama"]),
        (OneOf("genres", frozenset({"rare", "crime", "no such genre"})), has["rare"] | has["crime"]),
        (OneOf("maker", frozenset({"maker 7", "maker 4999"})), (makers == "maker 7") | (makers == "maker 4999")),
        (NotMet(OneOf("genres", frozenset({"rare"}))), ~has["rare"]),
        (
            AllMet((OneOf("genres", frozenset({"rare"})), Range("year", at_least=1990.0))),
            has["rare"] & is_known & (years >= 1990),
        ),
        (
            AnyMet((OneOf("genres", frozenset({"rare"})), OneOf("maker", frozenset({"maker 7"})))),
            has["rare"] | (makers == "maker 7"),
        ),
    ):
        for _ in range(2):  # Computed, then remembered.
            np.testing.assert_array_equal(attributes.mask(condition), expected, err_msg=str(condition))
            np.testing.assert_array_equal(attributes.matching(condition).rows, np.flatnonzero(expected))
    assert attributes.size_bytes > unfiltered_bytes


def test_what_filters_need_is_made_once_and_by_whoever_asks_first():
    values = np.random.default_rng(1).random(50_000)
    attributes = Attributes(pa.table({"price": values, "maker": [f"maker {value}" for value in values]}), ["price"])
    start = Barrier(8)

    def count(number):
        start.wait()
        return attributes.matching(Range("price", less_than=number / 8)).count

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(count, range(8))) == [int((values < number / 8).sum()) for number in range(8)]
    once = attributes.size_bytes
    attributes.matching(Range("price", less_than=0.5))
    assert attributes.size_bytes == once


def test_numbers_are_compared_in_the_precision_of_the_column():
    attributes = Attributes(
        pa.table(
            {
                "single": pa.array([0.1, 0.2], pa.float32()),
                "whole": pa.array([2**53 + 1, 2**53], pa.int64()),
                "moment": pa.array(
                    [EPOCH + dt.timedelta(microseconds=1_704_067_200_123_457), EPOCH], pa.timestamp("us", "UTC")
                ),
            }
        ),
        ["single", "whole", "moment"],
    )
    for condition, expected in (
        (OneOf("single", frozenset({0.1})), [True, False]),
        (Range("single", at_least=0.1, at_most=0.1), [True, False]),
        (Range("single", greater_than=0.1), [False, True]),
        (OneOf("whole", frozenset({2.0**53})), [False, True]),
        (OneOf("whole", frozenset({0.5, 1e300, -1e300})), [False, False]),
        (Range("whole", greater_than=2.0**53), [True, False]),
        (Range("whole", at_least=-1e300, less_than=1e300), [True, True]),
        (OneOf("moment", frozenset({1_704_067_200.123457})), [True, False]),
        (Range("moment", at_least=1_704_067_200.123457, less_than=1e305), [True, False]),
        (Range("moment", at_most=0.0), [False, True]),
    ):
        assert attributes.mask(condition).tolist() == expected, condition


def test_an_attribute_that_no_item_has():
    attributes = Attributes(pa.table({"year": [1, 2]}), ["year", "absent"])
    for condition in (
        Exists("absent"),
        OneOf("absent", frozenset({"a"})),
        OneOf("absent", frozenset({1.0})),
        Range("absent", at_least=1.0),
    ):
        assert attributes.mask(condition).tolist() == [False, False]
        assert attributes.mask(NotMet(condition)).tolist() == [True, True]


@pytest.mark.parametrize(
    ("condition", "told"),
    [
        (
            Exists("raw"),
            r"attribute 'raw' is not filterable; filterable: \['added', .*\]; declare more with TWOTOWER_FILTERABLE",
        ),
        (AnyMet((Exists("brand"), NotMet(OneOf("no", frozenset({"a"}))))), "attribute 'no' is not filterable"),
        (OneOf("brand", frozenset({1.0})), "attribute 'brand' holds strings; compare it with a string, not with 1.0"),
        (
            OneOf("stock", frozenset({"one"})),
            "attribute 'stock' holds numbers; compare it with a number, not with 'one'",
        ),
        (OneOf("sizes", frozenset({"one"})), "attribute 'sizes' holds numbers"),
        (
            OneOf("added", frozenset({"today"})),
            "attribute 'added' holds moments in Unix seconds; compare it with a number",
        ),
        (
            OneOf("is_new", frozenset({"yes"})),
            "attribute 'is_new' holds booleans; compare it with 'true' or 'false', not with 'yes'",
        ),
        (OneOf("is_new", frozenset({1.0})), "attribute 'is_new' holds booleans; compare it with a string"),
        (Range("genres", at_least=1.0), "attribute 'genres' holds strings, which have no range"),
        (Range("is_new", at_least=1.0), "attribute 'is_new' holds booleans, which have no range"),
    ],
)
def test_wrong_conditions_are_refused_by_name(condition, told):
    with pytest.raises(InvalidInputError, match=f"filter: {told}"):
        attributes_of([]).matching(condition)


def test_without_filterable_attributes_the_error_says_so():
    with pytest.raises(InvalidInputError, match="'brand' is not filterable; no attribute is; declare more with"):
        attributes_of([], filterable=()).matching(Exists("brand"))


def test_many_filters_do_not_pile_up():
    attributes = Attributes(pa.table({"n": np.arange(10_000)}), ["n"], bitmaps_from=20_000)
    for bound in range(500):
        attributes.matching(Range("n", at_least=float(bound)))
    assert attributes.size_bytes < 10_000 * 8 * 2 + 500 * 10_000 / 8 / 3


ROW_SETS = st.integers(1, 300).flatmap(
    lambda num: (
        st.tuples(
            st.lists(st.booleans(), min_size=num, max_size=num), st.lists(st.booleans(), min_size=num, max_size=num)
        )
        | st.tuples(
            *[
                st.sets(st.integers(0, num - 1), max_size=3).map(
                    lambda rows, num=num: [row in rows for row in range(num)]
                )
            ]
            * 2
        )
    )
)


@settings(max_examples=100, deadline=None)
@given(ROW_SETS, st.booleans(), st.booleans())
def test_row_sets_are_sets(masks, is_first_listed, is_second_listed):
    num = len(masks[0])
    one, other = (np.array(mask, dtype=bool) for mask in masks)

    def row_set(mask, is_listed):
        return RowSet.of_rows(np.flatnonzero(mask), num) if is_listed else RowSet(mask)

    a, b = row_set(one, is_first_listed), row_set(other, is_second_listed)
    for combined, expected in ((a & b, one & other), (a | b, one | other), (a - b, one & ~other), (~a, ~one), (a, one)):
        assert combined.count == expected.sum()
        assert combined.mask.tolist() == expected.tolist()
        assert combined.rows.tolist() == np.flatnonzero(expected).tolist()
        assert np.packbits(expected, bitorder="little").tolist() == combined.bitmap[: -(-num // 8)].tolist()
        assert not combined.bitmap[-(-num // 8) :].any()
    assert a.contains(np.arange(num)).tolist() == one.tolist()
    assert a.contains(np.array([num - 1], dtype=np.int32)).tolist() == [one[-1]]
    assert RowSet.everything(num).mask.all()


def strings(*values):
    return feature_pb2.FeatureValue(string_list=feature_pb2.StringList(values=values))


def number(value):
    return feature_pb2.FeatureValue(number_value=value)


def numbers(*values):
    return feature_pb2.FeatureValue(number_list=feature_pb2.NumberList(values=values))


def all_met(*filters):
    return Filter(all_met=Filters(filters=filters))


EXISTS = Filter(exists=ExistsMessage(attribute="year"))


@pytest.mark.parametrize(
    ("message", "condition"),
    [
        (EXISTS, Exists("year")),
        (Filter(equals=Equals(attribute="year", value=number(2))), OneOf("year", frozenset({2.0}))),
        (
            Filter(equals=Equals(attribute="brand", value=feature_pb2.FeatureValue(string_value=""))),
            OneOf("brand", frozenset({""})),
        ),
        (Filter(one_of=OneOfMessage(attribute="g", values=strings("b", "a", "b"))), OneOf("g", frozenset({"a", "b"}))),
        (Filter(one_of=OneOfMessage(attribute="g", values=strings())), OneOf("g", frozenset())),
        (
            Filter(none_of=NoneOf(attribute="n", values=numbers(1, 2))),
            AllMet((Exists("n"), NotMet(OneOf("n", frozenset({1.0, 2.0}))))),
        ),
        (Filter(range=RangeMessage(attribute="n", at_least=0, less_than=2)), Range("n", at_least=0.0, less_than=2.0)),
        (Filter(range=RangeMessage(attribute="n", greater_than=0, at_most=2)), Range("n", None, 0.0, 2.0, None)),
        (all_met(EXISTS, EXISTS), AllMet((Exists("year"), Exists("year")))),
        (Filter(any_met=Filters(filters=[EXISTS])), AnyMet((Exists("year"),))),
        (Filter(not_met=EXISTS), NotMet(Exists("year"))),
    ],
)
def test_messages_are_read(message, condition):
    assert condition_of(message) == condition


def nested(depth):
    message = EXISTS
    for _ in range(depth - 1):
        message = Filter(not_met=message)
    return message


@pytest.mark.parametrize(
    ("message", "told"),
    [
        (Filter(), "filter: no condition is set; set one of equals, one_of"),
        (all_met(EXISTS, Filter()), r"filter\.all_met\.filters\[1\]: no condition is set"),
        (all_met(), r"filter\.all_met\.filters is empty; give at least one"),
        (Filter(any_met=Filters()), r"filter\.any_met\.filters is empty"),
        (
            Filter(not_met=Filter(exists=ExistsMessage())),
            r"filter\.not_met\.exists\.attribute is empty; name an attribute",
        ),
        (Filter(range=RangeMessage(at_least=1)), r"filter\.range\.attribute is empty"),
        (Filter(range=RangeMessage(attribute="n")), r"filter\.range: no bound is set; set at least one of at_least,"),
        (
            Filter(range=RangeMessage(attribute="n", at_most=math.inf)),
            r"filter\.range\.at_most: expected a finite number, got inf",
        ),
        (
            Filter(equals=Equals(attribute="n", value=number(math.nan))),
            r"filter\.equals\.value: expected a finite number",
        ),
        (Filter(equals=Equals(attribute="n")), r"filter\.equals\.value: expected a string or a number; .* use exists"),
        (
            Filter(equals=Equals(attribute="n", value=strings("a"))),
            r"filter\.equals\.value: expected one string or one number; for several values use one_of",
        ),
        (
            Filter(one_of=OneOfMessage(attribute="n", values=number(1))),
            r"filter\.one_of\.values: expected a list of strings or a list of numbers",
        ),
        (Filter(none_of=NoneOf(attribute="n")), r"filter\.none_of\.values: expected a list"),
        (
            Filter(none_of=NoneOf(attribute="n", values=numbers(1, math.nan))),
            r"filter\.none_of\.values: expected a finite",
        ),
        (nested(MAX_DEPTH + 1), f"more than {MAX_DEPTH} conditions lie within each other"),
        (all_met(*[EXISTS] * MAX_CONDITIONS), f"more than {MAX_CONDITIONS} conditions"),
        (
            all_met(*[Filter(one_of=OneOfMessage(attribute="n", values=numbers(*range(MAX_VALUES // 2 + 1))))] * 2),
            rf"filter\.all_met\.filters\[1\]\.one_of\.values: more than {MAX_VALUES} values in one filter",
        ),
    ],
)
def test_wrong_messages_are_refused_by_path(message, told):
    with pytest.raises(InvalidInputError, match=told):
        condition_of(message)


def test_as_much_as_is_allowed_is_read():
    condition_of(nested(MAX_DEPTH))
    condition_of(all_met(*[EXISTS] * (MAX_CONDITIONS - 1)))
    assert condition_of(Filter(one_of=OneOfMessage(attribute="n", values=numbers(*range(MAX_VALUES)))))
