"""Filters as they are typed: `year>=1990`, `genres in Comedy,Drama`, `brand="7"`, `title exists`.

Deliberately does not know which attributes there are, nor what they hold: the service says so.
"""

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from retrieval_client import Filter, FilterValue

_NAME = r"(?P<name>[^\s,;{}()=<>!\"]+)"
_COMPARISON = re.compile(rf"{_NAME}\s*(?P<sign>>=|<=|!=|=|>|<)\s*(?P<value>[^\s=<>!].*)")
_MEMBERSHIP = re.compile(rf"{_NAME}\s+(?P<not>not\s+)?in\s+(?P<values>\S.*)")
_PRESENCE = re.compile(rf"{_NAME}\s+(?P<not>not\s+)?exists")
_ENTRY = re.compile(r'\s*(?:"(?P<quoted>[^"]*)"|(?P<plain>[^",]+?))\s*(?:,|$)')
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_DATE = re.compile(r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d.*)?")
_BOUNDS = {">=": "at_least", ">": "greater_than", "<=": "at_most", "<": "less_than"}


def filter_of(texts: Sequence[str]) -> "Filter | None":
    """The filter that all of these conditions make; None without any.

    Raises:
        InvalidInputError: a condition cannot be read.
    """
    from retrieval_client import all_of

    return all_of(*map(parse_filter, texts)) if texts else None


def parse_filter(text: str) -> "Filter":
    """Reads one condition.

    A value that looks like a number is one, and one that looks like a date is a moment (UTC); in quotes it is text.

    Raises:
        InvalidInputError: it is none of the forms above.
    """
    from retrieval_client import attribute
    from towers.errors import InvalidInputError

    stripped = text.strip()
    if match := _PRESENCE.fullmatch(stripped):
        exists = attribute(match["name"]).exists()
        return ~exists if match["not"] else exists
    if match := _MEMBERSHIP.fullmatch(stripped):
        named, values = attribute(match["name"]), _values(text, match["values"])
        return named.none_of(values) if match["not"] else named.one_of(values)
    match = _COMPARISON.fullmatch(stripped)
    if match is None:
        raise InvalidInputError(
            f"--filter {text!r}: write for example 'year>=1990', 'brand=acme', 'genres in Comedy,Drama', "
            "'genres not in Horror' or 'title exists'"
        )
    named, [value, *more] = attribute(match["name"]), _values(text, match["value"])
    if more:
        raise InvalidInputError(f"--filter {text!r}: for several values write 'in', or quotes where a comma is meant")
    match match["sign"]:
        case "=":
            return named.equals(value)
        case "!=":
            return named.none_of([value])
        case sign:
            if isinstance(value, str):
                raise InvalidInputError(f"--filter {text!r}: {sign} compares with a number or a date, not {value!r}")
            return named.within(**{_BOUNDS[sign]: value})


def _values(text: str, listed: str) -> "list[FilterValue]":
    """The values of a list, text where one of them is text: the values of an attribute are of one kind."""
    from towers.errors import InvalidInputError

    entries: list[re.Match[str]] = []
    place = 0
    while place < len(listed):
        entry = _ENTRY.match(listed, place)
        if entry is None:
            raise InvalidInputError(f"--filter {text!r}: {listed[place:]!r} is not a value; put quotes around text")
        entries.append(entry)
        place = entry.end()
    values = [entry["plain"] if entry["quoted"] is None else entry["quoted"] for entry in entries]
    if any(entry["quoted"] is not None for entry in entries):
        return list(values)
    if all(_NUMBER.fullmatch(value) for value in values):
        return [float(value) for value in values]
    if all(_DATE.fullmatch(value) for value in values):
        return [_moment(text, value) for value in values]
    return list(values)


def _moment(text: str, value: str) -> datetime:
    from towers.errors import InvalidInputError

    try:
        moment = datetime.fromisoformat(value)
    except ValueError as error:
        raise InvalidInputError(f"--filter {text!r}: {value!r} is not a date: {error}") from error
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
