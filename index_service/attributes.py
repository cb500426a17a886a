"""The attributes of the items of one index: what is returned with hits, and which rows meet a condition.

Deliberately does not know item ids, embeddings or where a condition came from.

A filterable column is kept as its distinct values, sorted, and for each the rows that have it; so a condition is a few
intervals of values. Intervals with few rows give a list of rows. For those with many, large tables hold bitmaps made
beforehand: one for each frequent value, and one for all values below each of some bounds (a range-encoded index: Chan
and Ioannidis, "Bitmap index design and evaluation", 1998). Any range is the difference of two of them, but for the rows
between its own bounds and theirs, which are corrected one by one.
"""

import bisect
import itertools
import math
from collections import OrderedDict
from collections.abc import Collection, Sequence
from functools import reduce
from threading import Lock
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from index_service.filters import AllMet, AnyMet, Condition, Exists, NotMet, OneOf, Range, Value
from index_service.row_set import RowSet, distinct
from towers.errors import InvalidInputError

_MAX_REMEMBERED = 64
"""Filters whose rows are kept: at most N / 8 bytes each."""
_BITMAPS_FROM = 10_000
"""Rows from which bitmaps are worth making."""
_NUM_BOUNDS = 64
"""Bitmaps of a column of many rows: about N / 8 bytes each; N / 128 rows at most to correct at each end of a range."""
_ROW_BITS = 32
_MICROSECONDS = 1_000_000
_BOOLEANS = "booleans"
_Interval = tuple[int, int]
"""Numbers of values, from the first up to and without the last."""


class Attributes:
    """Columns of N rows. Never change, so any number of threads may read them."""

    def __init__(self, table: pa.Table, filterable: Collection[str], *, bitmaps_from: int = _BITMAPS_FROM) -> None:
        """Takes the columns that can be returned; others are left out. What filters need is made when first needed.

        Args:
            table: N rows of attributes, without the item ids.
            filterable: The attributes that conditions may name. One that the table lacks is an attribute that no item
                has.
            bitmaps_from: Rows from which columns get bitmaps.
        """
        self._bitmaps_from = bitmaps_from
        self.num_rows: int = table.num_rows
        """N."""
        self.filterable = tuple(sorted(set(filterable)))
        self._values = {
            field.name: _contiguous(table.column(field.name)) for field in table.schema if _is_servable(field.type)
        }
        self._columns: dict[str, _Column] = {}
        self._remembered: OrderedDict[Condition, RowSet] = OrderedDict()
        self._lock = Lock()
        self._making_column = Lock()

    @property
    def names(self) -> tuple[str, ...]:
        """Attributes that can be asked for: strings, numbers, booleans, moments and lists of strings or numbers."""
        return tuple(self._values)

    @property
    def size_bytes(self) -> int:
        """Memory of the columns, and of what was made of them to filter."""
        with self._lock:
            remembered = sum(rows.size_bytes for rows in self._remembered.values())
            columns = list(self._columns.values())
        values = sum(column.get_total_buffer_size() for column in self._values.values())
        return int(values + remembered + sum(column.size_bytes for column in columns))

    def values(self, name: str, rows: NDArray[np.int64]) -> list[Any]:
        """One attribute of rows, None where an item has none.

        Raises:
            InvalidInputError: there is no such attribute.
        """
        column = self._values.get(name)
        if column is None:
            raise InvalidInputError(f"attribute_names: unknown attribute {name!r}; known: {sorted(self._values)}")
        return column.take(pa.array(rows)).to_pylist()  # type: ignore[no-any-return]

    def matching(self, condition: Condition) -> RowSet:
        """The rows that meet a condition.

        Raises:
            InvalidInputError: an attribute that is not filterable, or that holds another kind of value than it is
                compared with; the message names it.
        """
        with self._lock:
            known = self._remembered.get(condition)
            if known is not None:
                self._remembered.move_to_end(condition)
                return known
        found = self._evaluated(condition)
        with self._lock:
            self._remembered[condition] = found
            if len(self._remembered) > _MAX_REMEMBERED:
                self._remembered.popitem(last=False)
        return found

    def mask(self, condition: Condition) -> NDArray[np.bool_]:
        """`[N]`: True for the rows that meet a condition; raises as `matching`."""
        return self.matching(condition).mask

    def _evaluated(self, condition: Condition) -> RowSet:
        match condition:
            case AllMet(conditions):
                return reduce(RowSet.__and__, map(self._evaluated, conditions), RowSet.everything(self.num_rows))
            case AnyMet(conditions):
                return reduce(RowSet.__or__, map(self._evaluated, conditions), _no_rows(self.num_rows))
            case NotMet(inner):
                return ~self._evaluated(inner)
            case OneOf(attribute, values):
                return self._column(attribute).one_of(values)
            case Range(attribute):
                return self._column(attribute).within(condition)
            case Exists(attribute):
                return self._column(attribute).present()

    def _column(self, name: str) -> "_Column":
        column = self._columns.get(name)
        if column is not None:
            return column
        if name not in self.filterable:
            declared = f"filterable: {list(self.filterable)}" if self.filterable else "no attribute is"
            raise InvalidInputError(
                f"filter: attribute {name!r} is not filterable; {declared}; declare more with TWOTOWER_FILTERABLE"
            )
        values = self._values.get(name)
        # Takes a second for a million values: those that want it too wait, and no other search does.
        with self._making_column:
            if name not in self._columns:
                made = _Column(name, pa.nulls(self.num_rows) if values is None else values)
                if self.num_rows >= self._bitmaps_from:
                    made.prepare()
                with self._lock:
                    self._columns[name] = made
            return self._columns[name]


