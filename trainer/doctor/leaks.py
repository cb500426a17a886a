"""Features that were made from the answers: whose values say for certain what a user will choose.

Deliberately does not know the towers: a leak is in the data.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from towers.features import RawValue, category_token
from towers.schema import CategoricalFeature, CategoricalListFeature, Owner
from trainer.data import ITEM_ID, USER_ID
from trainer.doctor.subject import Subject

MIN_SHARE = 0.9
"""Of the others with a value who chose the item."""
MIN_OTHERS: Mapping[Owner, int] = {"query": 1, "item": 3}
"""With a value, to know anything by it. Who reads a book reads others of its author; only who reads all of many is in
the data that they were listed by."""
MAX_CHANCE = 1e-4
"""That so many of them all chose it for its popularity: a blockbuster of one country is no leak."""
_MAX_TARGETS = 500
"""Each is compared with all holders of all its values."""


def certain_share(subject: Subject) -> dict[str, float]:
    """Of each categorical feature and each list, the share of test targets that its values give away.

    A value gives the pair of a user and an item away where nearly all other users with that value chose the item, or,
    of an item's feature, where the user chose nearly all other items with that value. Ids are no such values: what is
    the user's or the item's own nobody shares.
    """
    log = subject.data.log
    rows, targets = subject.questions.targets.pairs()
    step = -(-len(rows) // _MAX_TARGETS)
    users = log.users[subject.questions.positions][rows][::step].tolist()
    items = targets[::step].tolist()
    users_of, items_of = partners(log.items, log.users, items), partners(log.users, log.items, users)
    shares = {}
    for feature in subject.published.fitted.schema.features:
        if not isinstance(feature, CategoricalFeature | CategoricalListFeature) or feature.column in (USER_ID, ITEM_ID):
            continue
        if feature.owner == "query":
            column, linked, pairs = subject.data.users.columns[feature.column], users_of, zip(users, items, strict=True)
        else:
            column, linked, pairs = subject.data.items.columns[feature.column], items_of, zip(items, users, strict=True)
        shares[feature.name] = given_away(column, linked, pairs, MIN_OTHERS[feature.owner])
    return shares


def partners(keys: NDArray[np.int64], values: NDArray[np.int64], wanted: Sequence[int]) -> dict[int, set[int]]:
    """Of pairs `[N]` of keys and values, all values of each wanted key."""
    found: dict[int, set[int]] = {key: set() for key in wanted}
    is_wanted = np.isin(keys, list(found))
    for key, value in zip(keys[is_wanted].tolist(), values[is_wanted].tolist(), strict=True):
        found[key].add(value)
    return found


def given_away(
    column: Sequence[RawValue], linked: Mapping[int, set[int]], pairs: Iterable[tuple[int, int]], min_others: int
) -> float:
    """Share of pairs that a value gives away.

    Args:
        column: `[R]` values of one side, or lists of them.
        linked: Of each row of the other side, the rows of this side that it goes with.
        pairs: Of a row of this side and one of the other, that go together; there is one.
        min_others: Rows besides with a value, to know anything by it.
    """
    tokens_of = [_tokens(value) for value in column]
    holders: dict[str, set[int]] = {}
    for row, tokens in enumerate(tokens_of):
        for token in tokens:
            holders.setdefault(token, set()).add(row)
    verdicts = [
        any(
            len(holders[token]) > min_others and is_certain(holders[token], linked[other], len(column))
            for token in tokens_of[row]
        )
        for row, other in pairs
    ]
    return sum(verdicts) / len(verdicts)


def is_certain(holders: set[int], linked: set[int], num_rows: int) -> bool:
    """Whether a value tells of a row what it goes with, were that not known.

    That is: nearly all others that have the value go with it, and chance would hardly ever have so many of them do so.

    Args:
        holders: Rows with the value; the row itself is one.
        linked: Rows that go with it; the row itself is one.
        num_rows: Of this side.
    """
    hits, others = len(holders & linked) - 1, len(holders) - 1
    if not hits or hits < MIN_SHARE * others:
        return False
    return hits * math.log((len(linked) - 1) / (num_rows - 1)) <= math.log(MAX_CHANCE)


def _tokens(value: RawValue) -> set[str]:
    entries = value if isinstance(value, list) else [value]
    return {token for token in map(category_token, entries) if token is not None}
