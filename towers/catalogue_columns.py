"""What a table of items may hold: ids that can be used, names that can be stored, and columns in the catalogue's types.

Deliberately does not know where the catalogue is kept, nor what was changed when.
"""

import re
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from towers.errors import InvalidInputError

ITEM_ID = "item_id"
MAX_ITEM_ID_BYTES = 1024
_FORBIDDEN_IN_NAMES = re.compile(r"[ ,;{}()\n\t=]")
"""What Delta Lake does not allow in the name of a column."""


def checked_ids(items: pa.Table) -> pa.Array:
    """The ids as strings `[N]`."""
    if items.num_rows == 0:
        raise InvalidInputError("the items have no rows; give at least one")
    if items.column_names.count(ITEM_ID) != 1:
        raise InvalidInputError(
            f"the items need exactly one column {ITEM_ID!r}; the columns are {sorted(items.column_names)}"
        )
    try:
        items.validate(full=True)
    except pa.ArrowException as error:
        raise InvalidInputError(f"the items are not a valid table: {error}") from error
    column = items[ITEM_ID].combine_chunks()
    type_ = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not (pa.types.is_integer(type_) or _is_string(type_)):
        raise InvalidInputError(f"column {ITEM_ID!r}: expected strings or integers, got {type_}")
    ids = column.cast(type_).cast(pa.string())
    for reason, is_wrong in (
        ("is null", ids.is_null()),
        ("is empty", pc.equal(ids, "")),
        ("contains a NUL character", pc.match_substring(ids, "\0")),
        (f"is longer than {MAX_ITEM_ID_BYTES} bytes", pc.greater(pc.binary_length(ids), MAX_ITEM_ID_BYTES)),
    ):
        row = pc.index(is_wrong, True).as_py()
        if row >= 0:
            raise InvalidInputError(f"column {ITEM_ID!r}, row {row}: the id {reason}")
    return ids


def check_names(names: Sequence[str]) -> None:
    """Refuses names of attributes that cannot be stored.

    Raises:
        InvalidInputError: a name is reserved, is not one that Delta Lake has, or stands for two columns.
    """
    seen: set[str] = set()
    for name in names:
        if not name or name.startswith("_"):
            raise InvalidInputError(f"column {name!r}: names that start with '_' are reserved; rename it")
        if _FORBIDDEN_IN_NAMES.search(name):
            raise InvalidInputError(f"column {name!r}: a name has no space and none of ,;{{}}()=; rename it")
        if name.lower() in seen or name.lower() == ITEM_ID:
            raise InvalidInputError(f"column {name!r}: another column has this name (case aside); rename one")
        seen.add(name.lower())


def conformed_columns(attributes: pa.Table, existing: dict[str, pa.DataType]) -> dict[str, pa.Array]:
    """Columns in the types of the catalogue; new columns in those that Delta Lake has."""
    spelled = {name.lower(): name for name in existing}
    columns: dict[str, pa.Array] = {}
    for name, column in zip(attributes.column_names, attributes.columns, strict=True):
        if spelled.get(name.lower(), name) != name:
            raise InvalidInputError(
                f"column {name!r}: the catalogue spells it {spelled[name.lower()]!r}; use the same name"
            )
        target = existing.get(name)
        type_ = stored_type(column.type)
        if target is None:
            if type_ is None:
                raise InvalidInputError(
                    f"column {name!r}: type {column.type} cannot be stored; convert it to a string or a number"
                )
            if _is_untyped(type_):
                continue  # Only nulls: says nothing, not even its type.
            target = type_
        elif type_ is None or not _is_castable(type_, target):
            raise _type_conflict(name, column.type, target)
        try:
            columns[name] = column.cast(options=pc.CastOptions(target, allow_time_truncate=True)).combine_chunks()
        except pa.ArrowException as error:
            raise _type_conflict(name, column.type, target) from error
    return columns


def stored_type(type_: pa.DataType) -> pa.DataType | None:
    """The type that stands for a column's in the catalogue; None for one that is not stored.

    Integers are int64, so that a file with narrower ones is no conflict; decimals are numbers like others; a timestamp
    without a time zone is UTC.
    """
    if pa.types.is_dictionary(type_):
        return stored_type(type_.value_type)
    if _is_list(type_):
        value_type = stored_type(type_.value_type)
        return None if value_type is None else pa.list_(value_type)
    if _is_string(type_):
        return pa.string()
    if pa.types.is_integer(type_):
        return pa.int64()
    if pa.types.is_float16(type_) or pa.types.is_float32(type_):
        return pa.float32()
    if pa.types.is_float64(type_) or pa.types.is_decimal(type_):
        return pa.float64()
    if pa.types.is_timestamp(type_):
        return pa.timestamp("us", "UTC")
    if pa.types.is_date(type_):
        return pa.date32()
    if pa.types.is_boolean(type_) or pa.types.is_null(type_):
        return type_
    return None


def _type_conflict(name: str, given: pa.DataType, existing: pa.DataType) -> InvalidInputError:
    return InvalidInputError(
        f"column {name!r}: its type is {given}, in the catalogue it is {existing}; convert the column"
    )


def _is_castable(given: pa.DataType, target: pa.DataType) -> bool:
    """Whether values may be cast: the same type, nulls, or numbers (the cast itself checks that nothing is lost)."""
    if given == target or pa.types.is_null(given):
        return True
    if pa.types.is_list(given) and pa.types.is_list(target):
        return _is_castable(given.value_type, target.value_type)
    is_number = pa.types.is_integer(given) or pa.types.is_floating(given)
    return bool(is_number and target in (pa.int64(), pa.float64()))


def _is_string(type_: pa.DataType) -> bool:
    return bool(pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_string_view(type_))


def _is_list(type_: pa.DataType) -> bool:
    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list, pa.types.is_list_view)
    return any(is_kind(type_) for is_kind in kinds) or bool(pa.types.is_large_list_view(type_))


def _is_untyped(type_: pa.DataType) -> bool:
    return bool(pa.types.is_null(type_) or (pa.types.is_list(type_) and _is_untyped(type_.value_type)))
