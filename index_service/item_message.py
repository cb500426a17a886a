"""Items as callers send them to a table in the types of the catalogue.

Deliberately does not know what becomes of the table. Says which item and which attribute is wrong.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from retrieval.index.v1 import index_service_pb2

from towers.catalogue_columns import ITEM_ID
from towers.errors import InvalidInputError

_KINDS = {
    "string_value": "a string",
    "number_value": "a number",
    "string_list": "a list of strings",
    "number_list": "a list of numbers",
}
_LISTS = ("string_list", "number_list")
"""One without entries may stand for the other."""
_NEW_TYPES = {
    "string_value": pa.string(),
    "number_value": pa.float64(),
    "string_list": pa.list_(pa.string()),
    "number_list": pa.list_(pa.float64()),
}
"""Of attributes that the catalogue does not have. A number may be 10 today and 10.5 tomorrow."""
_LARGEST_INTEGER = 2.0**53
"""Above it a double skips integers."""
_FIRST_MOMENT_S, _LAST_MOMENT_S = -62_135_596_800.0, 253_402_300_799.0
"""The years 1 to 9999."""
_SECONDS_PER_DAY = 86_400


@dataclass
class _Column:
    """The values that some items have of one attribute, all of one kind."""

    kind: str
    rows: list[int] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)


def table_of(items: Sequence[index_service_pb2.Item], types: Mapping[str, pa.DataType]) -> pa.Table:
    """The items, one row each.

    An integer attribute takes numbers without a fraction, a moment or a date Unix seconds, a boolean the strings "true"
    and "false": the forms in which they are returned. A value that is not set is missing. An attribute that is new
    gets the type of its values.

    Args:
        items: In the order of the call.
        types: The type of each attribute that the catalogue has.

    Raises:
        InvalidInputError: a value that the attribute cannot hold; the message names the item and the attribute.
    """
    columns: dict[str, _Column] = {}
    for row, item in enumerate(items):
        attributes = item.attributes
        for name in attributes:  # Its items() is Python code, and this loop is the price of an upsert.
            value = attributes[name]
            kind = value.WhichOneof("value")
            if kind is None:
                continue
            content = getattr(value, kind)
            if kind in _LISTS:
                content = list(content.values)
            column = columns.get(name)
            if column is None:
                column = columns[name] = _Column(kind)
            elif column.kind != kind and not (column.kind in _LISTS and content == []):
                if not (kind in _LISTS and column.kind in _LISTS) or any(column.values):
                    reason = f"is {_KINDS[kind]}, in another item of the call {_KINDS[column.kind]}"
                    raise _wrong(items, row, name, reason)
                column.kind = kind
            column.rows.append(row)
            column.values.append(content)
    table = {ITEM_ID: pa.array([item.item_id for item in items], pa.string())}
    for name, column in columns.items():
        rows = column.rows

        def refuse(position: int, reason: str, name: str = name, rows: Sequence[int] = rows) -> InvalidInputError:
            return _wrong(items, rows[position], name, reason)

        values = _converted(column, types.get(name, _NEW_TYPES[column.kind]), refuse)
        places = np.full(len(items), -1)
        places[rows] = np.arange(len(rows))
        table[name] = values.take(pa.array(places, mask=places < 0))
    return pa.table(table)


_Refuse = Callable[[int, str], InvalidInputError]


def _converted(column: _Column, type_: pa.DataType, refuse: _Refuse) -> pa.Array:
    """The values as an array of the attribute's type."""
    is_list = pa.types.is_list(type_)
    entry_type = type_.value_type if is_list else type_
    if column.kind != _kind_of(entry_type, is_list=is_list):
        if is_list and column.kind in _LISTS and not any(column.values):
            return pa.array(column.values, type_)
        expected = _kind_of(entry_type, is_list=is_list)
        wanted = f"holds {type_}" if expected is None else f"is {_KINDS[expected]} in the catalogue"
        raise refuse(0, f"is {_KINDS[column.kind]}, but {wanted}")
    if not is_list:
        return _entries(column.values, entry_type, np.arange(len(column.values)), refuse)
    lists = pa.array(column.values, _NEW_TYPES[column.kind])
    owners = pc.list_parent_indices(lists).to_numpy()
    entries = _entries(lists.flatten().to_pylist(), entry_type, owners, refuse)
    return pa.ListArray.from_arrays(lists.offsets, entries)


def _kind_of(type_: pa.DataType, *, is_list: bool) -> str | None:
    """What a caller sends for a type; None where nothing is taken."""
    if is_list:
        if pa.types.is_string(type_):
            return "string_list"
        return "number_list" if pa.types.is_integer(type_) or pa.types.is_floating(type_) else None
    if pa.types.is_string(type_) or pa.types.is_boolean(type_):
        return "string_value"
    is_number = pa.types.is_integer(type_) or pa.types.is_floating(type_)
    return "number_value" if is_number or pa.types.is_timestamp(type_) or pa.types.is_date(type_) else None


def _entries(values: Sequence[Any], type_: pa.DataType, owners: NDArray[np.int64], refuse: _Refuse) -> pa.Array:
    """Strings or numbers as an array; `owners` says at which position of the column each is."""

    def check(is_right: NDArray[np.bool_], reason: str) -> None:
        if not is_right.all():
            first = int(np.argmin(is_right))
            raise refuse(int(owners[first]), f"is {values[first]!r:.40}{reason}")

    if pa.types.is_string(type_):
        return pa.array(values, type_)
    if pa.types.is_boolean(type_):
        check(np.array([value in ("true", "false") for value in values]), '; a boolean is "true" or "false"')
        return pa.array([value == "true" for value in values], type_)
    numbers = np.array(values, dtype=np.float64)
    check(np.isfinite(numbers), ", which is not finite")
    if pa.types.is_integer(type_):
        check(numbers == np.floor(numbers), ", but an integer in the catalogue")
        check(np.abs(numbers) <= _LARGEST_INTEGER, ", too large for an integer")
        return pa.array(numbers.astype(np.int64)).cast(type_)
    if pa.types.is_floating(type_):
        with np.errstate(over="ignore"):
            floats = numbers.astype(type_.to_pandas_dtype())
        check(np.isfinite(floats), f", too large for {type_}")
        return pa.array(floats, type_)
    is_moment = (numbers >= _FIRST_MOMENT_S) & (numbers <= _LAST_MOMENT_S)
    check(is_moment, ", but Unix seconds of the years 1 to 9999 are a moment")
    if pa.types.is_date(type_):
        check(numbers % _SECONDS_PER_DAY == 0, ", but a date in the catalogue: Unix seconds of its midnight in UTC")
        return pa.array((numbers // _SECONDS_PER_DAY).astype(np.int32)).cast(type_)
    return pa.array(np.round(numbers * 1e6).astype(np.int64)).cast(pa.timestamp("us", "UTC")).cast(type_)


def _wrong(items: Sequence[index_service_pb2.Item], row: int, name: str, reason: str) -> InvalidInputError:
    return InvalidInputError(f"items[{row}] {items[row].item_id[:80]!r}: attribute {name!r} {reason}")
