"""Users, items and histories as tensors, through the one encoder that serving uses too.

Deliberately does not know how the parameters were learned, nor what a tower does with the tensors.
"""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from towers.errors import InvalidFeatureError, InvalidInputError
from towers.features import Arrays, FeatureEncoder, RawValue
from towers.schema import Owner, SequenceFeature, TextFeature
from trainer.as_of import ItemsAsOf
from trainer.data import Entities, InteractionLog, TrainingData
from trainer.fit import FittedSchema
from trainer.text import truncation_note

Tensors = dict[str, Tensor]
"""Feature name to encoded values, batch first."""


@dataclass(frozen=True)
class Histories:
    """The history of each of N queries as a stretch of one array: written out they would take L ids for each."""

    ids: Tensor
    """`[K]` int32, id of each interaction whose item leaves one, in the order of the log."""
    starts: Tensor
    """`[N]` where each history starts in `ids`."""
    lengths: Tensor
    """`[N]` int16, never more than the feature's `max_length`."""

    def batch(self, rows: Tensor) -> Tensor:
        """Histories at `rows` `[B]`, `[B, L]`, padded at the end with 0; L is the longest one's, at least 1."""
        return _padded(self.ids[self._entries(rows)[1]], self.lengths[rows])

    def sample(self, rows: Tensor, share: float) -> Tensor:
        """The same of histories that keep each entry with this probability; torch's generator draws."""
        of, places = self._entries(rows)
        is_kept = torch.rand(len(places)) < share
        return _padded(self.ids[places[is_kept]], torch.bincount(of[is_kept], minlength=len(rows)))

    def _entries(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Of all entries of the histories at `rows`: which of the histories it is in, and where in `ids`."""
        lengths = self.lengths[rows].long()
        of = torch.repeat_interleave(torch.arange(len(rows)), lengths)
        return of, torch.arange(len(of)) + (self.starts[rows] - (lengths.cumsum(0) - lengths))[of]


def _padded(ids: Tensor, lengths: Tensor) -> Tensor:
    """Lists that follow one another in `ids`, as rows `[B, L]` padded at the end with 0; L at least 1."""
    within = torch.arange(max(1, int(lengths.max())) if len(lengths) else 1)  # [L]
    is_there = within < lengths.unsqueeze(1)  # [B, L]
    padded = torch.zeros(is_there.shape, dtype=torch.int64)
    padded[is_there] = ids.long()
    return padded


@dataclass(frozen=True)
class EncodedQueries:
    """Queries at some positions of the log. Features of the user are kept once per user, histories where they are."""

    users: Tensor
    """`[N]` row of each query's user."""
    user_features: Tensors
    """`[U, …]`"""
    histories: Mapping[str, Histories]

    def __len__(self) -> int:
        return len(self.users)

    def rows_per_step(self, batch_size: int) -> int:
        """How many rows hold so many queries."""
        return batch_size

    def interactions(self, rows: Tensor) -> Tensor:
        """Which queries the rows `[B]` hold, `[B]`."""
        return rows

    def askers(self, rows: Tensor) -> Tensor | None:  # noqa: ARG002 - users need them
        """Which embedding asks for which interaction of the rows: None, there is one for each."""
        return None

    def places(self, rows: Tensor) -> Tensor | None:  # noqa: ARG002 - windows need them
        """What a tower needs to tell the queries of a row apart: nothing, each row is one."""
        return None

    def batch(self, rows: Tensor) -> Tensors:
        """Features of the queries at `rows` `[B]`."""
        users = self.users[rows]
        features = {name: values[users] for name, values in self.user_features.items()}
        return features | {name: histories.batch(rows) for name, histories in self.histories.items()}


@dataclass(frozen=True)
class EncodedWindows:
    """N queries as W stretches of histories: a query is asked after some of the entries of its window.

    A tower that reads a history causally answers all queries of a window in one pass.
    """

    users: Tensor
    """`[N]` row of each query's user."""
    user_features: Tensors
    """`[U, …]`"""
    histories: Mapping[str, Histories]
    """Of the W windows."""
    starts: Tensor
    """`[W + 1]` where each window's queries start."""
    steps: Tensor
    """`[N]` how many entries of its window a query comes after."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def rows_per_step(self, batch_size: int) -> int:
        """How many windows hold about so many queries."""
        return max(1, round(batch_size * len(self) / len(self.users)))

    def interactions(self, rows: Tensor) -> Tensor:
        """Which queries the windows `rows` hold, `[B]`."""
        return _stretch_places(self.starts, rows)

    def askers(self, rows: Tensor) -> Tensor | None:  # noqa: ARG002 - users need them
        """Which embedding asks for which interaction of the rows: None, there is one for each."""
        return None

    def places(self, rows: Tensor) -> Tensor:
        """Window, counted within `rows`, and step of their queries, `[B, 2]`."""
        counts = self.starts[rows + 1] - self.starts[rows]
        windows = torch.repeat_interleave(torch.arange(len(rows)), counts)
        return torch.stack([windows, self.steps[self.interactions(rows)]], dim=1)

    def batch(self, rows: Tensor) -> Tensors:
        """Features of the windows at `rows`."""
        users = self.users[self.starts[rows]]
        features = {name: values[users] for name, values in self.user_features.items()}
        return features | {name: histories.batch(rows) for name, histories in self.histories.items()}


@dataclass(frozen=True)
class EncodedUsers:
    """W users, each with all of her N interactions: one query asks for all of them, from a random share of them.

    So a log without an order trains (Wu et al. 2016, "Collaborative denoising auto-encoders for top-N recommender
    systems"; Liang et al. 2018, "Variational autoencoders for collaborative filtering").
    """

    users: Tensor
    """`[N]` row of each interaction's user."""
    user_features: Tensors
    """`[U, …]`"""
    histories: Mapping[str, Histories]
    """Of the W users, whole."""
    starts: Tensor
    """`[W + 1]` where each user's interactions start."""
    history_share: float
    """Probability that an entry is kept in its history."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def rows_per_step(self, batch_size: int) -> int:
        """How many users have about so many interactions."""
        return max(1, round(batch_size * len(self) / len(self.users)))

    def interactions(self, rows: Tensor) -> Tensor:
        """Which interactions the users at `rows` `[W]` have, `[B]`."""
        return _stretch_places(self.starts, rows)

    def askers(self, rows: Tensor) -> Tensor:
        """Which user, counted within `rows`, asks for which interaction, `[B]`."""
        return torch.repeat_interleave(torch.arange(len(rows)), self.starts[rows + 1] - self.starts[rows])

    def places(self, rows: Tensor) -> Tensor | None:  # noqa: ARG002 - windows need them
        """What a tower needs to tell the queries of a row apart: nothing, each row is one."""
        return None

    def batch(self, rows: Tensor) -> Tensors:
        """Features of the users at `rows` `[W]`, their histories another sample each time."""
        users = self.users[self.starts[rows]]
        features = {name: values[users] for name, values in self.user_features.items()}
        sampled = {name: histories.sample(rows, self.history_share) for name, histories in self.histories.items()}
        return features | sampled


def _stretch_places(starts: Tensor, rows: Tensor) -> Tensor:
    """All places of the stretches at `rows`, one stretch after the other."""
    counts = starts[rows + 1] - starts[rows]
    before = counts.cumsum(0) - counts
    return torch.arange(int(counts.sum())) + torch.repeat_interleave(starts[rows] - before, counts)


TrainingQueries = EncodedQueries | EncodedWindows | EncodedUsers


class DataEncoder:
    """Binds a fitted schema to the data it was fitted on."""

    def __init__(self, fitted: FittedSchema, data: TrainingData) -> None:
        """Encodes the users.

        Raises:
            InvalidInputError: a value that its feature does not allow; names the file.
        """
        self.query = FeatureEncoder(fitted.schema, "query", fitted.vocabularies, fitted.tokenizers)
        self.item = FeatureEncoder(fitted.schema, "item", fitted.vocabularies, fitted.tokenizers)
        self._data = data
        self._tokenizers = fitted.tokenizers
        self._user_columns = {
            feature.name: data.users.columns[feature.column]
            for feature in self.query.features
            if not isinstance(feature, SequenceFeature)
        }
        self._item_columns = {feature.name: data.items.columns[feature.column] for feature in self.item.features}
        self._sequences = [feature for feature in self.query.features if isinstance(feature, SequenceFeature)]
        users = _encode(self.query, self._user_columns, data.users)
        self._user_features = {name: torch.from_numpy(users[name]) for name in self._user_columns}

    def items(self) -> Tensors:
        """Features of all items, `[I, …]`.

        Raises:
            InvalidInputError: a value that its feature does not allow; names the file.
        """
        arrays = _encode(self.item, self._item_columns, self._data.items)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def items_as_of(self, positions: NDArray[np.int64]) -> ItemsAsOf:
        """What of the items changes with time, for interactions at positions of the log."""
        moments_s = self._data.log.timestamps_s[positions]
        return ItemsAsOf(self.item, self._item_columns, self._data.popularity, moments_s)

    def truncation_notes(self) -> list[str]:
        """Says of each text with a pretrained encoder how many lose their end, where any does."""
        columns: Mapping[Owner, tuple[Mapping[str, Sequence[RawValue]], str]] = {
            "query": (self._user_columns, "users"),
            "item": (self._item_columns, "items"),
        }
        notes = [
            truncation_note(feature, self._tokenizers[feature.name], columns[feature.owner][0][feature.name], entities)
            for owner, (_, entities) in columns.items()
            for feature in (self.query if owner == "query" else self.item).features
            if isinstance(feature, TextFeature) and feature.encoder is not None
        ]
        return [note for note in notes if note is not None]

    def training_queries(self, positions: NDArray[np.int64], history_share: float | None) -> TrainingQueries:
        """Queries to train on, at rising positions of the log; as windows where one pass can answer all of a window.

        Args:
            positions: Of the interactions.
            history_share: Of a user's interactions, that all of them are asked for from. None: what came before each.
        """
        if history_share is not None:
            return self._users(positions, history_share)
        if [feature.pooling for feature in self._sequences] == ["transformer"]:
            return self._windows(self._sequences[0], positions)
        return self.queries(positions)

    def queries(self, positions: NDArray[np.int64]) -> EncodedQueries:
        """Queries at positions of the log: each user as known, with the history before that position."""
        return EncodedQueries(
            users=torch.from_numpy(self._data.log.users[positions]),
            user_features=self._user_features,
            histories={
                feature.name: self._histories(feature, self._data.log.starts[positions], positions)
                for feature in self._sequences
            },
        )

    def with_log(self, log: InteractionLog) -> "DataEncoder":
        """The same users and items in another log of theirs."""
        other = copy.copy(self)
        other._data = dataclasses.replace(self._data, log=log)
        return other

    def raw_pairs(self, positions: NDArray[np.int64]) -> dict[Owner, list[dict[str, RawValue]]]:
        """Raw features of the query and of the item of interactions at positions of the log."""
        return {
            "query": self.raw_queries(positions.tolist()),
            "item": self.raw_items(self._data.log.items[positions].tolist()),
        }

    def raw_items(self, rows: Sequence[int]) -> list[dict[str, RawValue]]:
        """Raw features of items, as a caller would give them."""
        return [{name: values[row] for name, values in self._item_columns.items()} for row in rows]

    def raw_queries(self, positions: Sequence[int]) -> list[dict[str, RawValue]]:
        """Raw features of queries at positions of the log, as a caller would give them."""
        log = self._data.log
        queries = []
        for position in positions:
            user = log.users[position]
            query = {name: values[user] for name, values in self._user_columns.items()}
            for feature in self._sequences:
                tokens = self._item_columns[feature.items]
                history = log.items[log.starts[position] : position][-feature.max_length :]
                query[feature.name] = [tokens[item] for item in history.tolist()]
            queries.append(query)
        return queries

    def _users(self, positions: NDArray[np.int64], history_share: float) -> EncodedUsers:
        """All users with an interaction at a position, and what they did up to their last one."""
        users = self._data.log.users[positions]
        starts = np.append(np.flatnonzero(np.diff(users, prepend=-1)), len(users))
        first, stops = self._data.log.starts[positions[starts[:-1]]], positions[starts[1:] - 1] + 1
        return EncodedUsers(
            users=torch.from_numpy(users),
            user_features=self._user_features,
            histories={feature.name: self._histories(feature, first, stops) for feature in self._sequences},
            starts=torch.from_numpy(starts),
            history_share=history_share,
        )

    def _windows(self, feature: SequenceFeature, positions: NDArray[np.int64]) -> EncodedWindows:
        """Cuts each user's history into windows, counted back from the newest query, which so has a full one."""
        log = self._data.log
        ids, num_known = self._known(feature)
        first_known = num_known[log.starts[positions]]  # [N]
        ages = num_known[positions] - first_known  # [N] known items before each query
        is_newest = np.diff(log.users[positions], append=-1) != 0
        newest_ages = np.repeat(ages[is_newest], np.diff(np.flatnonzero(is_newest), prepend=-1))  # [N]
        # The query before the first item has a window with the others: one for itself would cost a pass.
        back = np.minimum((newest_ages - ages) // feature.max_length, (newest_ages - 1).clip(0) // feature.max_length)
        skipped = (newest_ages - feature.max_length * (back + 1)).clip(0)  # [N] known items before each window
        is_first = (np.diff(log.users[positions], prepend=-1) != 0) | (np.diff(back, prepend=0) != 0)
        starts = np.append(np.flatnonzero(is_first), len(positions))
        histories = _stretches(ids, (first_known + skipped)[starts[:-1]], num_known[positions[starts[1:] - 1]])
        return EncodedWindows(
            users=torch.from_numpy(log.users[positions]),
            user_features=self._user_features,
            histories={feature.name: histories},
            starts=torch.from_numpy(starts),
            steps=torch.from_numpy(ages - skipped),
        )

    def _histories(self, feature: SequenceFeature, starts: NDArray[np.int64], stops: NDArray[np.int64]) -> Histories:
        """Stretches of the log: the newest `max_length` of the interactions that leave an id."""
        ids, num_known = self._known(feature)
        return _stretches(ids, np.maximum(num_known[starts], num_known[stops] - feature.max_length), num_known[stops])

    def _known(self, feature: SequenceFeature) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """The ids `[K]` of all interactions that leave one in a sequence; how many come before each position, N + 1."""
        ids = self._sequence_ids(feature)[self._data.log.items]
        is_known = ids != 0
        return ids[is_known], np.concatenate(([0], np.cumsum(is_known)))

    def _sequence_ids(self, feature: SequenceFeature) -> NDArray[np.int32]:
        """`[I]` the id that an item has in a sequence, as the encoder gives it to the item alone; 0 where none."""
        alone: list[RawValue] = [cast(RawValue, [token]) for token in self._item_columns[feature.items]]
        return self.query.encode({feature.name: alone}, len(alone))[feature.name][:, 0].astype(np.int32)


def _stretches(ids: NDArray[np.int32], starts: NDArray[np.int64], stops: NDArray[np.int64]) -> Histories:
    return Histories(
        ids=torch.from_numpy(ids),
        starts=torch.from_numpy(starts),
        lengths=torch.from_numpy((stops - starts).astype(np.int16)),
    )


def _encode(encoder: FeatureEncoder, columns: Mapping[str, Sequence[RawValue]], entities: Entities) -> Arrays:
    try:
        return encoder.encode(columns, len(entities.ids))
    except InvalidFeatureError as error:
        raise InvalidInputError(f"{entities.name}: {error}; correct the value in the file") from error
