"""The rule of two towers in the data: a column of one side must not differ between rows of the other.

Deliberately does not know files, how features are encoded, nor what is done with those that break the rule.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from towers.schema import RERANKER_ADVICE, Feature, Owner

_NAMES: dict[Owner, str] = {"query": "user", "item": "item"}
MISSING = -1
"""Code of a value that is not there."""


@dataclass(frozen=True)
class Coded:
    """A column of N rows as codes of its distinct values."""

    codes: NDArray[np.integer[Any]]
    """`[N]` places in `values`, or `MISSING`."""
    values: Sequence[Any] | NDArray[Any]

    def said(self, row: int) -> str:
        """The value in a row, for messages."""
        value = self.values[self.codes[row]]
        return f"{value:.15g}" if isinstance(value, float) else str(value)[:60]


def crossing(feature: Feature, owners: Coded, others: Coded, moments: Coded | None, values: Coded, where: str) -> str:
    """Says in which rows a column of one side differs between rows of the other, at one moment; empty if nowhere.

    Args:
        feature: Reads the column.
        owners: `[N]` ids of the side that owns the feature.
        others: `[N]` ids of the other side.
        moments: `[N]` when each row was so. None: all at one moment.
        values: `[N]` the column.
        where: The table, for the message.
    """
    codes = np.zeros_like(owners.codes) if moments is None else moments.codes
    rows = differing_rows(owners.codes, codes, others.codes, values.codes)
    if rows is None:
        return ""
    owner, other = _NAMES[feature.owner], _NAMES["item" if feature.owner == "query" else "query"]
    at = "" if moments is None else f" at {moments.said(rows[0])}"
    first, second = (f"{values.said(row)} with {other} {others.said(row)!r}" for row in rows)
    return (
        f"{where}: feature {feature.name!r}: its column {feature.column!r} differs between {other}s: {owner} "
        f"{owners.said(rows[0])!r}{at} has {first} and {second}, so it needs both and cannot be in a tower; "
        f"{RERANKER_ADVICE}, or rename the column here if it is not the feature's"
    )


def differing_rows(
    owners: NDArray[Any], moments: NDArray[Any], others: NDArray[Any], values: NDArray[Any]
) -> tuple[int, int] | None:
    """Two rows of one owner at one moment with different others and different values; None if there are none.

    Args:
        owners: `[N]` codes, as all.
        moments: `[N]`
        others: `[N]`
        values: `[N]` rows that have none are no example.
    """
    there = np.flatnonzero(values != MISSING)
    if not len(there):
        return None
    rows = there[np.lexsort((moments[there], owners[there]))]
    is_first = (np.diff(owners[rows], prepend=-1) != 0) | (np.diff(moments[rows], prepend=-1) != 0)
    starts = np.flatnonzero(is_first)
    found = np.flatnonzero(_varies(values[rows], starts) & _varies(others[rows], starts))
    if not len(found):
        return None
    group = np.split(rows, starts[1:])[found[0]]
    first = group[0]
    elsewhere, otherwise = others[group] != others[first], values[group] != values[first]
    if (elsewhere & otherwise).any():
        return int(first), int(group[elsewhere & otherwise][0])
    # All others have the first's value, and all other values its other: one of each differ in both.
    return int(group[elsewhere][0]), int(group[otherwise][0])


def _varies(codes: NDArray[Any], starts: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether stretches of codes hold more than one."""
    varies: NDArray[np.bool_] = np.minimum.reduceat(codes, starts) != np.maximum.reduceat(codes, starts)
    return varies
