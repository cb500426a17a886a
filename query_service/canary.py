"""Which requests the standby version answers: a share of them, always the same ones.

Deliberately does not know which version that is, nor whether it can answer.
"""

import struct
from collections.abc import Iterator, Sequence
from typing import Any

import xxhash

from query_service.parse import RawFeatures

_NUM_POSITIONS = 2**64
_COUNT = struct.Struct("<Q")
_NUMBER = struct.Struct("<d")
_MISSING: tuple[Any, ...] = (None, "", [])


def is_canary(queries: Sequence[RawFeatures], share: float) -> bool:
    """Whether a request belongs to the share.

    The same queries are always on the same side, in every process; a larger share has all that a smaller one had.

    Args:
        queries: Raw features of the request's B queries.
        share: From 0, none, to 1, all.
    """
    return share > 0 and xxhash.xxh3_64_intdigest(_serialised(queries)) < share * _NUM_POSITIONS


def _serialised(queries: Sequence[RawFeatures]) -> bytes:
    """Different queries give different bytes; missing features and the order of those given do not count."""
    return b"".join(part for query in queries for part in _parts_of(query))


def _parts_of(query: RawFeatures) -> Iterator[bytes]:
    given = sorted((name, value) for name, value in query.items() if value not in _MISSING)
    yield _COUNT.pack(len(given))
    for name, value in given:
        yield _value_bytes(name)
        yield _value_bytes(value)


def _value_bytes(value: Any) -> bytes:
    """The bytes of a string, a number or a list of them; none begin those of another."""
    match value:
        case str():
            content = value.encode()
            return b"s" + _COUNT.pack(len(content)) + content
        case float() | int():
            # Adding zero turns -0.0 into 0.0.
            return b"n" + _NUMBER.pack(value + 0.0)
        case _:
            return b"l" + _COUNT.pack(len(value)) + b"".join(map(_value_bytes, value))
