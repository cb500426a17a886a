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

_ROWS_AT_ONCE = 16_384
"""Raw histories are Python lists; this many exist at a time."""

Tensors = dict[str, Tensor]
"""Feature name to encoded values, batch first."""


@dataclass(frozen=True)
class EncodedQueries:
    """Queries at some positions of the log. Features of the user are kept once per user."""

    users: Tensor
    """`[N]` row of each query's user."""
    user_features: Tensors
    """`[U, …]`"""
    histories: Tensors
    """`[N, L]`"""

    def __len__(self) -> int:
        return len(self.users)

    def batch(self, rows: Tensor) -> Tensors:
        """Features of the queries at `rows` `[B]`."""
        users = self.users[rows]
        features = {name: values[users] for name, values in self.user_features.items()}
        return features | {name: ids[rows] for name, ids in self.histories.items()}


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

    def queries(self, positions: NDArray[np.int64]) -> EncodedQueries:
        """Queries at positions of the log: each user as known, with the history before that position."""
        return EncodedQueries(
            users=torch.from_numpy(self._data.log.users[positions]),
            user_features=self._user_features,
            histories={
                feature.name: torch.from_numpy(self._histories(feature, positions)) for feature in self._sequences
            },
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

    def _histories(self, feature: SequenceFeature, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Encoded histories `[N, L]`.

        Cut to the newest known items before encoding: the encoder would drop the same ones, but only after reading
        each user's whole past again for each interaction.
        """
        log = self._data.log
        tokens = self._item_columns[feature.items]
        is_known = self._is_known(feature, tokens)[log.items]
        known_items = log.items[is_known]
        # Number of known interactions before each position, N + 1 of them.
        num_known = np.concatenate(([0], np.cumsum(is_known)))
        stops = num_known[positions]
        starts = np.maximum(num_known[log.starts[positions]], stops - feature.max_length)
        longest = int((stops - starts).max(initial=1)) or 1
        encoded = np.zeros((len(positions), longest), dtype=np.int64)
        for first in range(0, len(positions), _ROWS_AT_ONCE):
            bounds = zip(
                starts[first : first + _ROWS_AT_ONCE].tolist(),
                stops[first : first + _ROWS_AT_ONCE].tolist(),
                strict=True,
            )
            lists = [[tokens[item] for item in known_items[start:stop].tolist()] for start, stop in bounds]
            ids = self.query.encode({feature.name: lists}, len(lists))[feature.name]
            encoded[first : first + len(lists), : ids.shape[1]] = ids
        return encoded

    def _is_known(self, feature: SequenceFeature, tokens: Sequence[RawValue]) -> NDArray[np.bool_]:
        """`[I]` whether an item leaves an id in a sequence at all."""
        alone: list[RawValue] = [cast(RawValue, [token]) for token in tokens]
        ids = self.query.encode({feature.name: alone}, len(tokens))[feature.name]
        is_known: NDArray[np.bool_] = ids[:, 0] != 0
        return is_known


def _encode(encoder: FeatureEncoder, columns: Mapping[str, Sequence[RawValue]], entities: Entities) -> Arrays:
    try:
        return encoder.encode(columns, len(entities.ids))
    except InvalidFeatureError as error:
        raise InvalidInputError(f"{entities.name}: {error}; correct the value in the file") from error
