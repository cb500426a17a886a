"""Interactions, items and users, checked, ordered by time and split.

Deliberately does not know how files are read and columns are parsed (`trainer.files`, `trainer.columns`), how features
are encoded, nor what is trained on them.
"""

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from towers.errors import InvalidInputError
from towers.features import RawValue, category_token
from towers.schema import Feature, FeatureSchema, NumberFeature
from trainer import beir
from trainer.as_of import Popularity
from trainer.columns import (
    PARTS,
    check_id_feature,
    check_type,
    coded,
    codes_of,
    id_codes,
    labels_of,
    parts_of,
    raw_values,
    timestamps_of,
    weights_of,
)
from trainer.config import DataConfig
from trainer.files import check_columns, column_names, files_of, no_rows, read_parts, read_table, unreadable
from trainer.separation import Coded, crossing

USER_ID = "user_id"
ITEM_ID = "item_id"

_FEWEST_INTERACTIONS = 3
"""One each for training, validation and test."""


@dataclass(frozen=True)
class Entities:
    """Users or items, one row per id."""

    ids: Sequence[str]
    columns: Mapping[str, Sequence[RawValue]]
    """The columns that features read, by name; JSON-able values, None where missing."""
    name: str
    """Path of the file they come from, for messages."""


@dataclass(frozen=True)
class InteractionLog:
    """All interactions, ordered by user, then given part, then time, then position in the file; N of them.

    The history of the interaction at position p is `items[starts[p]:p]`.
    """

    users: NDArray[np.int64]
    """`[N]` row of the user."""
    items: NDArray[np.int64]
    """`[N]` row of the item."""
    timestamps_s: NDArray[np.float64]
    """`[N]` Unix seconds."""
    starts: NDArray[np.int64]
    """`[N]` position of the same user's first interaction."""
    weights: NDArray[np.float64] | None = None
    """`[N]` how much each counts in training beside the others; None where all count alike."""
    parts: NDArray[np.int8] | None = None
    """`[N]` places in `PARTS`, where the split is given."""


@dataclass(frozen=True)
class Split:
    """Positions in the log. A position's history is all of the same user's that stands before it.

    So a validation history is all of the user's training items, and a test history those and the validation items.
    Validation is empty where a given split has none.
    """

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    test: NDArray[np.int64]


@dataclass(frozen=True)
class Impressions:
    """M items that users were shown and did not choose, none of the time that is to be predicted."""

    users: NDArray[np.int64]
    """`[M]` row of the user."""
    items: NDArray[np.int64]
    """`[M]` row of the item."""
    num_left_out: int
    """Those of that time, which would tell of it."""


@dataclass(frozen=True)
class TrainingData:
    """What the files hold, as far as the features read it."""

    users: Entities
    items: Entities
    log: InteractionLog
    split: Split
    notes: tuple[str, ...]
    """What was left out and why, one line each."""
    crossings: tuple[str, ...] = ()
    """Which columns of one side differ between rows of the other, one line each: features that are in no tower."""
    impressions: Impressions | None = None
    """None where nothing says what was shown."""

    @cached_property
    def popularity(self) -> Popularity:
        """Of the items, from the interactions that training knows."""
        known = self.split.train
        if self.log.parts is not None:
            known = np.union1d(known, np.flatnonzero(self.log.parts == PARTS.index("history")))
        return Popularity.of(self.log.items[known], self.log.timestamps_s[known])


@dataclass(frozen=True)
class _Interactions:
    path: Path
    user_column: str
    item_column: str
    user_codes: NDArray[np.int32]
    user_ids: Sequence[str]
    item_codes: NDArray[np.int32]
    item_ids: Sequence[str]
    timestamps_s: NDArray[np.float64]
    weights: NDArray[np.float64] | None
    parts: NDArray[np.int8] | None
    """Places in `PARTS`."""
    is_chosen: NDArray[np.bool_] | None
    """None where all are."""
    split_column: str | None
    claimed: Mapping[str, Coded]
    """The columns that are a user's or an item's feature by their name."""


