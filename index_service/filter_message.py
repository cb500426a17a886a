"""Filters as they arrive: checked, and turned into conditions.

Deliberately does not know which attributes there are.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Literal

from retrieval.feature.v1 import feature_pb2, filter_pb2

from index_service.filters import AllMet, AnyMet, Condition, Exists, NotMet, OneOf, Range, Value, none_of
from towers.errors import InvalidInputError

MAX_DEPTH = 32
MAX_CONDITIONS = 1_000
MAX_VALUES = 10_000
"""Of one filter, all its conditions together."""

_BOUNDS: tuple[Literal["at_least", "greater_than", "at_most", "less_than"], ...] = (
    "at_least",
    "greater_than",
    "at_most",
    "less_than",
)
_KINDS = "equals, one_of, none_of, range, exists, all_met, any_met or not_met"


def condition_of(message: filter_pb2.Filter) -> Condition:
    """Reads a filter.

    Raises:
        InvalidInputError: a part of it is missing, empty, not finite or too much; the message gives its path.
    """
    return _Reader().condition(message, "filter", 1)


class _Reader:
    """Counts what one filter asks for."""

    def __init__(self) -> None:
        self._num_conditions = 0
        self._num_values = 0

    def condition(self, message: filter_pb2.Filter, path: str, depth: int) -> Condition:
        if depth > MAX_DEPTH:
            raise InvalidInputError(f"{path}: more than {MAX_DEPTH} conditions lie within each other; flatten them")
        self._num_conditions += 1
        if self._num_conditions > MAX_CONDITIONS:
            raise InvalidInputError(
                f"{path}: more than {MAX_CONDITIONS} conditions; compare an attribute with many values by one_of"
            )
        match message.WhichOneof("condition"):
            case None:
                raise InvalidInputError(f"{path}: no condition is set; set one of {_KINDS}")
            case "equals":
                attribute = _attribute(message.equals.attribute, f"{path}.equals")
                return OneOf(attribute, frozenset((_value(message.equals.value, f"{path}.equals.value"),)))
            case "one_of":
                attribute = _attribute(message.one_of.attribute, f"{path}.one_of")
                return OneOf(attribute, self._values(message.one_of.values, f"{path}.one_of.values"))
            case "none_of":
                attribute = _attribute(message.none_of.attribute, f"{path}.none_of")
                return none_of(attribute, self._values(message.none_of.values, f"{path}.none_of.values"))
            case "range":
                return _range(message.range, f"{path}.range")
            case "exists":
                return Exists(_attribute(message.exists.attribute, f"{path}.exists"))
            case "all_met":
                return AllMet(self._conditions(message.all_met, f"{path}.all_met", depth))
            case "any_met":
                return AnyMet(self._conditions(message.any_met, f"{path}.any_met", depth))
            case "not_met":
                return NotMet(self.condition(message.not_met, f"{path}.not_met", depth + 1))

    def _conditions(self, message: filter_pb2.Filters, path: str, depth: int) -> tuple[Condition, ...]:
        if not message.filters:
            raise InvalidInputError(f"{path}.filters is empty; give at least one condition")
        return tuple(
            self.condition(part, f"{path}.filters[{position}]", depth + 1)
            for position, part in enumerate(message.filters)
        )

    def _values(self, message: feature_pb2.FeatureValue, path: str) -> frozenset[Value]:
        values: Sequence[Value]
        match message.WhichOneof("value"):
            case "string_list":
                values = message.string_list.values
            case "number_list":
                values = _finite(message.number_list.values, path)
            case _:
                raise InvalidInputError(f"{path}: expected a list of strings or a list of numbers")
        self._num_values += len(values)
        if self._num_values > MAX_VALUES:
            raise InvalidInputError(f"{path}: more than {MAX_VALUES} values in one filter; send fewer")
        return frozenset(values)


def _attribute(name: str, path: str) -> str:
    if not name:
        raise InvalidInputError(f"{path}.attribute is empty; name an attribute")
    return name


def _value(message: feature_pb2.FeatureValue, path: str) -> Value:
    match message.WhichOneof("value"):
        case "string_value":
            return message.string_value
        case "number_value":
            return _finite([message.number_value], path)[0]
        case None:
            raise InvalidInputError(
                f"{path}: expected a string or a number; where the attribute may be missing, use exists"
            )
        case _:
            raise InvalidInputError(f"{path}: expected one string or one number; for several values use one_of")


def _range(message: filter_pb2.Range, path: str) -> Range:
    attribute = _attribute(message.attribute, path)
    bounds = {name: getattr(message, name) for name in _BOUNDS if message.HasField(name)}
    if not bounds:
        raise InvalidInputError(f"{path}: no bound is set; set at least one of {', '.join(_BOUNDS)}")
    for name, bound in bounds.items():
        _finite([bound], f"{path}.{name}")
    return Range(attribute, **bounds)


def _finite(values: Iterable[float], path: str) -> list[float]:
    numbers = list(values)
    for number in numbers:
        if not math.isfinite(number):
            raise InvalidInputError(f"{path}: expected a finite number, got {number}")
    return numbers
