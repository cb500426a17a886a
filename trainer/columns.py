"""Columns of data as what they say: ids and values as codes, moments, weights, labels, parts, values of a feature.

What does not fit raises InvalidInputError, which names file, column and fix. Deliberately does not know how files are
read, nor how columns belong together.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from towers.errors import InvalidFeatureError, InvalidInputError
from towers.features import RawValue, category_token
from towers.schema import Feature
from trainer.separation import MISSING, Coded

PARTS = ("train", "history", "validation", "test")
"""What a split column says of an interaction: to train on, only to be known, or to be predicted. In this order."""

_YEAR_10000_S = 253_402_300_800


def id_codes(table: pa.Table, path: Path, name: str, code_of: dict[str, int]) -> NDArray[np.int32]:
    """Ids as codes `[N]`; ids without one get the next, in the order of their first appearance."""
    column = _plain(table.column(name))
    if not (_is_string(column.type) or pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        raise InvalidInputError(f"{path}: column {name!r} is {column.type}; ids must be strings or integers")
    encoded = column.combine_chunks().dictionary_encode()
    try:
        tokens = [category_token(_without_nan(value)) for value in encoded.dictionary.to_pylist()]
    except InvalidFeatureError as error:
        raise InvalidInputError(f"{path}: column {name!r}: {error}; ids must be strings or integers") from error
    codes: NDArray[np.int64] = pc.fill_null(encoded.indices, -1).to_numpy().astype(np.int64)
    is_missing = np.array([token is None for token in tokens] + [True])
    num_missing = int(is_missing[codes].sum())
    if num_missing:
        raise InvalidInputError(
            f"{path}: column {name!r}: {num_missing:,} of {len(codes):,} rows have no id; remove them"
        )
    # Without a token stands only a missing id, and no row has one.
    code_of_entry = [-1 if token is None else code_of.setdefault(token, len(code_of)) for token in tokens]
    return np.array(code_of_entry, dtype=np.int32)[codes]


def coded(column: pa.ChunkedArray) -> Coded:
    """Values with a code each, in the order of their first appearance."""
    code_of: dict[str, int] = {}
    codes = codes_of(column, code_of)
    return Coded(codes, list(code_of))


def codes_of(column: pa.ChunkedArray, code_of: dict[str, int]) -> NDArray[np.int32]:
    """Values as codes `[N]`, by how they are written; those without one get the next."""
    column = _plain(column)
    if pa.types.is_nested(column.type):  # Arrow has no dictionaries of lists.
        distinct, places = column.to_pylist(), np.arange(len(column))
    else:
        encoded = column.combine_chunks().dictionary_encode()
        distinct = [_without_nan(value) for value in encoded.dictionary.to_pylist()]
        places = pc.fill_null(encoded.indices, -1).to_numpy()
    codes = [MISSING if value is None else code_of.setdefault(str(value), len(code_of)) for value in distinct]
    return np.array([*codes, MISSING], dtype=np.int32)[places]


def timestamps_of(table: pa.Table, path: Path, name: str) -> NDArray[np.float64]:
    """`[N]` float Unix seconds."""
    column = _plain(table.column(name))
    if not _is_moment(column.type):
        raise InvalidInputError(
            f"{path}: column {name!r} is {column.type}; timestamps must be Unix seconds (a number) or date and time"
        )
    seconds = _seconds(column)
    moments_s: NDArray[np.float64] = pc.fill_null(seconds, math.nan).to_numpy().astype(np.float64)
    num_missing = int(np.isnan(moments_s).sum())
    if num_missing:
        raise InvalidInputError(
            f"{path}: column {name!r}: {num_missing:,} of {len(moments_s):,} rows have no timestamp; remove them"
        )
    outside = moments_s[(moments_s < 0) | (moments_s >= _YEAR_10000_S)]
    if len(outside):
        raise InvalidInputError(
            f"{path}: column {name!r}: {outside[0]:.0f} is not a moment in Unix seconds; divide milliseconds by 1000"
        )
    return moments_s


def weights_of(table: pa.Table, path: Path, name: str) -> NDArray[np.float64]:
    """`[N]` finite numbers from 0 up."""
    column = _plain(table.column(name))
    if not _is_number(column.type):
        raise InvalidInputError(f"{path}: column {name!r} is {column.type}; [data] weight_column must hold numbers")
    weights: NDArray[np.float64] = pc.fill_null(column.cast(pa.float64()), math.nan).to_numpy()
    is_wrong = ~(np.isfinite(weights) & (weights >= 0))
    if is_wrong.any():
        raise InvalidInputError(
            f"{path}: column {name!r} ([data] weight_column): {int(is_wrong.sum()):,} of {len(weights):,} rows have no "
            f"weight or one such as {weights[is_wrong][0]}; give finite numbers from 0 up"
        )
    return weights


def labels_of(table: pa.Table, path: Path, name: str) -> NDArray[np.bool_]:
    """`[N]` whether each is chosen."""
    column = _plain(table.column(name))
    if not (_is_number(column.type) or pa.types.is_boolean(column.type)):
        raise InvalidInputError(f"{path}: column {name!r} is {column.type}; [data] label_column must hold 0 and 1")
    labels = pc.fill_null(column.cast(pa.float64()), math.nan).to_numpy()
    is_wrong = ~np.isin(labels, (0, 1))
    if is_wrong.any():
        raise InvalidInputError(
            f"{path}: column {name!r} ([data] label_column): {int(is_wrong.sum()):,} of {len(labels):,} rows hold no "
            f"label or one such as {labels[is_wrong][0]:g}; write 1 for chosen, 0 for shown and not chosen"
        )
    is_chosen: NDArray[np.bool_] = labels == 1
    return is_chosen


def parts_of(table: pa.Table, path: Path, name: str) -> NDArray[np.int8]:
    """Places in `PARTS`."""
    column = _plain(table.column(name)).cast(pa.string())
    places = pc.index_in(column, pa.array(PARTS))
    wrong = column.filter(pc.is_null(places))
    if len(wrong):
        raise InvalidInputError(
            f"{path}: column {name!r} ([data] split_column): {len(wrong):,} of {len(column):,} rows hold another value "
            f"such as {wrong[0].as_py()!r}; each must say one of {list(PARTS)}"
        )
    parts: NDArray[np.int8] = places.to_numpy().astype(np.int8)
    return parts


def check_id_feature(feature: Feature, path: Path) -> None:
    """Refuses a feature that reads ids as something else than categories or text."""
    if feature.kind not in ("categorical", "text"):
        raise InvalidInputError(
            f"{path}: feature {feature.name!r} reads the ids in {feature.column!r} as {feature.kind}; "
            "use kind = 'categorical'"
        )


def check_type(found: pa.DataType, feature: Feature, path: Path) -> None:
    """Refuses a type of column that does not fit the kind of the feature."""
    fits, expected = _EXPECTED_TYPES[feature.kind]
    if pa.types.is_dictionary(found):
        found = found.value_type
    if pa.types.is_null(found) or fits(found):
        return
    advice = "; CSV files cannot hold lists, use Parquet" if path.suffix.lower() in (".csv", ".tsv") else ""
    raise InvalidInputError(
        f"{path}: column {feature.column!r} is {found}, but feature {feature.name!r} of kind {feature.kind} needs "
        f"{expected}; change the column or the kind{advice if 'list' in expected else ''}"
    )


def raw_values(column: pa.ChunkedArray, feature: Feature, path: Path) -> list[RawValue]:
    """JSON-able values, None where missing; a float that is not a number is missing."""
    column = _plain(column)
    if feature.kind == "timestamp" and not pa.types.is_null(column.type):
        column = _seconds(column)
    elif pa.types.is_decimal(column.type):
        column = column.cast(pa.float64())
    values: list[RawValue] = column.to_pylist()
    if pa.types.is_floating(column.type):
        values = [_without_nan(value) for value in values]
        num_infinite = sum(1 for value in values if value in (math.inf, -math.inf))
        if num_infinite:
            raise InvalidInputError(
                f"{path}: column {feature.column!r} (feature {feature.name!r}): {num_infinite:,} values are infinite; "
                "leave them empty or give finite numbers"
            )
    if feature.kind == "categorical" and pa.types.is_floating(column.type):
        fractional = next((value for value in values if isinstance(value, float) and not value.is_integer()), None)
        if fractional is not None:
            raise InvalidInputError(
                f"{path}: column {feature.column!r} holds {fractional}, but feature {feature.name!r} of kind "
                "categorical needs strings or integers; use kind = 'number'"
            )
    return values


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def _seconds(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Numbers, dates, or dates and times, as float Unix seconds."""
    if pa.types.is_date(column.type):
        column = column.cast(pa.timestamp("us"))
    if pa.types.is_timestamp(column.type):
        microseconds = column.cast(pa.timestamp("us", tz=column.type.tz), safe=False).cast(pa.int64())
        return pc.divide(microseconds.cast(pa.float64()), 1e6)
    return column.cast(pa.float64(), safe=False)