def read_data(config: DataConfig, schema: FeatureSchema, folder: Path) -> TrainingData:
    """Reads and checks the tables.

    Args:
        config: Names of files and columns.
        schema: Says which columns features read.
        folder: Where the files are.

    Raises:
        InvalidInputError: a file, a column, a type or a value is not as it must be, or too little is left to train
            on. The message names file, column and fix.
    """
    paths = data_files(config, folder)
    item_features = [feature for feature in schema.features if feature.source == "items"]
    user_features = [feature for feature in schema.features if feature.source == "users"]
    if config.layout == "beir":
        items, users, interactions, read_notes = _read_corpus(paths, item_features, user_features)
        crossings: list[str] = []
    else:
        items, users, interactions, read_notes, crossings = _read_tables(config, paths, item_features, user_features)
    rows, log_notes = _item_rows(interactions, items, paths["items"])
    users, user_rows, unlisted_notes = _user_rows(interactions, users)
    is_listed = rows >= 0
    kept = is_listed if interactions.is_chosen is None else is_listed & interactions.is_chosen
    weights = None if interactions.weights is None else interactions.weights[kept]
    parts = None if interactions.parts is None else interactions.parts[kept]
    log = order_by_time(user_rows[kept], rows[kept], interactions.timestamps_s[kept], weights, parts)
    split = split_by_time(log) if log.parts is None else split_as_given(log.parts)
    _check_enough(log, split, interactions)
    notes = [*read_notes, *log_notes, *unlisted_notes]
    impressions = None
    if interactions.is_chosen is not None:
        impressions = _impressions(interactions, user_rows, rows, log, split.train)
        if impressions.num_left_out:
            notes.append(
                f"{interactions.path}: column {config.label_column!r}: {impressions.num_left_out:,} rows that say 0 "
                "are not of the time, or the part of the split, that is trained on and were left out"
            )
    tables = TrainingData(users, items, log, split, tuple(notes), tuple(crossings), impressions)
    counted = [
        feature
        for feature in schema.of("item")
        if isinstance(feature, NumberFeature) and feature.source == "popularity"
    ]
    return dataclasses.replace(tables, items=_with_popularity(tables, counted)) if counted else tables


def _with_popularity(tables: TrainingData, features: Sequence[NumberFeature]) -> Entities:
    """The items with columns that count interactions, as they are once the last one trained on is past."""
    items, columns = tables.items, dict(tables.items.columns)
    last_s = tables.log.timestamps_s[tables.split.train].max()
    rows, after_s = np.arange(len(items.ids)), np.full(len(items.ids), np.nextafter(last_s, math.inf))
    for feature in features:
        if feature.column in columns:
            raise InvalidInputError(
                f"feature {feature.name!r}: its column {feature.column!r} is another feature's; popularity is counted, "
                "give it a column of its own"
            )
        columns[feature.column] = tables.popularity.before(rows, after_s, feature.window_days).tolist()
    return Entities(items.ids, columns, items.name)


def _read_tables(
    config: DataConfig, paths: Mapping[str, Path], item_features: Sequence[Feature], user_features: Sequence[Feature]
) -> tuple[Entities, Entities, _Interactions, list[str], list[str]]:
    """Items, users, interactions, notes and crossings."""
    items, notes, crossings = _read_entities(paths["items"], "items", config, item_features)
    interactions = _read_interactions(paths["interactions"], config, [*item_features, *user_features])
    if "users" in paths:
        users, user_notes, user_crossings = _read_entities(paths["users"], "users", config, user_features)
        notes, crossings = notes + user_notes, crossings + user_crossings
    else:
        users = _users_without_table(interactions, user_features)
    return items, users, interactions, notes, [*crossings, *_crossings(interactions, item_features, user_features)]


def _read_corpus(
    paths: Mapping[str, Path], item_features: Sequence[Feature], user_features: Sequence[Feature]
) -> tuple[Entities, Entities, _Interactions, list[str]]:
    documents, queries = beir.read_documents(paths["items"]), beir.read_queries(paths["users"])
    for table, path, features in ((documents, paths["items"], item_features), (queries, paths["users"], user_features)):
        if not len(table):
            raise InvalidInputError(f"{path}: the file has no records; write at least one")
        wanted = {feature.column: f"feature {feature.name!r}" for feature in features}
        check_columns(path, table.column_names, wanted)
    judgements, notes = beir.read_judgements(files_of(paths["interactions"], "interactions"), queries)
    items, item_notes = _entities(documents, paths["items"], "items", ITEM_ID, item_features)
    users, user_notes = _entities(queries, paths["users"], "users", USER_ID, user_features)
    interactions = _as_interactions([(paths["interactions"], judgements)], paths["interactions"], beir.COLUMNS, [])
    return items, users, interactions, item_notes + user_notes + notes


