"""Trained towers to ONNX and to a checkpoint draft, checked against torch before anyone sees them.

Deliberately does not know where checkpoints are published, nor how the towers were trained.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import Dim

from towers.checkpoint import CheckpointDraft, EpochFigures, Forced, GoldenExamples, Manifest, TowerFiles
from towers.errors import CrossTowerFeatureError, InvalidInputError, TwoTowerError
from towers.features import Arrays, FeatureEncoder, RawValue
from towers.schema import (
    RERANKER_ADVICE,
    CategoricalFeature,
    CategoricalListFeature,
    FeatureSchema,
    Owner,
    SequenceFeature,
    TextFeature,
)
from towers.tower import OUTPUT_NAME, Tower, input_name
from trainer.fit import FittedSchema
from trainer.model import TowerNetwork, TwoTowers
from trainer.text import with_adapters_merged

TOLERANCE = 1e-5
"""Largest absolute difference between exported and torch embeddings."""

_OPSET = 18
_LARGEST_BYTES = 2_000_000_000
"""A little below 2 GiB, the limit of one protobuf message."""
_UNKNOWN = "a value never seen in training"
_ROWS_AT_ONCE = 1024
_TRACED_ROWS = 3
_TRACED_LENGTH = 5

Rows = Sequence[Mapping[str, RawValue]]


@dataclass(frozen=True)
class Paired:
    """Raw features of one side of N pairs of query and item."""

    rows: Rows
    permuted: Rows
    """The same where the other sides of the pairs are changed over."""


@dataclass(frozen=True)
class ExportedTowers:
    """Both towers as ONNX, and how far they are from torch."""

    onnx: Mapping[Owner, bytes]
    golden: Mapping[Owner, GoldenExamples]
    differences: Mapping[Owner, float]
    """Largest absolute difference to torch over all rows checked."""
    validation_queries: NDArray[np.float32] | None
    """`[Q, D]` embeddings of held-out queries by the exported query tower; None where there are none."""


def export_towers(
    model: TwoTowers,
    fitted: FittedSchema,
    encoders: Mapping[Owner, FeatureEncoder],
    rows: Mapping[Owner, Rows],
    validation_queries: Rows = (),
    pairs: Mapping[Owner, Paired] | None = None,
    num_golden: int = 16,
) -> ExportedTowers:
    """Exports both towers and runs each as services will, from its own side's raw features alone.

    Args:
        model: The trained towers.
        fitted: Their schema and vocabularies.
        encoders: The encoders of both sides.
        rows: Raw features of each side; all of them are checked.
        validation_queries: Raw features of held-out queries, whose embeddings go with the checkpoint.
        pairs: Of each side, what its features are in pairs with the other; `check_separation` of them.
        num_golden: Golden examples to take from `rows`, evenly spaced; two more have nothing known and nothing at all.

    Raises:
        CrossTowerFeatureError: a tower reads what is not its own side's.
        InvalidInputError: a tower is too large for one ONNX file.
        TwoTowerError: an exported tower differs from torch.
    """
    networks: Mapping[Owner, TowerNetwork] = {"query": model.query, "item": model.item}
    exported: dict[Owner, bytes] = {}
    golden: dict[Owner, GoldenExamples] = {}
    differences: dict[Owner, float] = {}
    towers: dict[Owner, Tower] = {}
    for owner, network in networks.items():
        network.eval()
        foreign = [feature.name for feature in network.features if feature.owner != owner]
        if foreign:
            raise CrossTowerFeatureError(f"the {owner} tower reads {foreign} of the other side; it is not published")
        exported[owner] = export_onnx(with_adapters_merged(network), encoders[owner])
        step = max(1, len(rows[owner]) // num_golden)
        chosen = [*rows[owner][::step][:num_golden], {}, unknown_row(fitted.schema, owner)]
        golden[owner] = GoldenExamples(
            features=chosen, embeddings=torch_embeddings(network, encoders[owner], chosen).tolist()
        )
        towers[owner] = load_unpublished(owner, exported[owner], golden[owner], fitted)
        differences[owner] = difference(towers[owner], network, encoders[owner], [*rows[owner], *chosen])
        if pairs is not None:
            check_separation(towers[owner], pairs[owner])
    embedded = embed_all(towers["query"], validation_queries) if len(validation_queries) else None
    return ExportedTowers(exported, golden, differences, embedded)


def embed_all(tower: Tower, rows: Rows) -> NDArray[np.float32]:
    """Embeddings `[N, D]` of raw features, at least one row, by an exported tower."""
    starts = range(0, len(rows), _ROWS_AT_ONCE)
    return np.concatenate([tower.embed_rows(rows[start : start + _ROWS_AT_ONCE]) for start in starts])


def export_onnx(network: TowerNetwork, encoder: FeatureEncoder) -> bytes:
    """One tower as ONNX: an input for each feature, any number of rows, lists of any length.

    Raises:
        InvalidInputError: the tower is too large for one ONNX file.
    """
    size_bytes = sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
    if size_bytes > _LARGEST_BYTES:
        raise InvalidInputError(
            f"the {encoder.owner} tower has {size_bytes / 1e9:.1f} GB of parameters, more than the 2 GB of an ONNX "
            "file; lower embedding_dim or hash_buckets, or raise min_count"
        )
    traced = {name: torch.from_numpy(array) for name, array in encoder.encode({}, _TRACED_ROWS).items()}
    batch = Dim("batch")
    shapes: list[dict[int, Dim]] = []
    for feature in encoder.features:
        if isinstance(feature, CategoricalListFeature | SequenceFeature | TextFeature):
            # Lengths 0 and 1 would be traced as constants.
            traced[feature.name] = torch.zeros(_TRACED_ROWS, _TRACED_LENGTH, dtype=torch.int64)
            shapes.append({0: batch, 1: Dim(f"{feature.name}_length")})
        else:
            shapes.append({0: batch})
    with _quiet():
        program = torch.onnx.export(
            _FromArrays(network, tuple(traced)).eval(),
            tuple(traced.values()),
            dynamo=True,
            dynamic_shapes=(tuple(shapes),),
            input_names=[input_name(name) for name in traced],
            output_names=[OUTPUT_NAME],
            opset_version=_OPSET,
            verbose=False,
        )
    assert program is not None
    content: bytes = program.model_proto.SerializeToString()
    return content


def load_unpublished(owner: Owner, onnx: bytes, golden: GoldenExamples, fitted: FittedSchema) -> Tower:
    """The tower as a service would load it, under a manifest that is never published, with torch's threads."""
    manifest = Manifest(
        version=1,
        created=datetime.now(UTC),
        dim=len(golden.embeddings[0]),
        schema_fingerprint=fitted.schema.fingerprint,
        files={},
        metrics={},
        config={},
        data_window=None,
        code_revision="",
        parent_version=None,
    )
    files = TowerFiles(owner, manifest, fitted.schema, fitted.vocabularies, golden, onnx, fitted.tokenizers)
    return Tower(files, torch.get_num_threads())


