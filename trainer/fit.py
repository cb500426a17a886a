"""Learns the schema's parameters: vocabularies, statistics of numbers, the moment that ages are counted to.

Deliberately does not know how values are encoded (`towers.features`), and sees nothing but training interactions.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from towers.features import RawValue, category_token, finite_number, scaled_number
from towers.schema import (
    CategoricalFeature,
    CategoricalListFeature,
    Feature,
    FeatureSchema,
    NumberFeature,
    Owner,
    SequenceFeature,
    TextFeature,
    TimestampFeature,
)
from trainer.data import Entities, Split, TrainingData
from trainer.text import read_tokenizer


@dataclass(frozen=True)
class FittedSchema:
    """A schema with its learned parameters, and the vocabularies that it names."""

    schema: FeatureSchema
    vocabularies: Mapping[str, Sequence[str]]
    tokenizers: Mapping[str, str] = field(default_factory=dict)
    """Content of the tokenizer files of pretrained text encoders, by feature."""


def fit_schema(schema: FeatureSchema, data: TrainingData, split: Split) -> FittedSchema:
    """Learns the parameters of all features from the training interactions.

    Every value counts once for each training interaction of its user or item, because that is how often the tower
    sees it. For `min_count` this also means that an item id is known when the item was interacted with in training,
    not when the item table lists it: an id that no gradient ever reaches would keep its random first embedding, while
    the unknown id leaves the item to its other features, in training, at validation and for items that come later.

    Args:
        schema: The declared features.
        data: Users, items and the log.
        split: Only its training positions are used.

    Returns:
        The schema with learned parameters; the same data always gives the same one.
    """
    entities: Mapping[Owner, Entities] = {"query": data.users, "item": data.items}
    rows = {"query": data.log.users[split.train], "item": data.log.items[split.train]}
    counts = {owner: np.bincount(rows[owner], minlength=len(entities[owner].ids)) for owner in entities}
    last_moment_s = float(data.log.timestamps_s[split.train].max())

    features: list[Feature] = []
    vocabularies: dict[str, list[str]] = {}
    for feature in schema.features:
        if isinstance(feature, SequenceFeature):
            features.append(feature)
            continue
        values = entities[feature.owner].columns[feature.column]
        match feature:
            case CategoricalFeature() | CategoricalListFeature() if feature.hash_buckets is None:
                vocabularies[feature.name] = learn_vocabulary(values, counts[feature.owner], feature.min_count)
                features.append(feature)
            case NumberFeature() if feature.source == "popularity":
                moments_s = data.log.timestamps_s[split.train]
                seen = data.popularity.before(rows["item"], moments_s, feature.window_days)
                features.append(learn_statistics(feature, seen.tolist(), np.ones(len(seen), dtype=np.int64)))
            case NumberFeature():
                features.append(learn_statistics(feature, values, counts[feature.owner]))
            case TimestampFeature():
                features.append(feature.model_copy(update={"reference_time_s": last_moment_s}))
            case _:
                features.append(feature)
    tokenizers = {
        feature.name: read_tokenizer(feature)
        for feature in features
        if isinstance(feature, TextFeature) and feature.encoder is not None
    }
    return FittedSchema(FeatureSchema(features=tuple(features)), vocabularies, tokenizers)


def learn_vocabulary(values: Sequence[RawValue], counts: NDArray[Any], min_count: int) -> list[str]:
    """Tokens seen at least `min_count` times, most frequent first, equals in the order of their letters.

    Args:
        values: `[R]` raw values, or lists of them, one per user or item.
        counts: `[R]` training interactions of each.
        min_count: Tokens seen less often are left out.
    """
    seen: Counter[str] = Counter()
    for value, count in zip(values, counts.tolist(), strict=True):
        if count:
            entries = {category_token(entry) for entry in (value if isinstance(value, list) else [value])}
            seen.update({token: count for token in entries if token is not None})
    frequent = [(token, count) for token, count in seen.items() if count >= min_count]
    return [token for token, _ in sorted(frequent, key=lambda entry: (-entry[1], entry[0]))]


def learn_statistics(feature: NumberFeature, values: Sequence[RawValue], counts: NDArray[Any]) -> NumberFeature:
    """Mean and standard deviation, or the bounds of the quantile buckets, of a number.

    Args:
        feature: Says how the number is scaled.
        values: `[R]` raw values, one per user or item.
        counts: `[R]` training interactions of each.

    Returns:
        The feature with its parameters; unchanged where no value was seen.
    """
    numbers = [finite_number(value) for value in values]
    is_seen = np.array([number is not None for number in numbers]) & (counts > 0)
    if not is_seen.any():
        return feature
    scaled = np.array([scaled_number(feature, number) if number is not None else 0.0 for number in numbers])
    repeated = np.repeat(scaled[is_seen], counts[is_seen])
    if feature.scaling == "quantile":
        shares = np.linspace(0, 1, feature.num_buckets + 1)[1:-1]
        # Equal bounds would leave buckets that nothing falls into.
        bounds = np.unique(np.quantile(repeated, shares))
        return feature.model_copy(update={"boundaries": tuple(bounds.tolist())})
    std = float(repeated.std())
    return feature.model_copy(update={"mean": float(repeated.mean()), "std": std if std > 0 else 1.0})
