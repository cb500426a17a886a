"""Filters in Python, and what cannot be one."""

import math
from collections.abc import Callable
from datetime import UTC, date, datetime
from typing import Any

import numpy as np
import pytest
from retrieval.feature.v1 import feature_pb2
from retrieval.feature.v1.filter_pb2 import Equals, Exists, Filters, NoneOf, OneOf, Range
from retrieval.feature.v1.filter_pb2 import Filter as Message

from retrieval_client import Attribute, Filter, all_of, any_of, attribute

Value = feature_pb2.FeatureValue
YEAR = attribute("year")
EXISTS = Message(exists=Exists(attribute="year"))


def strings(*values: str) -> Value:
    return Value(string_list=feature_pb2.StringList(values=values))


def floats(*values: float) -> Value:
    return Value(number_list=feature_pb2.NumberList(values=values))


@pytest.mark.parametrize(
    ("built", "message"),
    [
        (YEAR.exists(), EXISTS),
        (YEAR.equals("a"), Message(equals=Equals(attribute="year", value=Value(string_value="a")))),
        (YEAR.equals(""), Message(equals=Equals(attribute="year", value=Value(string_value="")))),
        (YEAR.equals(2), Message(equals=Equals(attribute="year", value=Value(number_value=2)))),
        (YEAR.equals(True), Message(equals=Equals(attribute="year", value=Value(string_value="true")))),
        (YEAR.equals(date(1970, 1, 2)), Message(equals=Equals(attribute="year", value=Value(number_value=86_400)))),
        (YEAR.equals(np.float32(0.5)), Message(equals=Equals(attribute="year", value=Value(number_value=0.5)))),
        (YEAR.one_of(["a", "b"]), Message(one_of=OneOf(attribute="year", values=strings("a", "b")))),
        (YEAR.one_of({1, 2.5}), Message(one_of=OneOf(attribute="year", values=floats(1, 2.5)))),
        (YEAR.one_of(np.arange(2)), Message(one_of=OneOf(attribute="year", values=floats(0, 1)))),
        (YEAR.one_of([True]), Message(one_of=OneOf(attribute="year", values=strings("true")))),
        (YEAR.one_of([]), Message(one_of=OneOf(attribute="year", values=strings()))),
        (YEAR.none_of(("a",)), Message(none_of=NoneOf(attribute="year", values=strings("a")))),
        (YEAR.within(at_least=0), Message(range=Range(attribute="year", at_least=0))),
        (
            YEAR.within(greater_than=1, at_most=2.5, less_than=datetime(1970, 1, 1, tzinfo=UTC)),
            Message(range=Range(attribute="year", greater_than=1, at_most=2.5, less_than=0)),
        ),
        (~YEAR.exists(), Message(not_met=EXISTS)),
        (YEAR.exists() & ~YEAR.exists(), Message(all_met=Filters(filters=[EXISTS, Message(not_met=EXISTS)]))),
        (YEAR.exists() | YEAR.exists(), Message(any_met=Filters(filters=[EXISTS, EXISTS]))),
        (all_of(YEAR.exists()), Message(all_met=Filters(filters=[EXISTS]))),
        (any_of(YEAR.exists(), YEAR.exists()), Message(any_met=Filters(filters=[EXISTS, EXISTS]))),
    ],
)
def test_a_filter_is_sent_as_it_is_written(built: Filter, message: Message) -> None:
    assert built.message == message


@pytest.mark.parametrize(
    ("build", "problem", "told"),
    [
        (lambda year: year.equals(None), TypeError, "expected one value, got NoneType"),
        (lambda year: year.equals(["a"]), TypeError, "expected one value, got list; for several use one_of"),
        (lambda year: year.equals(math.nan), ValueError, "expected a finite number"),
        (lambda year: year.equals(b"a"), TypeError, "expected a string, a number"),
        (lambda year: year.one_of("abc"), TypeError, "expected a list of values, got the string 'abc'; use equals"),
        (lambda year: year.one_of(["a", 1]), TypeError, "all strings or all numbers"),
        (lambda year: year.none_of([2**60]), ValueError, "too large to be sent exactly"),
        (lambda year: year.within(at_least="1990"), TypeError, "a bound is a number or a moment, got str"),
        (lambda year: year.within(at_most=math.inf), ValueError, "expected a finite number, got inf"),
    ],
)
def test_what_cannot_be_compared_is_refused_by_name(
    build: Callable[[Attribute], Any], problem: type[Exception], told: str
) -> None:
    with pytest.raises(problem, match=f"filter: attribute 'year': .*{told}"):
        build(YEAR)


def test_python_has_no_other_words_for_and() -> None:
    with pytest.raises(TypeError, match=r"combine filters with &, \| and ~"):
        YEAR.exists() and YEAR.exists()
