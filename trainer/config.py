"""The training configuration: one TOML file, read once into frozen values.

Deliberately does not know torch, nor what the data files hold.
"""

import difflib
import itertools
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from towers.errors import InvalidInputError, InvalidSchemaError
from towers.schema import (
    PACKAGED_ENCODERS,
    CategoricalFeature,
    FeatureSchema,
    SequenceFeature,
    TimestampFeature,
    parse_schema,
)

Activation = Literal["relu", "gelu", "silu"]
Normalisation = Literal["none", "layer"]
Negatives = Literal["batch", "all"]
LogQ = Literal["counts", "streaming", "none"]
TableOptimiser = Literal["adamw", "adagrad"]
Schedule = Literal["constant", "linear", "cosine"]
Moment = Literal["end", "interaction"]
Precision = Literal["float32", "bfloat16"]
Layout = Literal["tables", "beir"]

_METRIC = re.compile(r"(recall|ndcg|mrr)_at_(\d+)")
_RERANKER = "reranker"
_CHOSEN = ("features", "model")
"""What must be there and `twotower train --auto` chooses."""
_TABLES = ("data", "features", "model", "training", "evaluation", "export")


class _Table(BaseModel):
    """What all tables share: frozen, strict about types, no unknown key, no infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class DataConfig(_Table):
    """`[data]`: the three tables, Parquet or CSV by their ending, and the columns that hold the ids."""

    layout: Layout = "tables"
    """`beir`: documents are the items, queries the users, judgements the interactions, with the fields and the split
    of BEIR (`trainer.beir`)."""
    folder: str = "."
    """Where the files are, relative to the TOML file."""
    interactions: str = Field(min_length=1)
    """A file, or a folder of Parquet files or a pattern such as `days/*.parquet`, read as one table."""
    items: str = Field(min_length=1)
    users: str | None = Field(default=None, min_length=1)
    """Without it users are the distinct ids of the interactions and have no other column."""
    user_id_column: str = Field(default="user_id", min_length=1)
    item_id_column: str = Field(default="item_id", min_length=1)
    timestamp_column: str = Field(default="timestamp", min_length=1)
    """Unix seconds, or a date and time."""
    split_column: str | None = Field(default=None, min_length=1)
    """Of the interactions: what each is for, where that is given (`trainer.columns.PARTS`). Without it the two newest
    of each user are held out."""
    weight_column: str | None = Field(default=None, min_length=1)
    """Of the interactions: how much the loss of each counts beside the others'. Without it all count alike."""
    label_column: str | None = Field(default=None, min_length=1)
    """Of the interactions: 1 where the item was chosen, 0 where it was shown and not chosen; only what was chosen is an
    interaction. Without it all were chosen."""
    csv_separator: str = Field(default=",", min_length=1, max_length=1)

    @model_validator(mode="after")
    def _columns_of_the_layout(self) -> "DataConfig":
        if self.layout == "beir":
            # By their values: a checkpoint's configuration, which is read again, names all of them.
            fields = type(self).model_fields.items()
            named = {name: field.default for name, field in fields if name.endswith(("_column", "_separator"))}
            found = sorted(name for name, default in named.items() if getattr(self, name) != default)
            if found:
                raise ValueError(f'layout = "beir" has columns of its own; leave out {" and ".join(found)}')
            if self.users is None:
                raise ValueError('layout = "beir" needs the file of the queries; add users, such as "queries.jsonl"')
        return self


