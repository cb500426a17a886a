"""Conditions on the attributes of items, in Python: `attribute("year").within(at_least=1990)`.

Deliberately does not know which attributes there are: the service says which may be named, and what they hold.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date, datetime

from retrieval.feature.v1 import feature_pb2, filter_pb2

from retrieval_client.values import feature_value

FilterValue = str | float | bool | datetime | date
"""What an attribute is compared with; a moment without a zone, and a date, are UTC."""


@dataclass(frozen=True)
class Filter:
    """A condition that items must meet. Combine conditions with `&`, `|` and `~`."""

    message: filter_pb2.Filter

    def __and__(self, other: "Filter") -> "Filter":
        return all_of(self, other)

    def __or__(self, other: "Filter") -> "Filter":
        return any_of(self, other)

    def __invert__(self) -> "Filter":
        return Filter(filter_pb2.Filter(not_met=self.message))

    def __bool__(self) -> bool:
        raise TypeError("a filter is neither true nor false here; combine filters with &, | and ~, not and, or, not")


def all_of(*filters: Filter) -> Filter:
    """All of these are met."""
    return Filter(filter_pb2.Filter(all_met=filter_pb2.Filters(filters=[part.message for part in filters])))


def any_of(*filters: Filter) -> Filter:
    """At least one of these is met."""
    return Filter(filter_pb2.Filter(any_met=filter_pb2.Filters(filters=[part.message for part in filters])))


@dataclass(frozen=True)
class Attribute:
    """An attribute of items, to be compared.

    An attribute that holds a list is compared entry by entry, and one entry is enough. An item that lacks the attribute
    meets no comparison, not even `none_of`.
    """

    name: str

    def equals(self, value: FilterValue) -> Filter:
        """The attribute is this value.

        Raises:
            TypeError: a value that no attribute has.
            ValueError: a number that is not finite, or too large to be sent exactly.
        """
        message = filter_pb2.Equals(attribute=self.name, value=self._value(value))
        return Filter(filter_pb2.Filter(equals=message))

    def one_of(self, values: Iterable[FilterValue]) -> Filter:
        """The attribute is one of these values, all of one kind; raises as `equals`."""
        return Filter(filter_pb2.Filter(one_of=filter_pb2.OneOf(attribute=self.name, values=self._values(values))))

    def none_of(self, values: Iterable[FilterValue]) -> Filter:
        """The item has the attribute, and it is none of these values, all of one kind; raises as `equals`."""
        return Filter(filter_pb2.Filter(none_of=filter_pb2.NoneOf(attribute=self.name, values=self._values(values))))

    def within(
        self,
        *,
        at_least: float | datetime | date | None = None,
        greater_than: float | datetime | date | None = None,
        at_most: float | datetime | date | None = None,
        less_than: float | datetime | date | None = None,
    ) -> Filter:
        """The attribute is a number or a moment within bounds, of which at least one is given; raises as `equals`."""
        message = filter_pb2.Range(
            attribute=self.name,
            at_least=self._bound(at_least),
            greater_than=self._bound(greater_than),
            at_most=self._bound(at_most),
            less_than=self._bound(less_than),
        )
        return Filter(filter_pb2.Filter(range=message))

    def exists(self) -> Filter:
        """The item has the attribute."""
        return Filter(filter_pb2.Filter(exists=filter_pb2.Exists(attribute=self.name)))

    def _bound(self, bound: float | datetime | date | None) -> float | None:
        if bound is None:
            return None
        value = self._value(bound)
        if value.WhichOneof("value") != "number_value":
            raise TypeError(f"{self._where}: a bound is a number or a moment, got {type(bound).__name__}")
        return value.number_value

    def _value(self, value: FilterValue) -> feature_pb2.FeatureValue:
        message = feature_value(self._where, value)
        if message.WhichOneof("value") not in ("string_value", "number_value"):
            raise TypeError(f"{self._where}: expected one value, got {type(value).__name__}; for several use one_of")
        return message

    def _values(self, values: Iterable[FilterValue]) -> feature_pb2.FeatureValue:
        if isinstance(values, str):
            raise TypeError(f"{self._where}: expected a list of values, got the string {values[:40]!r}; use equals")
        sent = [self._value(value) for value in values]
        strings = [value.string_value for value in sent if value.HasField("string_value")]
        numbers = [value.number_value for value in sent if value.HasField("number_value")]
        if strings and numbers:
            raise TypeError(f"{self._where}: the values must be all strings or all numbers")
        if numbers:
            return feature_pb2.FeatureValue(number_list=feature_pb2.NumberList(values=numbers))
        return feature_pb2.FeatureValue(string_list=feature_pb2.StringList(values=strings))

    @property
    def _where(self) -> str:
        return f"filter: attribute {self.name!r}"


def attribute(name: str) -> Attribute:
    """An attribute of items, by its name in the catalogue."""
    return Attribute(name)
