"""Users, items and histories as tensors, through the one encoder that serving uses too.

Deliberately does not know how the parameters were learned, nor what a tower does with the tensors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from towers.errors import InvalidFeatureError, InvalidInputError
from towers.features import Arrays, FeatureEncoder, RawValue
from towers.schema import SequenceFeature
from trainer.data import Entities, TrainingData
from trainer.fit import FittedSchema

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
        lengths = self.lengths[rows].unsqueeze(1)  # [B, 1]
        within = torch.arange(max(1, int(lengths.max())) if len(rows) else 1)  # [L]
        is_there = within < lengths  # [B, L]
        padded = torch.zeros(is_there.shape, dtype=torch.int64)
        padded[is_there] = self.ids[(self.starts[rows].unsqueeze(1) + within)[is_there]].long()
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
        return torch.cat([torch.arange(*self.starts[row : row + 2].tolist()) for row in rows.tolist()])

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


class DataEncoder:
    """Binds a fitted schema to the data it was fitted on."""

    def __init__(self, fitted: FittedSchema, data: TrainingData) -> None:
        """Encodes the users.

        Raises:
            InvalidInputError: a value that its feature does not allow; names the file.
        """
        self.query = FeatureEncoder(fitted.schema, "query", fitted.vocabularies)
        self.item = FeatureEncoder(fitted.schema, "item", fitted.vocabularies)
        self._data = data
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

    def training_queries(self, positions: NDArray[np.int64]) -> EncodedQueries | EncodedWindows:
        """Queries to train on, at rising positions of the log; as windows where one pass can answer all of a window."""
        if [feature.pooling for feature in self._sequences] == ["transformer"]:
            return self._windows(self._sequences[0], positions)
        return self.queries(positions)

    def queries(self, positions: NDArray[np.int64]) -> EncodedQueries:
        """Queries at positions of the log: each user as known, with the history before that position."""
        return EncodedQueries(
            users=torch.from_numpy(self._data.log.users[positions]),
            user_features=self._user_features,
            histories={feature.name: self._histories(feature, positions) for feature in self._sequences},
        )

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

    def _histories(self, feature: SequenceFeature, positions: NDArray[np.int64]) -> Histories:
        """Histories before positions of the log: the newest `max_length` of the interactions that leave an id."""
        ids, num_known = self._known(feature)
        stops = num_known[positions]
        return _stretches(
            ids, np.maximum(num_known[self._data.log.starts[positions]], stops - feature.max_length), stops
        )

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
