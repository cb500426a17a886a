"""Exported towers in 8-bit integers, published only where they find what the towers in float32 find.

Deliberately does not know torch's towers, nor where checkpoints are published.
"""

import contextlib
import dataclasses
import logging
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import QuantType, quantize_dynamic

from towers.checkpoint import GoldenExamples
from towers.features import FeatureEncoder
from towers.schema import Owner
from towers.tower import QUANTISED, Graph, Tower
from trainer.export import ExportedTowers, Rows, embed_all, load_unpublished
from trainer.fit import FittedSchema

K = 10
"""Of so many best items of a query, the share that both towers find is the overlap."""
_ROWS_AT_ONCE = 256


def quantised(
    exported: ExportedTowers, fitted: FittedSchema, rows: Mapping[Owner, Rows], validation_queries: Rows
) -> tuple[ExportedTowers, float]:
    """Both towers with 8-bit weights and activations.

    Args:
        exported: In float32.
        fitted: Their schema, vocabularies and tokenizers.
        rows: Raw features of each side: all items, and the queries that are asked of both.
        validation_queries: Raw features of the queries whose embeddings go with the checkpoint.

    Returns:
        The towers, and their overlap: the mean share of a query's ten best items by the towers in float32 that are
        among its ten best by these.
    """
    graphs = {owner: quantised_graph(graph) for owner, graph in exported.onnx.items()}
    exact = _towers(exported.onnx, exported.golden, fitted)
    golden = {owner: _golden(graph, exported.golden[owner], owner, fitted) for owner, graph in graphs.items()}
    coarse = _towers(graphs, golden, fitted)
    embedded = [{owner: embed_all(towers[owner], rows[owner]) for owner in rows} for towers in (exact, coarse)]
    queries = embed_all(coarse["query"], validation_queries) if len(validation_queries) else None
    changed = dataclasses.replace(exported, onnx=graphs, golden=golden, validation_queries=queries)
    return changed, overlap(*(_best(of["query"], of["item"]) for of in embedded))


def quantised_graph(graph: bytes) -> bytes:
    """A graph whose matrix products and tables are of 8-bit integers; activations are scaled row by row as it runs."""
    with tempfile.TemporaryDirectory() as folder, _quiet():
        source, target = Path(folder) / "float32.onnx", Path(folder) / "int8.onnx"
        source.write_bytes(graph)
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["MatMul", "Gather"],
            weight_type=QuantType.QInt8,
            per_channel=True,
            # Seven bits: processors without VNNI saturate at eight, and would not agree with those that have it.
            reduce_range=True,
        )
        model = onnx.load(target)
    onnx.helper.set_model_props(model, {QUANTISED: "int8"})
    content: bytes = model.SerializeToString()
    return content


def overlap(exact: NDArray[np.int64], found: NDArray[np.int64]) -> float:
    """Mean share of the best items `[Q, K]` by one pair of towers that are among those by another."""
    return float(np.mean([np.isin(row, others).mean() for row, others in zip(exact, found, strict=True)]))


def _towers(
    graphs: Mapping[Owner, bytes], golden: Mapping[Owner, GoldenExamples], fitted: FittedSchema
) -> dict[Owner, Tower]:
    return {owner: load_unpublished(owner, graph, golden[owner], fitted) for owner, graph in graphs.items()}


def _golden(graph: bytes, exact: GoldenExamples, owner: Owner, fitted: FittedSchema) -> GoldenExamples:
    """The same examples with the embeddings of the quantised tower: services must find those again, not others."""
    encoder = FeatureEncoder(fitted.schema, owner, fitted.vocabularies, fitted.tokenizers)
    embeddings = Graph(graph).embed(encoder.encode_rows(exact.features))
    return GoldenExamples(features=exact.features, embeddings=embeddings.tolist())


def _best(queries: NDArray[np.float32], items: NDArray[np.float32]) -> NDArray[np.int64]:
    """The K best items of each query, `[Q, K]`."""
    blocks = [queries[start : start + _ROWS_AT_ONCE] for start in range(0, len(queries), _ROWS_AT_ONCE)]
    return np.concatenate([np.argsort(-(block @ items.T), axis=1, kind="stable")[:, :K] for block in blocks])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the quantiser's advice to itself."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(disabled)
