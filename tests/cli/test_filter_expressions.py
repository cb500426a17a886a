"""What is typed after --filter."""

from datetime import UTC, datetime
from typing import Any

import pytest

from cli.filters import parse_filter
from retrieval_client import attribute
from towers.errors import InvalidInputError

YEAR, GENRES = attribute("year"), attribute("genres")


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("year>=1990", YEAR.within(at_least=1990)),
        (" year > 1990.5 ", YEAR.within(greater_than=1990.5)),
        ("year<=-1e3", YEAR.within(at_most=-1000)),
        ("year<2000", YEAR.within(less_than=2000)),
        ("year=1990", YEAR.equals(1990)),
        ('year="1990"', YEAR.equals("1990")),
        ("year!=1990", YEAR.none_of([1990])),
        ("genres=Film Noir", GENRES.equals("Film Noir")),
        ("genres=true", GENRES.equals("true")),
        ('genres="a, b"', GENRES.equals("a, b")),
        ('genres=""', GENRES.equals("")),
        ("genres in Comedy,Drama", GENRES.one_of(["Comedy", "Drama"])),
        ('genres in Comedy , "Sci-Fi, new"', GENRES.one_of(["Comedy", "Sci-Fi, new"])),
        ("genres not in Horror", GENRES.none_of(["Horror"])),
        ("year in 1990,1991", YEAR.one_of([1990, 1991])),
        ("year in 1990,unknown", YEAR.one_of(["1990", "unknown"])),
        ("year exists", YEAR.exists()),
        ("year not exists", ~YEAR.exists()),
        ("year>=2020-01-31", YEAR.within(at_least=datetime(2020, 1, 31, tzinfo=UTC))),
        ("year<2020-01-31T12:00+02:00", YEAR.within(less_than=datetime(2020, 1, 31, 10, tzinfo=UTC))),
        ("größe.in-cm=5", attribute("größe.in-cm").equals(5)),
    ],
)
def test_a_condition_is_read(text: str, meant: Any) -> None:
    assert parse_filter(text) == meant


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "write for example 'year>=1990'"),
        ("year", "write for example"),
        ("year>=", "write for example"),
        (">=1990", "write for example"),
        ("year is 1990", "write for example"),
        ("the year=1990", "write for example"),
        ("genres in", "write for example"),
        ("year>=soon", ">= compares with a number or a date, not 'soon'"),
        ("genres=a,b", "for several values write 'in'"),
        ("genres in a,,b", "',b' is not a value"),
        ('genres in "a', "is not a value; put quotes around text"),
        ("year>=2020-13-01", "'2020-13-01' is not a date"),
    ],
)
def test_what_is_no_condition_is_refused(text: str, told: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        parse_filter(text)
    assert str(caught.value).startswith(f"--filter {text!r}: ")
    assert told in str(caught.value)
