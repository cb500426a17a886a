"""Conditions on the attributes of items, as a tree.

Deliberately does not know where they come from, nor how they are evaluated.

The tree is as small as it can be: `equals` is one value of `OneOf`, and "none of" is `Exists` without `OneOf`. Trees
that mean the same in the same order are equal, so they can be keys of a cache.
"""

from dataclasses import dataclass
from typing import TypeAlias

Value: TypeAlias = str | float
"""A string or a number; booleans are "true" and "false", moments and dates Unix seconds."""


@dataclass(frozen=True)
class OneOf:
    """The attribute, or one of its entries, is one of these values."""

    attribute: str
    values: frozenset[Value]
    """Strings only or numbers only."""


@dataclass(frozen=True)
class Range:
    """The attribute, or one of its entries, is a number or a moment within bounds; None: no bound."""

    attribute: str
    at_least: float | None = None
    greater_than: float | None = None
    at_most: float | None = None
    less_than: float | None = None


@dataclass(frozen=True)
class Exists:
    """The item has the attribute: it is not null, not NaN, and not a list without entries."""

    attribute: str


@dataclass(frozen=True)
class AllMet:
    """All of these are met; without any, every item meets it."""

    conditions: "tuple[Condition, ...]"


@dataclass(frozen=True)
class AnyMet:
    """At least one of these is met; without any, no item meets it."""

    conditions: "tuple[Condition, ...]"


@dataclass(frozen=True)
class NotMet:
    """This is not met."""

    condition: "Condition"


Condition: TypeAlias = OneOf | Range | Exists | AllMet | AnyMet | NotMet


def none_of(attribute: str, values: frozenset[Value]) -> Condition:
    """The item has the attribute, and neither it nor one of its entries is one of these values."""
    return AllMet((Exists(attribute), NotMet(OneOf(attribute, values))))