def data_files(config: DataConfig, folder: Path) -> dict[str, Path]:
    """Paths of the tables, by `interactions`, `items` and, where there is one, `users`."""
    names = {"interactions": config.interactions, "items": config.items, "users": config.users}
    return {table: folder / name for table, name in names.items() if name is not None}


def digest_files(paths: Mapping[str, Path]) -> dict[str, str]:
    """sha256 of each table's file, hexadecimal; of several files the sha256 of theirs, in order of their paths.

    Raises:
        InvalidInputError: a file cannot be read.
    """
    digests = {}
    for table, path in paths.items():
        if table == "items" and path.is_dir():
            # Their names are data too: the ids of the documents.
            documents = beir.document_files(path)
            of_files = [file.relative_to(path).as_posix() + _digest(file, table) for file in documents]
        else:
            of_files = [_digest(file, table) for file in files_of(path, table)]
        digests[table] = of_files[0] if len(of_files) == 1 else hashlib.sha256("".join(of_files).encode()).hexdigest()
    return digests


def read_item_texts(config: DataConfig, folder: Path, columns: Sequence[str]) -> dict[str, str]:
    """What items say in the first of some columns that their table has, by id; empty where it has none.

    Args:
        config: Names of files and columns.
        folder: Where the files are.
        columns: Names, whether or not a feature reads them.

    Raises:
        InvalidInputError: the item table cannot be read; names file, column and fix.
    """
    path = data_files(config, folder)["items"]
    if config.layout == "beir":
        table, id_column = beir.read_documents(path), ITEM_ID
    else:
        id_column = config.item_id_column
        available = column_names(path, config.csv_separator)
        wanted = {id_column: f"[data] {ITEM_ID}_column"} | {name: "" for name in columns if name in available}
        table = read_table(path, "items", wanted, list(wanted), config.csv_separator)
    column = next((name for name in columns if name in table.column_names), None)
    if column is None:
        return {}
    pairs = zip(table.column(id_column).to_pylist(), table.column(column).to_pylist(), strict=True)
    return {token: str(text) for item, text in pairs if text and (token := category_token(item)) is not None}


def _digest(path: Path, table: str) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InvalidInputError(unreadable(path, table, error)) from error


def order_by_time(
    users: NDArray[np.integer[Any]],
    items: NDArray[np.integer[Any]],
    timestamps_s: NDArray[np.float64],
    weights: NDArray[np.float64] | None = None,
    parts: NDArray[np.int8] | None = None,
) -> InteractionLog:
    """Orders interactions `[N]` by user, then part, then time; those of one moment stay in the order they came in.

    By part first, so that a history to train on holds nothing that is to be predicted, however the split was made.
    """
    order = np.lexsort((timestamps_s, users) if parts is None else (timestamps_s, parts, users))
    ordered = users[order].astype(np.int64)
    first = np.flatnonzero(np.diff(ordered, prepend=-1))
    return InteractionLog(
        ordered,
        items[order].astype(np.int64),
        timestamps_s[order],
        np.repeat(first, np.diff(first, append=len(ordered))),
        None if weights is None else weights[order],
        None if parts is None else parts[order],
    )


def split_by_time(log: InteractionLog) -> Split:
    """Each user's last interaction is test, the one before is validation, the rest is train.

    All interactions of users with fewer than three are train.
    """
    _, first, counts = np.unique(log.users, return_index=True, return_counts=True)
    last = (first + counts - 1)[counts >= _FEWEST_INTERACTIONS].astype(np.int64)
    is_train = np.ones(len(log.users), dtype=bool)
    is_train[last] = is_train[last - 1] = False
    return Split(train=np.flatnonzero(is_train), validation=last - 1, test=last)