class _Column:
    """A filterable column of N rows: its distinct values by rising number, and the rows that have each."""

    def __init__(self, name: str, column: pa.Array) -> None:
        self._name = name
        self._num_rows = len(column)
        self._is_list = _is_list(column.type)
        entries = column.flatten() if self._is_list else column
        rows = np.arange(len(column))
        if self._is_list:
            rows = np.repeat(rows, pc.list_value_length(column).fill_null(0).to_numpy())  # [E]
        self._values, numbers, rows = _numbered(entries, rows)
        # Numbers and rows in one integer each are sorted many times faster than one by the other.
        keys = np.sort(numbers.astype(np.int64) << _ROW_BITS | rows)
        if self._is_list:
            keys = distinct(keys)  # A list that holds a value twice counts once.
        self._rows = (keys & (1 << _ROW_BITS) - 1).astype(np.int32)
        """`[E]` by value, rising for each."""
        sizes = np.bincount(keys >> _ROW_BITS, minlength=len(self._values))
        self._starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes)])
        """Where the rows of each value start, and where those of the last end."""
        self._frequent: dict[_Interval, RowSet] = {}
        self._bounds: list[int] = []
        """Where the rows of some values start, rising; the last is where the rows end."""
        self._below: list[NDArray[np.uint64]] = []
        """For each bound the bitmap of the rows before it; empty for few rows, and for lists."""

    @property
    def size_bytes(self) -> int:
        bitmaps = sum(words.nbytes for words in self._below)
        frequent = sum(rows.size_bytes for rows in list(self._frequent.values()))
        return int(self._rows.nbytes + self._starts.nbytes + self._values.size_bytes + bitmaps + frequent)

    def prepare(self) -> None:
        """Makes the bitmaps of intervals with many rows."""
        num_values = len(self._values)
        frequent = np.flatnonzero(np.diff(self._starts) * RowSet.FEW >= self._num_rows).tolist()
        for interval in ((0, num_values), *((number, number + 1) for number in frequent)):
            self._frequent[interval] = self._listed([interval])
        if not self._is_list:
            shares = np.linspace(0, len(self._rows), _NUM_BOUNDS + 1)
            numbers = np.unique(np.searchsorted(self._starts, shares)).tolist()
            self._bounds = self._starts[numbers].tolist()
            mask = np.zeros(self._num_rows, dtype=bool)
            for first, end in itertools.pairwise([0, *self._bounds]):
                mask[self._rows[first:end]] = True
                self._below.append(RowSet(mask).words)

    def one_of(self, values: frozenset[Value]) -> RowSet:
        """The rows that have one of these values."""
        self._values.check(self._name, values)
        intervals = [interval for value in values if (interval := self._values.interval(value))[0] < interval[1]]
        frequent = [interval for interval in intervals if interval in self._frequent]
        listed = self._listed([interval for interval in intervals if interval not in self._frequent])
        return reduce(RowSet.__or__, (self._frequent[interval] for interval in frequent), listed)

    def within(self, bounds: Range) -> RowSet:
        """The rows that have a value within bounds."""
        values = self._values
        if isinstance(values, _Strings):
            raise InvalidInputError(
                f"filter: attribute {self._name!r} holds {values.kind}, which have no range; compare it with values"
            )
        if isinstance(values, _Nothing):
            return _no_rows(self._num_rows)
        first, end = 0, len(values)
        for bound, including in ((bounds.at_least, False), (bounds.greater_than, True)):
            if bound is not None:
                first = max(first, values.num_below(bound, including=including))
        for bound, including in ((bounds.at_most, True), (bounds.less_than, False)):
            if bound is not None:
                end = min(end, values.num_below(bound, including=including))
        return self._between((first, max(first, end)))

    def present(self) -> RowSet:
        """The rows that have a value."""
        return self._between((0, len(self._values)))

    def _between(self, interval: _Interval) -> RowSet:
        frequent = self._frequent.get(interval)
        if frequent is not None:
            return frequent
        if not self._below or self._num_of(interval) * RowSet.FEW < self._num_rows:
            return self._listed([interval])
        (below_first, first_rows), (below_end, end_rows) = map(self._near, interval)
        # Each row has one value, so what is below one bound only is between the two.
        words = below_first ^ below_end
        rows = np.concatenate([first_rows, end_rows])
        np.bitwise_xor.at(words, rows >> 6, np.uint64(1) << (rows & 63).astype(np.uint64))
        return RowSet.of_words(words, self._num_rows)

    def _near(self, number: int) -> tuple[NDArray[np.uint64], NDArray[np.int32]]:
        """The bitmap of the bound that is the nearest to a value's number, and the rows between."""
        start = int(self._starts[number])
        place = bisect.bisect_left(self._bounds, start)
        if place and self._bounds[place] - start > start - self._bounds[place - 1]:
            place -= 1
        bound = self._bounds[place]
        return self._below[place], self._rows[min(start, bound) : max(start, bound)]

    def _listed(self, intervals: Sequence[_Interval]) -> RowSet:
        """The rows that have a value in one of the intervals, from their lists."""
        parts = [self._rows[self._starts[first] : self._starts[end]] for first, end in intervals]
        rows = np.concatenate([self._rows[:0], *parts])
        if len(rows) * RowSet.FEW >= self._num_rows:
            mask = np.zeros(self._num_rows, dtype=bool)
            mask[rows] = True
            return RowSet(mask)
        if self._is_list:
            rows = distinct(rows)
        elif len(intervals) != 1 or intervals[0][1] - intervals[0][0] != 1:
            rows = np.sort(rows)
        return RowSet.of_rows(rows, self._num_rows)

    def _num_of(self, interval: _Interval) -> int:
        """Number of entries; of rows, at least where the column holds no lists."""
        return int(self._starts[interval[1]] - self._starts[interval[0]])


