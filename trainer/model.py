"""Both towers in torch: encoded features in, unit embeddings out.

Deliberately does not know raw values, losses or files.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from towers.features import FeatureEncoder
from towers.schema import (
    CategoricalFeature,
    CategoricalListFeature,
    Feature,
    FeatureSchema,
    NumberFeature,
    SequenceFeature,
    TextFeature,
)
from towers.tower import input_name
from trainer.config import Activation, ModelConfig
from trainer.pooling import AttentionPooling, CausalTransformer
from trainer.tables import Table
from trainer.text import PretrainedText, pretrained_texts

_SQUARED_NORM_FLOOR = 1e-12
_TABLE_STD = 0.05
_ACTIVATIONS: Mapping[Activation, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}


class TowerNetwork(nn.Module):
    """One tower: each feature becomes a vector, all are concatenated, an MLP projects them to a unit vector."""

    def __init__(
        self,
        features: Sequence[Feature],
        tables: Mapping[str, Table | PretrainedText],
        widths: Mapping[str, int],
        hidden: Sequence[int],
        config: ModelConfig,
    ) -> None:
        """Builds the layers.

        Args:
            features: The tower's features, in the order of the schema.
            tables: Embedding tables and text encoders by feature name; each may be shared with the other tower.
            widths: Columns of the features without a table, by feature name.
            hidden: Widths of the hidden layers.
            config: The shape of the network.
        """
        super().__init__()
        self.features = tuple(features)
        # Prefixed, because a ModuleDict refuses names such as "items" and "type".
        self.tables = nn.ModuleDict(
            {input_name(feature.name): tables[feature.name] for feature in features if feature.name in tables}
        )
        self.pooling = nn.ModuleDict(
            {
                input_name(feature.name): _pooling(feature, tables[feature.name].embedding_dim, config)
                for feature in features
                if isinstance(feature, SequenceFeature) and feature.pooling != "mean"
            }
        )
        self._averaged = frozenset(
            input_name(feature.name)
            for feature in features
            if isinstance(feature, CategoricalListFeature | SequenceFeature | TextFeature)
            and isinstance(tables[feature.name], Table)
            and input_name(feature.name) not in self.pooling
        )
        layers: list[nn.Module] = [nn.Dropout(config.dropout)]
        columns = [
            tables[feature.name].embedding_dim if feature.name in tables else widths[feature.name]
            for feature in features
        ]
        width = sum(columns)
        for hidden_width in hidden:
            layers.append(nn.Linear(width, hidden_width))
            if config.normalisation == "layer":
                layers.append(nn.LayerNorm(hidden_width))
            layers += [_ACTIVATIONS[config.activation](), nn.Dropout(config.dropout)]
            width = hidden_width
        projection = nn.Linear(width, config.dim)
        if not hidden:
            _start_as_sum(projection, columns, [feature.name in tables for feature in features])
        layers.append(projection)
        self.projection = nn.Sequential(*layers)

    def forward(self, features: Mapping[str, Tensor], places: Tensor | None = None) -> Tensor:
        """Embeds encoded features.

        Args:
            features: Feature name to its encoded values, shapes as `towers.features.FeatureEncoder` gives them.
            places: `[B, 2]` a row of the features, and after how many entries of its history the query is asked: all
                places of a history in one pass. Without them each row is asked once, after its newest entry.

        Returns:
            `[B, D]` unit embeddings.
        """
        parts = [self._vector(feature, features[feature.name], places) for feature in self.features]
        # In float32 where training multiplies in fewer bits, whose unit vectors would be off by as many.
        return normalised(self.projection(torch.cat(parts, dim=1)).float())  # [B, D]

    def cut(self, dim: int) -> None:
        """From now on embeddings are the first dimensions of what they were, at unit length."""
        last = self.projection[-1]
        assert isinstance(last, nn.Linear)
        last.weight, last.bias = nn.Parameter(last.weight[:dim].detach()), nn.Parameter(last.bias[:dim].detach())

    def _vector(self, feature: Feature, values: Tensor, places: Tensor | None) -> Tensor:
        name = input_name(feature.name)
        vectors = values  # [W, columns]
        if name in self.tables:
            table = self.tables[name]
            read = table.mean if isinstance(table, Table) and name in self._averaged else table
            vectors = read(values)  # [W, E] or [W, L, E]
        if name in self.pooling:
            pooling = self.pooling[name]
            if places is not None and isinstance(pooling, CausalTransformer):
                return pooling.after_each(vectors)[places[:, 0], places[:, 1]]  # [B, E]
            vectors = pooling(vectors, values != 0)  # [W, E]
        return vectors if places is None else vectors[places[:, 0]]  # [B, E]


class TwoTowers(nn.Module):
    """The query tower and the item tower, with the tables they share."""

    widths: tuple[int, ...]
    """Widths that embeddings are trained to be cut to, rising; the last is D."""

    def __init__(
        self, schema: FeatureSchema, query_encoder: FeatureEncoder, item_encoder: FeatureEncoder, config: ModelConfig
    ) -> None:
        """Builds both towers with random weights.

        Args:
            schema: The fitted schema.
            query_encoder: Knows the number of ids of the query's features.
            item_encoder: The same for the item's.
            config: The shape.
        """
        super().__init__()
        encoders = {"query": query_encoder, "item": item_encoder}
        tables: dict[str, Table | PretrainedText] = {
            feature.name: _table(feature, encoders[feature.owner].num_ids(feature.name), config)
            for feature in schema.features
            if _has_own_table(feature)
        }
        tables |= pretrained_texts(schema)
        for feature in schema.features:
            if isinstance(feature, SequenceFeature):
                tables[feature.name] = tables[feature.items]
        # Encoding one empty row says how many columns a feature has.
        widths = {
            name: array.shape[1]
            for encoder in encoders.values()
            for name, array in encoder.encode({}, 1).items()
            if name not in tables
        }
        self.widths = (*config.matryoshka_dims, config.dim)
        self.query = TowerNetwork(schema.of("query"), tables, widths, config.query_hidden, config)
        self.item = TowerNetwork(schema.of("item"), tables, widths, config.item_hidden, config)


def normalised(embeddings: Tensor) -> Tensor:
    """Unit vectors `[…, D]`. A zero vector stays zero, and both its value and its gradient are finite.

    The floor is a maximum, because the ONNX exporter takes the addition of so small a constant for none at all.
    """
    return embeddings * torch.rsqrt(embeddings.square().sum(dim=-1, keepdim=True).clamp_min(_SQUARED_NORM_FLOOR))


def _start_as_sum(projection: nn.Linear, columns: Sequence[int], is_embedded: Sequence[bool]) -> None:
    """A tower without hidden layers starts as the sum of its embeddings; of other features as chance will have it.

    A history then stands near the items that it holds from the start, since it shares their table: from a random
    projection in each tower that takes epochs.
    """
    blocks = zip(torch.split(projection.weight, list(columns), dim=1), is_embedded, strict=True)
    with torch.no_grad():
        projection.bias.zero_()
        for block, starts_as_itself in blocks:
            if starts_as_itself:
                block.copy_(torch.eye(*block.shape))


def _table(feature: Feature, num_ids: int, config: ModelConfig) -> Table:
    """A table whose missing and unknown rows say nothing at first."""
    table = Table(num_ids, _embedding_dim(feature, config))
    nn.init.normal_(table.weight, std=_TABLE_STD)
    has_unknown = isinstance(feature, CategoricalFeature | CategoricalListFeature) and feature.hash_buckets is None
    with torch.no_grad():
        table.weight[: 2 if has_unknown else 1] = 0.0
    return table


def _pooling(feature: SequenceFeature, width: int, config: ModelConfig) -> nn.Module:
    if feature.pooling == "attention":
        return AttentionPooling(width, feature.max_length)
    return CausalTransformer(
        width,
        feature.max_length,
        config.transformer_blocks,
        config.transformer_heads,
        config.transformer_dropout,
    )


def _has_own_table(feature: Feature) -> bool:
    if isinstance(feature, NumberFeature):
        return feature.scaling == "quantile"
    if isinstance(feature, TextFeature):
        return feature.encoder is None
    return isinstance(feature, CategoricalFeature | CategoricalListFeature)


def _embedding_dim(feature: Feature, config: ModelConfig) -> int:
    own: int | None = getattr(feature, "embedding_dim", None)
    return own or config.embedding_dim