def split_as_given(parts: NDArray[np.int8]) -> Split:
    """The split that the interactions `[N]` of an ordered log name themselves."""
    train, _, validation, test = (np.flatnonzero(parts == part) for part in range(len(PARTS)))
    return Split(train, validation, test)


def _impressions(
    interactions: _Interactions,
    users: NDArray[np.int32],
    items: NDArray[np.int32],
    log: InteractionLog,
    train: NDArray[np.int64],
) -> Impressions:
    """What was shown and not chosen, of rows `[N]` of users and items, as far as training may know of it.

    Where the split is given that is what it says to train on; else nothing after the user's last interaction at the
    positions to train on.
    """
    assert interactions.is_chosen is not None
    shown = np.flatnonzero((items >= 0) & ~interactions.is_chosen)
    if interactions.parts is not None:
        known = shown[interactions.parts[shown] == PARTS.index("train")]
    else:
        last_s = np.full(max(users.max(), log.users.max()) + 1, -math.inf)
        np.maximum.at(last_s, log.users[train], log.timestamps_s[train])
        known = shown[interactions.timestamps_s[shown] <= last_s[users[shown]]]
    return Impressions(users[known].astype(np.int64), items[known].astype(np.int64), len(shown) - len(known))


def data_window(log: InteractionLog, positions: NDArray[np.int64]) -> tuple[datetime, datetime]:
    """First and last moment of the interactions at some positions."""
    moments_s = log.timestamps_s[positions]
    return (datetime.fromtimestamp(moments_s.min(), UTC), datetime.fromtimestamp(moments_s.max(), UTC))


def _read_interactions(path: Path, config: DataConfig, features: Sequence[Feature]) -> _Interactions:
    """The interactions, with what else they say under the name of a feature's column."""
    columns = {
        config.user_id_column: "[data] user_id_column",
        config.item_id_column: "[data] item_id_column",
        config.timestamp_column: "[data] timestamp_column",
    }
    as_strings = [config.user_id_column, config.item_id_column]
    if config.weight_column is not None:
        columns.setdefault(config.weight_column, "[data] weight_column")
    if config.split_column is not None:
        columns.setdefault(config.split_column, "[data] split_column")
        as_strings.append(config.split_column)
    if config.label_column is not None:
        columns.setdefault(config.label_column, "[data] label_column")
    files = files_of(path, "interactions")
    in_all = set.intersection(*(set(column_names(file, config.csv_separator)) for file in files))
    own = {USER_ID, ITEM_ID, *columns}
    claimed = sorted({feature.column for feature in features if feature.column in in_all} - own)
    columns |= {name: f"a feature's column {name!r}" for name in claimed}
    tables = (
        (file, part)
        for file in files
        for part in read_parts(file, "interactions", columns, as_strings, config.csv_separator)
    )
    return _as_interactions(tables, path, config, claimed)


def _as_interactions(
    tables: Iterable[tuple[Path, pa.Table]], path: Path, config: DataConfig, claimed: Sequence[str]
) -> _Interactions:
    """Interactions from tables with the file of each, for messages."""
    # Columns a part at a time: what is kept of a row are two codes and its numbers, never its strings.
    user_codes, item_codes, timestamps_s, weights, parts, is_chosen = [], [], [], [], [], []
    user_code_of: dict[str, int] = {}
    item_code_of: dict[str, int] = {}
    value_codes: dict[str, list[NDArray[np.int32]]] = {name: [] for name in claimed}
    value_code_of: dict[str, dict[str, int]] = {name: {} for name in claimed}
    for file, part in tables:
        user_codes.append(id_codes(part, file, config.user_id_column, user_code_of))
        item_codes.append(id_codes(part, file, config.item_id_column, item_code_of))
        timestamps_s.append(timestamps_of(part, file, config.timestamp_column))
        if config.weight_column is not None:
            weights.append(weights_of(part, file, config.weight_column))
        if config.split_column is not None:
            parts.append(parts_of(part, file, config.split_column))
        if config.label_column is not None:
            is_chosen.append(labels_of(part, file, config.label_column))
        for name in claimed:
            value_codes[name].append(codes_of(part.column(name), value_code_of[name]))
    if not user_codes:
        raise InvalidInputError(no_rows(path, "interactions"))
    if is_chosen and not any(labels.any() for labels in is_chosen):
        raise InvalidInputError(
            f"{path}: column {config.label_column!r} ([data] label_column): no row says 1; give what was chosen too"
        )
    user_ids, item_ids = list(user_code_of), list(item_code_of)
    for name, ids in ((config.user_id_column, user_ids), (config.item_id_column, item_ids)):
        if len(ids) < 2:
            raise InvalidInputError(
                f"{path}: column {name!r}: {ids[0]!r} is the only id; training needs at least two different ones"
            )
    return _Interactions(
        path,
        config.user_id_column,
        config.item_id_column,
        np.concatenate(user_codes),
        user_ids,
        np.concatenate(item_codes),
        item_ids,
        np.concatenate(timestamps_s),
        np.concatenate(weights) if weights else None,
        np.concatenate(parts) if parts else None,
        np.concatenate(is_chosen) if is_chosen else None,
        config.split_column,
        {name: Coded(np.concatenate(codes), list(value_code_of[name])) for name, codes in value_codes.items()},
    )