def difference(tower: Tower, network: TowerNetwork, encoder: FeatureEncoder, rows: Rows) -> float:
    """Largest absolute difference between both, over all rows, in batches of many and of one.

    Raises:
        TwoTowerError: it is more than the tolerance.
    """
    batches = [rows[start : start + _ROWS_AT_ONCE] for start in range(0, len(rows), _ROWS_AT_ONCE)]
    alone = [[row] for row in (rows[0], rows[-2], rows[-1])]
    largest = 0.0
    for batch in [*batches, *alone]:
        arrays = encoder.encode_rows(batch)
        found = float(np.abs(tower.embed(arrays) - _torch_embeddings(network, arrays)).max())
        if not found <= TOLERANCE:
            raise TwoTowerError(
                f"the exported {tower.owner} tower differs from the trained one by {found:.1e}, more than "
                f"{TOLERANCE:.0e}; it is not published"
            )
        largest = max(largest, found)
    return largest


def check_separation(tower: Tower, pairs: Paired) -> None:
    """Third layer of the two-tower rule: whom a row is paired with changes no bit of its embedding.

    Raises:
        CrossTowerFeatureError: it does; names the features that know of the other side.
    """
    alone, permuted = embed_all(tower, pairs.rows), embed_all(tower, pairs.permuted)
    if np.array_equal(alone, permuted):
        return
    changed = {
        name
        for row, other in zip(pairs.rows, pairs.permuted, strict=True)
        for name in row.keys() | other.keys()
        if row.get(name) != other.get(name)
    }
    raise CrossTowerFeatureError(
        f"the {tower.owner} tower is not apart: other pairs change {int((alone != permuted).any(axis=1).sum()):,} of "
        f"{len(alone):,} embeddings, by feature {', '.join(map(repr, sorted(changed)))}; {RERANKER_ADVICE}"
    )


def unknown_row(schema: FeatureSchema, owner: Owner) -> dict[str, RawValue]:
    """Raw features of one side in which every id is one that training never saw."""
    row: dict[str, RawValue] = {}
    for feature in schema.of(owner):
        if isinstance(feature, CategoricalFeature):
            row[feature.name] = _UNKNOWN
        elif isinstance(feature, CategoricalListFeature | SequenceFeature):
            row[feature.name] = [_UNKNOWN]
    return row


def torch_embeddings(network: TowerNetwork, encoder: FeatureEncoder, rows: Rows) -> NDArray[np.float32]:
    """Embeddings `[B, D]` of raw features by the torch tower."""
    return _torch_embeddings(network, encoder.encode_rows(rows))


def draft_checkpoint(
    exported: ExportedTowers,
    fitted: FittedSchema,
    metrics: Mapping[str, float],
    config: Mapping[str, Any],
    data_window: tuple[datetime, datetime],
    code_revision: str,
    forced: Forced | None,
    reranker_features: tuple[str, ...] = (),
    epochs: tuple[EpochFigures, ...] = (),
) -> CheckpointDraft:
    """All of the checkpoint but its number and its parent, which are known when it is published."""
    return CheckpointDraft(
        dim=len(exported.golden["item"].embeddings[0]),
        schema=fitted.schema,
        vocabularies=fitted.vocabularies,
        tokenizers=fitted.tokenizers,
        towers=exported.onnx,
        golden=exported.golden,
        metrics=metrics,
        config=config,
        data_window=data_window,
        code_revision=code_revision,
        parent_version=None,
        validation_queries=exported.validation_queries,
        forced=forced,
        reranker_features=reranker_features,
        epochs=epochs,
    )


class _FromArrays(nn.Module):
    """A tower that takes its features in order, as an ONNX graph does."""

    def __init__(self, network: TowerNetwork, names: Sequence[str]) -> None:
        super().__init__()
        self.network = network
        self.names = tuple(names)

    def forward(self, *arrays: Tensor) -> Tensor:
        embeddings: Tensor = self.network(dict(zip(self.names, arrays, strict=True)))
        return embeddings


def _torch_embeddings(network: TowerNetwork, arrays: Arrays) -> NDArray[np.float32]:
    with torch.inference_mode():
        embeddings: NDArray[np.float32] = network(
            {name: torch.from_numpy(array) for name, array in arrays.items()}
        ).numpy()
    return embeddings


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporter's progress, warnings and log lines to itself."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
