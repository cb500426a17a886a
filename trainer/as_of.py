"""Items as they were at a moment: how old, and how often interacted with before it.

Deliberately does not know towers, losses, nor which moment a negative is looked at.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from towers.features import FeatureEncoder, RawValue, finite_number
from towers.schema import NumberFeature, TimestampFeature

_SECONDS_PER_DAY = 86_400.0


@dataclass(frozen=True)
class Popularity:
    """How often items were interacted with before a moment, never at it or after it."""

    moments_s: NDArray[np.float64]
    """`[K]` the different moments of interactions, rising."""
    keys: NDArray[np.int64]
    """`[N]` of each interaction its item times K + 1, plus the place of its moment; rising."""

    @classmethod
    def of(cls, items: NDArray[np.int64], moments_s: NDArray[np.float64]) -> "Popularity":
        """Of interactions with rows of items `[N]` at some moments `[N]`."""
        distinct, places = np.unique(moments_s, return_inverse=True)
        return cls(distinct, np.sort(items * (len(distinct) + 1) + places))

    def before(
        self, items: NDArray[np.int64], moments_s: NDArray[np.float64], window_days: float | None
    ) -> NDArray[np.int64]:
        """Interactions of each item before its moment.

        Args:
            items: `[B]` rows.
            moments_s: `[B]`
            window_days: Only those of so many days before count; None: all.

        Returns:
            `[B]`
        """
        from_s = moments_s - (math.inf if window_days is None else window_days * _SECONDS_PER_DAY)
        return self._earlier(items, moments_s) - self._earlier(items, from_s)

    def _earlier(self, items: NDArray[np.int64], moments_s: NDArray[np.float64]) -> NDArray[np.int64]:
        """`[B]` how many interactions stand before each item's moment, those of earlier items included."""
        keys = items * (len(self.moments_s) + 1) + np.searchsorted(self.moments_s, moments_s)
        return np.searchsorted(self.keys, keys)


class ItemsAsOf:
    """The item features that change with time, at any moment; through the encoder that serving uses."""

    def __init__(
        self,
        encoder: FeatureEncoder,
        columns: Mapping[str, Sequence[RawValue]],
        popularity: Popularity,
        moments_s: NDArray[np.float64],
    ) -> None:
        """Keeps what they are made of.

        Args:
            encoder: Of the items.
            columns: `[I]` raw values of each of its features.
            popularity: Of the items.
            moments_s: `[N]` when each training interaction was.
        """
        self.moments_s = torch.from_numpy(moments_s)
        self._encoder = encoder
        self._popularity = popularity
        self._counted = [
            feature
            for feature in encoder.features
            if isinstance(feature, NumberFeature) and feature.source == "popularity"
        ]
        self._aged = {
            feature.name: (feature, np.array([_or_nan(finite_number(value)) for value in columns[feature.name]]))
            for feature in encoder.features
            if isinstance(feature, TimestampFeature)
        }

    def features(self, rows: Tensor, moments_s: Tensor) -> dict[str, Tensor]:
        """Encoded values of items at `rows` `[B]` as of some moments `[B]`, of the features that change.

        What a model reads of the clock is fixed at the end of its training (`reference_time_s`): an item is as old at a
        moment as one that came as much later is at the end.
        """
        items, moments = rows.numpy(), moments_s.numpy()
        found = {}
        for name, (feature, published_s) in self._aged.items():
            given = [None if math.isnan(value) else value for value in published_s[items].tolist()]
            moved = [
                None if value is None else value + later
                for value, later in zip(given, (feature.reference_time_s - moments).tolist(), strict=True)
            ]
            encoded = self._encoder.encode_column(name, given)
            # The age alone: the hour and the weekday are those it came at.
            encoded[:, 0] = self._encoder.encode_column(name, moved)[:, 0]
            found[name] = torch.from_numpy(encoded)
        for counted in self._counted:
            counts = self._popularity.before(items, moments, counted.window_days)
            found[counted.name] = torch.from_numpy(self._encoder.encode_column(counted.name, counts.tolist()))
        return found


def _or_nan(number: float | None) -> float:
    return math.nan if number is None else number