def _crossings(
    interactions: _Interactions, item_features: Sequence[Feature], user_features: Sequence[Feature]
) -> list[str]:
    """Of columns that the interactions have too; there they may differ with both sides of a pair."""
    if not interactions.claimed:
        return []
    users = Coded(interactions.user_codes, interactions.user_ids)
    items = Coded(interactions.item_codes, interactions.item_ids)
    moments_s, codes = np.unique(interactions.timestamps_s, return_inverse=True)
    found = [
        crossing(feature, owners, others, Coded(codes, moments_s), values, str(interactions.path))
        for features, owners, others in ((item_features, items, users), (user_features, users, items))
        for feature in features
        if (values := interactions.claimed.get(feature.column)) is not None
    ]
    return [line for line in found if line]


def _read_entities(
    path: Path, table_name: Literal["items", "users"], config: DataConfig, features: Sequence[Feature]
) -> tuple[Entities, list[str], list[str]]:
    """One row per id, with notes; and the crossings of a table that has several, for rows of the other side."""
    standard, id_column, other_column = (
        (ITEM_ID, config.item_id_column, config.user_id_column)
        if table_name == "items"
        else (USER_ID, config.user_id_column, config.item_id_column)
    )
    wanted = {id_column: f"[data] {standard}_column"}
    for feature in features:
        column = id_column if feature.column == standard else feature.column
        wanted.setdefault(column, f"feature {feature.name!r}")
    as_strings = [id_column, *(feature.column for feature in features if feature.kind in ("categorical", "text"))]
    available = column_names(path, config.csv_separator)
    wanted |= {name: "" for name in (other_column, config.timestamp_column) if name in available and name not in wanted}
    table = read_table(path, table_name, wanted, as_strings, config.csv_separator)
    entities, notes = _entities(table, path, table_name, id_column, features)
    if other_column not in wanted or table.num_rows == len(entities.ids):
        return entities, notes, []
    owners, others = coded(table.column(id_column)), coded(table.column(other_column))
    moments = coded(table.column(config.timestamp_column)) if config.timestamp_column in wanted else None
    found = [
        crossing(feature, owners, others, moments, coded(table.column(feature.column)), str(path))
        for feature in features
        if feature.column not in (standard, id_column)
    ]
    return entities, notes, [line for line in found if line]


def _entities(
    table: pa.Table, path: Path, table_name: Literal["items", "users"], id_column: str, features: Sequence[Feature]
) -> tuple[Entities, list[str]]:
    """One row per id, the last of several; the id column under its standard name."""
    standard = ITEM_ID if table_name == "items" else USER_ID
    code_of: dict[str, int] = {}
    codes = id_codes(table, path, id_column, code_of)
    ids = list(code_of)
    # The position of each id's last row: a later assignment to the same index wins.
    last = np.zeros(len(ids), dtype=np.int64)
    last[codes] = np.arange(len(codes))
    notes = []
    if len(codes) > len(ids):
        notes.append(
            f"{path}: column {id_column!r}: {len(codes) - len(ids):,} rows repeat an id; the last of each was kept"
        )
    table = table.take(pa.array(last))
    columns: dict[str, Sequence[RawValue]] = {standard: ids}
    for feature in features:
        if feature.column == standard:
            check_id_feature(feature, path)
            continue
        column = table.column(feature.column)
        check_type(column.type, feature, path)
        columns[feature.column] = raw_values(column, feature, path)
    return Entities(ids, columns, str(path)), notes