class _Numbers:
    """Distinct numbers, rising; the position of each is its number."""

    def __init__(self, values: NDArray[Any], kind: str, unit: int = 1) -> None:
        """Takes `[V]` integers or floats; `unit` of them are what a filter calls 1."""
        self._values = values
        self._is_whole = bool(np.issubdtype(values.dtype, np.integer))
        self._unit = unit
        self.kind = kind

    def __len__(self) -> int:
        return len(self._values)

    @property
    def size_bytes(self) -> int:
        return self._values.nbytes

    def check(self, name: str, values: frozenset[Value]) -> None:
        for value in values:
            if isinstance(value, str):
                raise InvalidInputError(
                    f"filter: attribute {name!r} holds {self.kind}; compare it with a number, not with {value[:40]!r}"
                )

    def interval(self, value: Value) -> _Interval:
        assert not isinstance(value, str)
        return self.num_below(value, including=False), self.num_below(value, including=True)

    def num_below(self, bound: float, *, including: bool) -> int:
        """How many of the values are below a bound, or equal to it.

        A bound is rounded as the values are: to a single where they are singles, to a microsecond where they are
        moments. Integers are compared exactly.
        """
        side: Literal["left", "right"] = "right" if including else "left"
        if not self._is_whole:
            with np.errstate(over="ignore"):
                return int(self._values.searchsorted(self._values.dtype.type(bound), side))
        exact = bound if self._unit == 1 else np.round(bound * self._unit)
        if not -(2.0**63) <= exact < 2.0**63:
            return 0 if exact < 0 else len(self._values)
        whole = math.floor(exact) if including else math.ceil(exact)
        return int(self._values.searchsorted(whole, side))


