"""Plain Python values as the messages hold them.

Deliberately does not know what a value is for: each error begins with the words that say where the value stands.
"""

import math
import numbers
from collections.abc import Sequence
from datetime import UTC, date, datetime
from typing import Any

from retrieval.feature.v1 import feature_pb2

_LARGEST_EXACT_INTEGER = 2**53


def feature_value(where: str, value: Any) -> feature_pb2.FeatureValue:
    """Any value; None is missing.

    Raises:
        TypeError: no string, number, boolean, moment, list of strings or list of numbers.
        ValueError: a number that is not finite, an integer too large to be sent exactly, or text that is not Unicode.
    """
    if hasattr(value, "tolist"):
        value = value.tolist()
    if value is None:
        return feature_pb2.FeatureValue()
    if isinstance(value, str):
        return feature_pb2.FeatureValue(string_value=_encodable(where, value))
    if isinstance(value, bool):
        return feature_pb2.FeatureValue(string_value="true" if value else "false")
    if isinstance(value, datetime):
        moment = value if value.tzinfo else value.replace(tzinfo=UTC)
        return feature_pb2.FeatureValue(number_value=moment.timestamp())
    if isinstance(value, date):
        return feature_value(where, datetime(value.year, value.month, value.day, tzinfo=UTC))
    if isinstance(value, numbers.Real):
        return feature_pb2.FeatureValue(number_value=_number(where, value))
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return list_value(where, value)
    raise TypeError(
        f"{where}: expected a string, a number, a list of strings or a list of numbers, got {type(value).__name__}"
    )


def list_value(where: str, values: Sequence[Any]) -> feature_pb2.FeatureValue:
    """A list of strings or a list of numbers; raises as `feature_value`."""
    if all(isinstance(entry, str) for entry in values):
        strings = [_encodable(where, entry) for entry in values]
        return feature_pb2.FeatureValue(string_list=feature_pb2.StringList(values=strings))
    if all(isinstance(entry, numbers.Real) and not isinstance(entry, bool) for entry in values):
        floats = [_number(where, entry) for entry in values]
        return feature_pb2.FeatureValue(number_list=feature_pb2.NumberList(values=floats))
    types = sorted({type(entry).__name__ for entry in values})
    raise TypeError(f"{where}: a list holds only strings or only numbers, got {', '.join(types)}")


def _number(where: str, value: numbers.Real) -> float:
    if isinstance(value, numbers.Integral) and abs(int(value)) > _LARGEST_EXACT_INTEGER:
        raise ValueError(f"{where}: {value} is too large to be sent exactly; pass an id as a string")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{where}: expected a finite number, got {number}")
    return number


def _encodable(where: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: {text[:40]!r} is not valid Unicode") from error
    return text
