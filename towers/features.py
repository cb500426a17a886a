"""Raw features to arrays: the only implementation, used in training, index building and serving alike.

Deliberately does not know how parameters are learned (`trainer.fit`) nor what a tower does with the arrays.
"""

import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar, assert_never

import numpy as np
import xxhash
from numpy.typing import NDArray

from towers.errors import InvalidFeatureError
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
    VectorFeature,
)
from towers.text import TextTokenizer

RawValue = str | int | float | bool | datetime | Sequence[str] | Sequence[int] | Sequence[float] | None
"""A value as callers and tables know it. None, an empty string and an empty list are missing."""

Arrays = dict[str, NDArray[Any]]
"""Feature name to encoded array, batch first."""

MISSING_ID = 0
UNKNOWN_ID = 1
_FIRST_VOCABULARY_ID = 2
_NUM_TIMESTAMP_COLUMNS = 6
_SECONDS_PER_DAY = 86_400.0
_WORD = re.compile(r"\w+")
_LARGEST_SCALED = 1e6
"""Scaled numbers are clipped here, so that a wild value stays finite in float32."""
_T = TypeVar("_T")


class FeatureEncoder:
    """Encodes the features of one tower.

    The arrays, by kind: `categorical` int64 `[B]`; `categorical_list`, `sequence` and `text` int64 `[B, L]`, padded
    at the end with 0 (the mask is `ids != 0`); `number` float32 `[B, 2]` (value, missing), or int64 `[B]` when scaled
    by quantile; `timestamp` float32 `[B, 6]` (log age, sine and cosine of hour and of weekday, missing);
    `vector` float32 `[B, size]`.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        owner: Owner,
        vocabularies: Mapping[str, Sequence[str]],
        tokenizers: Mapping[str, str] | None = None,
    ) -> None:
        """Binds a schema's features to their vocabularies.

        Args:
            schema: The schema with learned parameters.
            owner: The tower whose features are encoded.
            vocabularies: Feature name to its tokens; the token at position i has id i + 2.
            tokenizers: Feature name to the content of its encoder's tokenizer file, of texts that have an encoder.

        Raises:
            InvalidFeatureError: a feature's vocabulary or tokenizer is missing, or the tokenizer cannot be read.
        """
        self.owner = owner
        self.features = schema.of(owner)
        self._by_name = {feature.name: feature for feature in schema.features}
        self._token_ids: dict[str, dict[str, int]] = {}
        for name in schema.vocabulary_names(owner):
            if name not in vocabularies:
                raise InvalidFeatureError(f"feature {name!r}: its vocabulary is missing")
            self._token_ids[name] = {token: i + _FIRST_VOCABULARY_ID for i, token in enumerate(vocabularies[name])}
        self._tokenizers = {
            name: _tokenizer(self._by_name[name], tokenizers or {}) for name in schema.tokenizer_names(owner)
        }
        self._encoders = {feature.name: self._column_encoder(feature) for feature in self.features}

    def encode(self, columns: Mapping[str, Sequence[RawValue]], num_rows: int) -> Arrays:
        """Encodes rows given as columns.

        Args:
            columns: Feature name to its B raw values. A feature left out is missing in every row.
            num_rows: B.

        Returns:
            One array per feature of this tower, as the class describes.

        Raises:
            InvalidFeatureError: an unknown feature, a value of the wrong type, a number that is not finite.
        """
        unknown = columns.keys() - self._encoders.keys()
        if unknown:
            raise InvalidFeatureError(
                f"unknown feature {min(unknown)!r}; the {self.owner} tower knows {sorted(self._encoders)}"
            )
        nothing: Sequence[RawValue] = (None,) * num_rows
        return {name: encode(columns.get(name, nothing)) for name, encode in self._encoders.items()}

    def encode_column(self, name: str, values: Sequence[RawValue]) -> NDArray[Any]:
        """Encodes the values `[B]` of one feature of this tower; otherwise as `encode`."""
        return self._encoders[name](values)

    def encode_rows(self, rows: Sequence[Mapping[str, RawValue]]) -> Arrays:
        """Encodes rows given as mappings from feature name to raw value; otherwise as `encode`."""
        names = {name for row in rows for name in row}
        return self.encode({name: [row.get(name) for row in rows] for name in names}, len(rows))

    def num_ids(self, name: str) -> int:
        """Rows that the embedding table of a feature needs, missing and unknown included.

        Raises:
            InvalidFeatureError: the feature has no ids.
        """
        feature = self._by_name[name]
        if isinstance(feature, SequenceFeature):
            return self.num_ids(feature.items)
        if isinstance(feature, NumberFeature) and feature.scaling == "quantile":
            return len(feature.boundaries) + 2
        if isinstance(feature, TextFeature) and feature.encoder is None:
            return feature.hash_buckets + 1
        if isinstance(feature, CategoricalFeature | CategoricalListFeature):
            if feature.hash_buckets is not None:
                return feature.hash_buckets + 1
            return len(self._token_ids[name]) + _FIRST_VOCABULARY_ID
        raise InvalidFeatureError(f"feature {name!r}: kind {feature.kind} has no ids")

    def _column_encoder(self, feature: Feature) -> Callable[[Sequence[RawValue]], NDArray[Any]]:
        match feature:
            case CategoricalFeature():
                token_id = self._token_id(feature)
                return lambda values: _encode_categorical(feature, values, token_id)
            case CategoricalListFeature():
                token_id = self._token_id(feature)
                return lambda values: _pad(
                    [_list_ids(feature, row, value, token_id) for row, value in enumerate(values)]
                )
            case SequenceFeature():
                shared = self._by_name[feature.items]
                assert isinstance(shared, CategoricalFeature)
                token_id = self._token_id(shared)
                left_out = UNKNOWN_ID if shared.hash_buckets is None else None
                return lambda values: _pad(
                    [_sequence_ids(feature, row, value, token_id, left_out) for row, value in enumerate(values)]
                )
            case NumberFeature():
                return lambda values: _encode_number(feature, values)
            case TimestampFeature():
                return lambda values: _encode_timestamp(feature, values)
            case TextFeature() if feature.encoder is not None:
                tokenizer = self._tokenizers[feature.name]
                return lambda values: _pad(
                    [tokenizer.ids(_text(feature, row, value)) for row, value in enumerate(values)]
                )
            case TextFeature():
                return lambda values: _pad([_text_ids(feature, row, value) for row, value in enumerate(values)])
            case VectorFeature():
                return lambda values: _encode_vector(feature, values)
            case _:
                assert_never(feature)

    def _token_id(self, feature: CategoricalFeature | CategoricalListFeature) -> Callable[[str], int]:
        if feature.hash_buckets is not None:
            num_buckets = feature.hash_buckets
            return lambda token: 1 + stable_hash(token) % num_buckets
        token_ids = self._token_ids[feature.name]
        return lambda token: token_ids.get(token, UNKNOWN_ID)


def category_token(value: Any) -> str | None:
    """The string that stands for a categorical value, so that 42, 42.0 and "42" are the same.

    Returns:
        The token; None for a missing value.

    Raises:
        InvalidFeatureError: the value is neither a string, an integer nor a boolean.
    """
    if value is None:
        return None
    if isinstance(value, str):
        return value or None
    if isinstance(value, bool | np.bool_):
        return "true" if value else "false"
    if isinstance(value, int | np.integer):
        return str(int(value))
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    raise InvalidFeatureError(f"expected a string or an integer, got {_described(value)}")


def finite_number(value: Any) -> float | None:
    """A number as a float; None for a missing value.

    Raises:
        InvalidFeatureError: the value is not a number, or not finite.
    """
    if value is None:
        return None
    if isinstance(value, datetime):
        value = (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise InvalidFeatureError(f"expected a number, got {_described(value)}")
    try:
        number = float(value)
    except OverflowError as error:
        raise InvalidFeatureError("expected a number that fits 64 bits, got a larger integer") from error
    if not math.isfinite(number):
        raise InvalidFeatureError(f"expected a finite number, got {number}")
    return number


def scaled_number(feature: NumberFeature, value: float) -> float:
    """A number before standardisation: itself, or sign(x) log(1 + |x|)."""
    return math.copysign(math.log1p(abs(value)), value) if feature.scaling == "log1p" else value


def stable_hash(token: str) -> int:
    """64-bit hash that is the same in every process (xxh3)."""
    return xxhash.xxh3_64_intdigest(token.encode("utf-8", "surrogatepass"))


def text_ngrams(feature: TextFeature, text: str) -> list[str]:
    """Word n-grams, then the character n-grams of each `<word>` (Bojanowski et al. 2017), of normalised text."""
    words = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    ngrams = [
        "w " + " ".join(words[start : start + size])
        for size in feature.word_ngrams
        for start in range(len(words) - size + 1)
    ]
    for size in feature.char_ngrams:
        for word in words:
            marked = f"<{word}>"
            ngrams.extend("c " + marked[start : start + size] for start in range(len(marked) - size + 1))
    return ngrams


def _encode_categorical(
    feature: CategoricalFeature, values: Sequence[RawValue], token_id: Callable[[str], int]
) -> NDArray[np.int64]:
    ids = np.zeros(len(values), dtype=np.int64)
    for row, value in enumerate(values):
        token = _checked(feature, row, category_token, value)
        if token is not None:
            ids[row] = token_id(token)
    return ids


def _list_ids(feature: CategoricalListFeature, row: int, value: RawValue, token_id: Callable[[str], int]) -> list[int]:
    return [token_id(token) for token in _tokens(feature, row, value)][: feature.max_length]


def _sequence_ids(
    feature: SequenceFeature, row: int, value: RawValue, token_id: Callable[[str], int], left_out: int | None
) -> list[int]:
    """Items that the model has never seen say nothing and are left out; hash buckets know no unknown id."""
    ids = [token_id(token) for token in _tokens(feature, row, value)]
    return [token for token in ids if token != left_out][-feature.max_length :]


def _text_ids(feature: TextFeature, row: int, value: RawValue) -> list[int]:
    ngrams = text_ngrams(feature, _text(feature, row, value))[: feature.max_length]
    return [1 + stable_hash(ngram) % feature.hash_buckets for ngram in ngrams]


def _text(feature: TextFeature, row: int, value: RawValue) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _failure(feature, row, f"expected a string, got {_described(value)}")
    return value


def _tokenizer(feature: Feature, tokenizers: Mapping[str, str]) -> TextTokenizer:
    assert isinstance(feature, TextFeature)
    if feature.name not in tokenizers:
        raise InvalidFeatureError(f"feature {feature.name!r}: its tokenizer is missing")
    try:
        return TextTokenizer(tokenizers[feature.name], feature.max_length)
    except InvalidFeatureError as error:
        raise InvalidFeatureError(f"feature {feature.name!r}: {error}") from error


def _encode_number(feature: NumberFeature, values: Sequence[RawValue]) -> NDArray[Any]:
    numbers = [_checked(feature, row, finite_number, value) for row, value in enumerate(values)]
    if feature.scaling == "quantile":
        ids = np.zeros(len(values), dtype=np.int64)
        for row, number in enumerate(numbers):
            if number is not None:
                ids[row] = 1 + np.searchsorted(feature.boundaries, number, side="right")
        return ids
    encoded = np.zeros((len(values), 2), dtype=np.float32)
    for row, number in enumerate(numbers):
        if number is None:
            encoded[row, 1] = 1.0
        else:
            scaled = (scaled_number(feature, number) - feature.mean) / feature.std
            encoded[row, 0] = min(max(scaled, -_LARGEST_SCALED), _LARGEST_SCALED)
    return encoded


def _encode_timestamp(feature: TimestampFeature, values: Sequence[RawValue]) -> NDArray[np.float32]:
    encoded = np.zeros((len(values), _NUM_TIMESTAMP_COLUMNS), dtype=np.float32)
    for row, value in enumerate(values):
        moment_s = _checked(feature, row, finite_number, value)
        if moment_s is None:
            encoded[row, -1] = 1.0
            continue
        age_days = (feature.reference_time_s - moment_s) / _SECONDS_PER_DAY
        day_angle = 2 * math.pi * (moment_s / _SECONDS_PER_DAY % 1.0)
        week_angle = 2 * math.pi * (moment_s / _SECONDS_PER_DAY % 7.0) / 7.0
        log_age = math.copysign(math.log1p(abs(age_days)), age_days)
        # Divided by 10 so that a lifetime of days stays near 1, as the other columns do.
        encoded[row, :5] = (
            log_age / 10,
            math.sin(day_angle),
            math.cos(day_angle),
            math.sin(week_angle),
            math.cos(week_angle),
        )
    return encoded


def _encode_vector(feature: VectorFeature, values: Sequence[RawValue]) -> NDArray[np.float32]:
    encoded = np.zeros((len(values), feature.size), dtype=np.float32)
    for row, value in enumerate(values):
        if value is None:
            continue
        if isinstance(value, str) or not isinstance(value, Sequence | np.ndarray):
            raise _failure(feature, row, f"expected a list of {feature.size} numbers, got {_described(value)}")
        if len(value) == 0:
            continue
        if len(value) != feature.size:
            raise _failure(feature, row, f"expected {feature.size} numbers, got {len(value)}")
        try:
            numbers = np.asarray(value)
        except ValueError as error:
            raise _failure(feature, row, "expected a list of numbers") from error
        # Asked of numpy, because assigning would turn "1" and True into 1.0.
        if numbers.ndim != 1 or numbers.dtype.kind not in "iuf":
            raise _failure(feature, row, "expected a list of numbers")
        with np.errstate(over="ignore"):
            encoded[row] = numbers
        if not np.isfinite(encoded[row]).all():
            raise _failure(feature, row, "expected finite numbers that fit 32 bits")
    return encoded


def _tokens(feature: Feature, row: int, value: RawValue) -> list[str]:
    if value is None:
        return []
    if isinstance(value, str) or not isinstance(value, Sequence | np.ndarray):
        raise _failure(feature, row, f"expected a list, got {_described(value)}")
    try:
        return [token for entry in value if (token := category_token(entry)) is not None]
    except InvalidFeatureError as error:
        raise _failure(feature, row, f"in its list: {error}") from error


def _pad(rows: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    """Ragged ids to `[B, L]`, L at least 1."""
    padded = np.zeros((len(rows), max((len(row) for row in rows), default=1) or 1), dtype=np.int64)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return padded


def _checked(feature: Feature, row: int, convert: Callable[[Any], _T], value: Any) -> _T:
    try:
        return convert(value)
    except InvalidFeatureError as error:
        raise _failure(feature, row, str(error)) from error


def _failure(feature: Feature, row: int, message: str) -> InvalidFeatureError:
    return InvalidFeatureError(f"feature {feature.name!r}: {message}", row)


def _described(value: Any) -> str:
    if isinstance(value, str):
        return f"the string {value[:40]!r}"
    if isinstance(value, Sequence | np.ndarray):
        return "a list"
    return f"{type(value).__name__} {value!r}"[:60]