class _Strings:
    """Distinct strings, rising; the position of each is its number."""

    def __init__(self, values: pa.Array, kind: str) -> None:
        """Takes `[V]` strings."""
        self._values = values
        self.kind = kind

    def __len__(self) -> int:
        return len(self._values)

    @property
    def size_bytes(self) -> int:
        return self._values.get_total_buffer_size()  # type: ignore[no-any-return]

    def check(self, name: str, values: frozenset[Value]) -> None:
        for value in values:
            if not isinstance(value, str):
                raise InvalidInputError(
                    f"filter: attribute {name!r} holds {self.kind}; compare it with a string, not with {value}"
                )
            if self.kind == _BOOLEANS and value not in ("true", "false"):
                raise InvalidInputError(
                    f"filter: attribute {name!r} holds {self.kind}; compare it with 'true' or 'false', "
                    f"not with {value[:40]!r}"
                )

    def interval(self, value: Value) -> _Interval:
        # Arrow sorts by UTF-8 and Python by code point, which is the same order.
        first = bisect.bisect_left(range(len(self)), value, key=lambda number: self._values[number].as_py())
        return first, first + (first < len(self) and self._values[first].as_py() == value)


class _Nothing:
    """The values of a column that has none, and so no type either."""

    size_bytes = 0

    def __len__(self) -> int:
        return 0

    def check(self, name: str, values: frozenset[Value]) -> None:
        """Any kind of value may be what the attribute will hold one day."""

    def interval(self, value: Value) -> _Interval:  # noqa: ARG002
        return 0, 0


def _numbered(entries: pa.Array, rows: NDArray[np.int64]) -> tuple[Any, NDArray[np.int32], NDArray[np.int64]]:
    """The distinct values of a column, and `[E]` number of the value and row of each entry that is not missing."""
    type_ = entries.type
    is_there = entries.is_valid()
    if pa.types.is_floating(type_):
        is_there = pc.and_(is_there, pc.invert(pc.is_nan(entries).fill_null(False)))
    entries, rows = entries.filter(is_there), rows[is_there.to_numpy(zero_copy_only=False)]
    if pa.types.is_timestamp(type_) or pa.types.is_date(type_):
        entries = entries.cast(pa.timestamp("us"), safe=False).cast(pa.int64())
    elif pa.types.is_decimal(type_):
        entries = entries.cast(pa.float64())
    elif pa.types.is_boolean(type_):
        entries = entries.cast(pa.string())
    if not _is_string(entries.type) and not pa.types.is_null(entries.type):
        numeric = entries.to_numpy()
        order = np.argsort(numeric)
        ordered = numeric[order]
        is_new = np.append(True, ordered[1:] != ordered[:-1])[: len(ordered)]
        return _values_of(type_, pa.array(ordered[is_new])), (np.cumsum(is_new) - 1).astype(np.int32), rows[order]
    encoded = entries.dictionary_encode()
    order = pc.sort_indices(encoded.dictionary).to_numpy()
    numbers = np.empty(len(order), dtype=np.int32)  # Of each value, by its place in the dictionary.
    numbers[order] = np.arange(len(order))
    values = encoded.dictionary.take(pa.array(order))
    return _values_of(type_, values), numbers[encoded.indices.to_numpy()], rows


def _values_of(type_: pa.DataType, values: pa.Array) -> "_Numbers | _Strings | _Nothing":
    if pa.types.is_null(type_):
        return _Nothing()
    if pa.types.is_boolean(type_):
        return _Strings(values, _BOOLEANS)
    if _is_string(type_):
        return _Strings(values, "strings")
    if pa.types.is_timestamp(type_) or pa.types.is_date(type_):
        return _Numbers(values.to_numpy(), "moments in Unix seconds", _MICROSECONDS)
    return _Numbers(values.to_numpy(), "numbers")


def _no_rows(num_rows: int) -> RowSet:
    return RowSet.of_rows(np.empty(0, dtype=np.int64), num_rows)


def _contiguous(column: pa.ChunkedArray) -> pa.Array:
    combined = column.combine_chunks()
    return combined if isinstance(combined, pa.Array) else pa.concat_arrays(combined.chunks)


def _is_servable(type_: pa.DataType) -> bool:
    if _is_list(type_):
        return _is_string(type_.value_type) or _is_number(type_.value_type)
    kinds = pa.types.is_boolean, pa.types.is_timestamp, pa.types.is_date, pa.types.is_null
    return _is_string(type_) or _is_number(type_) or any(is_kind(type_) for is_kind in kinds)


def _is_list(type_: pa.DataType) -> bool:
    return bool(pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_))


def _is_string(type_: pa.DataType) -> bool:
    return bool(pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_string_view(type_))


def _is_number(type_: pa.DataType) -> bool:
    return bool(pa.types.is_integer(type_) or pa.types.is_floating(type_) or pa.types.is_decimal(type_))