class ModelConfig(_Table):
    """`[model]`: the shape of both towers."""

    dim: int = Field(ge=1, le=4096)
    """D, width of both towers' embeddings."""
    matryoshka_dims: tuple[int, ...] = ()
    """Widths below D, to which embeddings are trained to be cut (`trainer.matryoshka`)."""
    query_hidden: tuple[int, ...] = ()
    """Widths of the query tower's hidden layers; without any it is a linear projection."""
    item_hidden: tuple[int, ...] = ()
    embedding_dim: int = Field(default=32, ge=1, le=4096)
    """Width of the embedding tables whose feature names none."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the concatenated features, and of each hidden layer, that is dropped in training."""
    activation: Activation = "relu"
    normalisation: Normalisation = "none"
    """Of each hidden layer, before its activation."""
    transformer_blocks: int = Field(default=2, ge=1, le=64)
    """Of each history that is pooled by a transformer, as the next two."""
    transformer_heads: int = Field(default=2, ge=1, le=64)
    transformer_dropout: float = Field(default=0.2, ge=0, lt=1)

    @field_validator("matryoshka_dims")
    @classmethod
    def _rising_below_dim(cls, widths: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        limits = (0, *widths, info.data.get("dim", max(widths, default=0) + 1))
        if any(width >= wider for width, wider in itertools.pairwise(limits)):
            raise ValueError("give different widths from 1 up to below dim, rising, such as [16, 32]")
        return widths

    @field_validator("query_hidden", "item_hidden")
    @classmethod
    def _positive(cls, widths: tuple[int, ...]) -> tuple[int, ...]:
        if any(not 1 <= width <= 65_536 for width in widths):
            raise ValueError("each width must be from 1 to 65536")
        return widths


class TrainingConfig(_Table):
    """`[training]`: the loop."""

    batch_size: int = Field(default=1024, ge=2)
    """B"""
    chunk_size: int | None = Field(default=None, ge=1)
    """Rows of a batch that are in memory at a time, where the whole would not fit; None: all of them."""
    epochs: int = Field(default=20, ge=1)
    """At most this many passes over the training interactions."""
    learning_rate: float = Field(default=0.001, gt=0)
    encoder_learning_rate: float | None = Field(default=None, gt=0)
    """Of pretrained text encoders and their adapters. None: that of all else."""
    table_optimiser: TableOptimiser = "adamw"
    """Of embedding tables: AdamW, as of all else, or row-wise Adagrad (`trainer.optimisers.RowwiseAdagrad`)."""
    table_learning_rate: float | None = Field(default=None, gt=0)
    """Of embedding tables. None: that of all else."""
    schedule: Schedule = "constant"
    """Of the learning rate, over all `epochs`: as it is, or down to zero."""
    warmup_steps: int = Field(default=0, ge=0)
    """First steps, in which the learning rate rises from zero."""
    weight_decay: float = Field(default=0.0, ge=0)
    temperature: float = Field(default=0.1, gt=0)
    """Scores are divided by it before the softmax."""
    learn_temperature: bool = False
    """Whether it is only where training starts."""
    symmetric: bool = False
    """Whether each item is also to find its query among those of the batch."""
    negatives: Negatives = "batch"
    """The B - 1 other items of a batch, or all items: the exact softmax, for catalogues that a step can afford."""
    uniform_negatives: int = Field(default=0, ge=0)
    """Items drawn uniformly for each batch, that all its queries have as negatives too."""
    memory: int = Field(default=0, ge=0)
    """Items of the batches before, with their embeddings as made then, that are negatives once more."""
    hard_negatives: int = Field(default=0, ge=0)
    """Items near to each query, that it has as negatives of its own."""
    hard_negatives_ranks: tuple[int, int] = (1, 100)
    """The window that they are drawn from: the first and the last rank, once items known to be liked are left out."""
    hard_negatives_every: int = Field(default=100, ge=1)
    """Steps for which the items are searched as they were embedded at the first of them."""
    shown_negatives: int = Field(default=0, ge=0)
    """Items that each query's user was shown and did not choose, that the query has as negatives of its own."""
    logq: LogQ = "counts"
    """Where the correction of negatives for how often they are drawn knows it from, for those of the batch: the
    training interactions, or the batches so far. `none`: no negative is corrected."""
    logq_rate: float = Field(default=0.05, gt=0, le=1)
    """What the newest gap between two places with an item counts for in the moving average of `streaming`."""
    mask_known_positives: bool = True
    """Whether all items of a user's training interactions are no negatives of hers, and not only the row's own."""
    score_margin: float | None = Field(default=None, ge=-2, le=2)
    """Negatives that score higher than the positive by more than this, as a cosine, are left out."""
    history_share: float | None = Field(default=None, gt=0, lt=1)
    """For logs whose order means nothing: all interactions of a user are asked for at once, from a random share of
    them as the history. None: each from what came before it."""
    items_as_of: Moment = "end"
    """When items are as old and as popular as training sees them: at the end of the training data, or at each
    interaction (`trainer.as_of`)."""
    precision: Precision = "float32"
    """Of the matrix products of the towers in training; weights, embeddings, scores and the loss are float32 always."""
    patience: int = Field(default=3, ge=1)
    """Training ends after this many epochs without a better validation metric."""
    seed: int = Field(default=0, ge=0, lt=2**32)

    @field_validator("logq", mode="before")
    @classmethod
    def _logq_in_words(cls, value: Any) -> Any:
        """As a switch, which it was before there were two ways to know q, it goes on working."""
        return {True: "counts", False: "none"}[value] if isinstance(value, bool) else value

    @field_validator("hard_negatives_ranks")
    @classmethod
    def _a_window(cls, ranks: tuple[int, int], info: ValidationInfo) -> tuple[int, int]:
        first, last = ranks
        if first < 1 or last - first + 1 < max(1, info.data.get("hard_negatives", 0)):
            raise ValueError("give the first and the last rank, from 1, of a window with room for hard_negatives")
        return ranks

    @model_validator(mode="after")
    def _negatives_once(self) -> "TrainingConfig":
        others = {
            "uniform_negatives": self.uniform_negatives > 0,
            "memory": self.memory > 0,
            "hard_negatives": self.hard_negatives > 0,
            "shown_negatives": self.shown_negatives > 0,
            'logq = "streaming"': self.logq == "streaming",
        }
        found = [name for name, is_set in others.items() if is_set]
        if self.negatives == "all" and found:
            raise ValueError(f'negatives = "all" has every item once already; leave out {" and ".join(found)}')
        return self

    @model_validator(mode="after")
    def _one_query_for_all(self) -> "TrainingConfig":
        """What a query is scored against must be the same for all that it asks for."""
        if self.history_share is not None:
            others = {
                "mask_known_positives = false": not self.mask_known_positives,
                "symmetric": self.symmetric,
                "score_margin": self.score_margin is not None,
            }
            found = [name for name, is_set in others.items() if is_set]
            if found:
                raise ValueError(
                    f"history_share asks for all of a user's items at once; leave out {' and '.join(found)}"
                )
        return self


class EvaluationConfig(_Table):
    """`[evaluation]`: exact ranking of all items for each held-out interaction."""

    ks: tuple[int, ...] = (10,)
    exclude_seen: bool = True
    """Whether items of the user's history leave the ranking."""
    metric: str = "recall_at_10"
    """Chooses the best epoch, on validation, and is what publishing is judged by, on the test set."""
    max_loss: float = Field(default=0.1, ge=0, le=1)
    """Largest loss of the metric to the live checkpoint, as a share of its figure."""
    max_slice_loss: Mapping[str, Annotated[float, Field(ge=0, le=1)]] = {}
    """The same for slices, by their names."""

    @field_validator("ks")
    @classmethod
    def _rising(cls, ks: tuple[int, ...]) -> tuple[int, ...]:
        if not ks or min(ks) < 1 or list(ks) != sorted(set(ks)):
            raise ValueError("give one or more different numbers from 1 up, rising, such as [10, 50]")
        return ks

    @field_validator("metric")
    @classmethod
    def _computed(cls, metric: str, info: ValidationInfo) -> str:
        ks = info.data.get("ks", ())
        match = _METRIC.fullmatch(metric)
        if match is None or (ks and int(match.group(2)) not in ks):
            choices = [f"{name}_at_{k}" for k in ks for name in ("recall", "ndcg", "mrr")]
            raise ValueError(f"use one of {choices}, or add its k to ks")
        return metric


class ExportConfig(_Table):
    """`[export]`: what is published of the trained towers."""

    dim: int | None = Field(default=None, ge=1)
    """Width of the published embeddings, one of `[model] matryoshka_dims`. None: all that are trained."""
    int8: bool = False
    """Whether the towers' weights and activations are 8-bit integers where the gate allows it, and float32 else."""
    int8_min_overlap: float = Field(default=0.95, ge=0, le=1)
    """The gate: mean share of the ten best items of held-out queries, by the towers in float32, that they find too."""


class RerankerFeature(_Table):
    """A `[[features]]` table with `owner = "reranker"`: it needs query and item, is in no tower, and is kept in the
    manifest for whoever ranks what was retrieved.
    """

    name: str = Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$", max_length=64)
    owner: Literal["reranker"]
    kind: Literal["categorical", "categorical_list", "number", "timestamp", "text", "vector"] | None = None
    source: Literal["interactions", "items", "users"] = "interactions"
    column: str | None = Field(default=None, min_length=1)


class TrainerConfig(_Table):
    """A whole configuration. The manifest of the checkpoint keeps it."""

    run_folder: str | None = Field(default=None, min_length=1)
    """Where the resumable state lives, relative to the TOML file; `var/runs/<name of the TOML file>` when left out."""
    tensorboard: bool = False
    """Whether the run's curves are written for TensorBoard too."""
    data: DataConfig
    features: tuple[Mapping[str, Any], ...] = Field(min_length=1)
    """Feature declarations, as written; `feature_schema` parses them."""
    model: ModelConfig
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    export: ExportConfig = ExportConfig()

    @field_validator("export")
    @classmethod
    def _trained_to_be_cut(cls, export: ExportConfig, info: ValidationInfo) -> ExportConfig:
        model: ModelConfig | None = info.data.get("model")
        if model is not None and export.dim not in (None, model.dim, *model.matryoshka_dims):
            raise ValueError(f"dim = {export.dim} is not a width that is trained; add it to [model] matryoshka_dims")
        return export

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths that the published embeddings can be cut to, rising; the last is all of them."""
        dim = self.export.dim or self.model.dim
        return (*(width for width in self.model.matryoshka_dims if width < dim), dim)

    def feature_schema(self) -> FeatureSchema:
        """The declared schema, its learned parameters still at their defaults."""
        return parse_schema(_of_towers(self.features))

    def reranker_features(self) -> tuple[str, ...]:
        """Names of the features that are in no tower."""
        return tuple(feature["name"] for feature in self.features if feature.get("owner") == _RERANKER)


def read_config(path: Path) -> TrainerConfig:
    """Reads a TOML file.

    Raises:
        CrossTowerFeatureError: a feature's source is the interaction table.
        InvalidInputError: anything else. The message has one line for each mistake, naming file, key and fix.
    """
    return parse_config(read_toml(path), path)


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file, whatever it says.

    Raises:
        InvalidInputError: it cannot be read, or is no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidInputError(f"{path}: cannot be read ({error.strerror}); give the path of a TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"{path}: not valid TOML: {error}") from error


def parse_config(content: Mapping[str, Any], path: Path) -> TrainerConfig:
    """A configuration from the content of its file.

    Args:
        content: The tables.
        path: The file, for messages, and for what is relative to it.

    Raises:
        CrossTowerFeatureError: as `read_config`.
        InvalidInputError: as `read_config`.
    """
    mistakes: list[str] = []
    kind: type[InvalidInputError] = InvalidInputError
    try:
        # Through JSON, because strict validation accepts a list for a tuple only there.
        config = TrainerConfig.model_validate_json(json.dumps(content, default=str))
    except ValidationError as error:
        mistakes += [_in_words(detail) for detail in error.errors()]
    declarations = content.get("features")
    if isinstance(declarations, list) and declarations and all(isinstance(entry, dict) for entry in declarations):
        try:
            mistakes += [f"[[features]] {mistake}" for mistake in _reranker_mistakes(declarations)]
            mistakes += [
                f"[[features]] {mistake}" for mistake in _unshared_widths(parse_schema(_of_towers(declarations)))
            ]
        except InvalidSchemaError as error:
            mistakes.append(f"[[features]] {error}")
            kind = type(error)
    if not mistakes:
        mistakes += [f"[[features]] {mistake}" for mistake in _indivisible_widths(config)]
        mistakes += [f"[training] {mistake}" for mistake in _untimely(config)]
        if config.training.shown_negatives and config.data.label_column is None:
            mistakes.append("[training] shown_negatives: nothing says what was shown; name [data] label_column")
    if mistakes:
        raise kind("\n".join(f"{path}: {mistake}" for mistake in mistakes))
    return config.model_copy(update={"features": tuple(_located(entry, path.parent) for entry in config.features)})


def _located(declaration: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """A feature declaration whose encoder, unless it is a packaged one, is a path from here and not from a folder."""
    encoder = declaration.get("encoder")
    if not isinstance(encoder, str) or encoder in PACKAGED_ENCODERS:
        return declaration
    return {**declaration, "encoder": str(folder / encoder)}


def _of_towers(declarations: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [declaration for declaration in declarations if declaration.get("owner") != _RERANKER]


def _reranker_mistakes(declarations: Sequence[Mapping[str, Any]]) -> list[str]:
    mistakes = []
    names = [declaration.get("name") for declaration in declarations]
    for declaration in declarations:
        if declaration.get("owner") != _RERANKER:
            continue
        name = declaration.get("name")
        if names.count(name) > 1:
            mistakes.append(f"feature {name!r}: its name is repeated; feature names must be unique")
        try:
            RerankerFeature.model_validate(declaration)
        except ValidationError as error:
            mistakes += [
                f'feature {name!r}, {detail["loc"][0]}: with owner = "reranker" it has only '
                f"{', '.join(RerankerFeature.model_fields)}"
                if detail["type"] == "extra_forbidden"
                else f"feature {name!r}, {detail['loc'][0]}: {detail['msg']}"
                for detail in error.errors()
            ]
    return mistakes


def _unshared_widths(schema: FeatureSchema) -> list[str]:
    return [
        f"feature {feature.name!r}, embedding_dim: a sequence looks its ids up in the table of {feature.items!r}; "
        "set embedding_dim there"
        for feature in schema.features
        if isinstance(feature, SequenceFeature) and feature.embedding_dim is not None
    ]


def _indivisible_widths(config: TrainerConfig) -> list[str]:
    schema, heads = config.feature_schema(), config.model.transformer_heads
    widths = {
        feature.name: feature.embedding_dim or config.model.embedding_dim
        for feature in schema.of("item")
        if isinstance(feature, CategoricalFeature)
    }
    return [
        f"feature {feature.name!r}, pooling: {widths[feature.items]} columns of {feature.items!r} cannot be shared out "
        f"among {heads} heads; set embedding_dim to a multiple, or [model] transformer_heads"
        for feature in schema.features
        if isinstance(feature, SequenceFeature) and feature.pooling == "transformer" and widths[feature.items] % heads
    ]


def _untimely(config: TrainerConfig) -> list[str]:
    options, features = config.training, config.feature_schema().of("item")
    counted = [feature.name for feature in features if feature.source == "popularity"]
    if options.items_as_of == "end":
        return [
            f'items_as_of: feature {name!r} counted at the end would know what is to be predicted; set "interaction"'
            for name in counted
        ]
    if not counted and not any(isinstance(feature, TimestampFeature) for feature in features):
        return ['items_as_of = "interaction": no item feature is a timestamp or a popularity; leave it out']
    others = {'negatives = "all"': options.negatives == "all", "history_share": options.history_share is not None}
    return [
        f'items_as_of = "interaction": {name} has no moment at which all its items are looked at; leave one of them out'
        for name, is_set in others.items()
        if is_set
    ]


def _in_words(detail: Any) -> str:
    """One line for one mistake: the key, what is wrong, what to write."""
    location: Sequence[str | int] = detail["loc"]
    keys = [str(part) for part in location]
    message = str(detail["msg"]).removeprefix("Value error, ")
    place = f"[{keys[0]}] {'.'.join(keys[1:])}".strip() if keys[0] in _TABLES else ".".join(keys)
    if detail["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        near = difflib.get_close_matches(keys[-1], known, n=1)
        advice = f"did you mean {near[0]!r}?" if near else f"use one of {known}"
        return f"{place}: unknown key; {advice}"
    if detail["type"] == "missing":
        return f"{place}: missing; add it" + (", or let --auto choose it" if keys[0] in _CHOSEN else "")
    if keys[0] == "features" and len(keys) == 1:
        return "[[features]]: declare each feature in a [[features]] table of its own"
    return f"{place} = {json.dumps(detail['input'], default=str)[:60]}: {message}"


def _known_keys(location: Sequence[str | int]) -> list[str]:
    tables: Mapping[tuple[str | int, ...], type[BaseModel]] = {
        (): TrainerConfig,
        ("data",): DataConfig,
        ("model",): ModelConfig,
        ("training",): TrainingConfig,
        ("evaluation",): EvaluationConfig,
        ("export",): ExportConfig,
    }
    return sorted(tables[tuple(location)].model_fields)