def _without_nan(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def _is_string(found: pa.DataType) -> bool:
    return bool(pa.types.is_string(found) or pa.types.is_large_string(found))


def _is_number(found: pa.DataType) -> bool:
    return bool(pa.types.is_integer(found) or pa.types.is_floating(found) or pa.types.is_decimal(found))


def _is_moment(found: pa.DataType) -> bool:
    return _is_number(found) or bool(pa.types.is_timestamp(found) or pa.types.is_date(found))


def _is_list_of(found: pa.DataType, fits: Callable[[pa.DataType], bool]) -> bool:
    is_list = pa.types.is_list(found) or pa.types.is_large_list(found) or pa.types.is_fixed_size_list(found)
    return is_list and (fits(found.value_type) or pa.types.is_null(found.value_type))


def _is_category(found: pa.DataType) -> bool:
    return _is_string(found) or bool(pa.types.is_integer(found) or pa.types.is_boolean(found))


_EXPECTED_TYPES: Mapping[str, tuple[Callable[[pa.DataType], bool], str]] = {
    "categorical": (lambda found: _is_category(found) or pa.types.is_floating(found), "strings or integers"),
    "categorical_list": (lambda found: _is_list_of(found, _is_category), "a list of strings or integers"),
    "number": (_is_number, "numbers"),
    "timestamp": (_is_moment, "Unix seconds or date and time"),
    "text": (_is_string, "strings"),
    "vector": (lambda found: _is_list_of(found, _is_number), "a list of numbers"),
}