def _users_without_table(interactions: _Interactions, features: Sequence[Feature]) -> Entities:
    for feature in features:
        if feature.column != USER_ID:
            raise InvalidInputError(
                f"feature {feature.name!r}: its column {feature.column!r} is one of a user table; name the file in "
                "[data] users"
            )
        check_id_feature(feature, interactions.path)
    return Entities(interactions.user_ids, {USER_ID: interactions.user_ids}, str(interactions.path))


def _item_rows(interactions: _Interactions, items: Entities, items_path: Path) -> tuple[NDArray[np.int32], list[str]]:
    """Row of each interaction's item, -1 where the item table has none."""
    row_of = {item_id: row for row, item_id in enumerate(items.ids)}
    known = np.array([row_of.get(item_id, -1) for item_id in interactions.item_ids], dtype=np.int32)
    rows = known[interactions.item_codes]
    num_dropped = int((rows < 0).sum())
    if num_dropped == len(rows):
        raise InvalidInputError(
            f"{interactions.path}: column {interactions.item_column!r}: not one id, such as "
            f"{interactions.item_ids[0]!r}, is in {items_path}; both files must use the same ids"
        )
    if not num_dropped:
        return rows, []
    example = interactions.item_ids[int(np.flatnonzero(known < 0)[0])]
    return rows, [
        f"{interactions.path}: column {interactions.item_column!r}: {num_dropped:,} interactions with "
        f"{int((known < 0).sum()):,} items that {items_path} does not have, such as {example!r}, were left out"
    ]


def _user_rows(interactions: _Interactions, users: Entities) -> tuple[Entities, NDArray[np.int32], list[str]]:
    """Row of each interaction's user. Users that the table does not have follow its own, all but their id missing."""
    row_of = {user_id: row for row, user_id in enumerate(users.ids)}
    unlisted = [user_id for user_id in interactions.user_ids if user_id not in row_of]
    row_of |= {user_id: len(users.ids) + i for i, user_id in enumerate(unlisted)}
    rows = np.array([row_of[user_id] for user_id in interactions.user_ids], dtype=np.int32)[interactions.user_codes]
    if not unlisted:
        return users, rows, []
    columns = {
        name: [*values, *(unlisted if name == USER_ID else [None] * len(unlisted))]
        for name, values in users.columns.items()
    }
    note = (
        f"{interactions.path}: column {interactions.user_column!r}: {len(unlisted):,} users, such as {unlisted[0]!r}, "
        f"are not in {users.name}; their features are missing"
    )
    return Entities([*users.ids, *unlisted], columns, users.name), rows, [note]


def _check_enough(log: InteractionLog, split: Split, interactions: _Interactions) -> None:
    if len(np.unique(log.items)) < 2:
        raise InvalidInputError(
            f"{interactions.path}: column {interactions.item_column!r}: only one item of the item table is left; "
            "training needs at least two"
        )
    if interactions.split_column is not None:
        for name, positions in (("train", split.train), ("test", split.test)):
            if len(positions) == 0:
                raise InvalidInputError(
                    f"{interactions.path}: column {interactions.split_column!r} ([data] split_column): no row says "
                    f"{name!r}; give some to train on and some to test"
                )
    elif len(split.test) == 0:
        raise InvalidInputError(
            f"{interactions.path}: column {interactions.user_column!r}: no user has {_FEWEST_INTERACTIONS} or more "
            "interactions (one each to train on, to validate and to test); give a longer period"
        )
    if log.weights is not None and not log.weights[split.train].any():
        raise InvalidInputError(
            f"{interactions.path}: [data] weight_column: all interactions to train on weigh 0; give some more"
        )
