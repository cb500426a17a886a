"""Indexes of vectors that a test chooses, built by the real code but without a tower or a store."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from index_service.artefact import LoadedArtefact
from index_service.build import artefact_of
from index_service.embed import EmbeddedItems
from index_service.order import BuildOrder
from index_service.plan import EXACT, TuningGoal
from index_service.shard import ShardIndex
from towers.checkpoint import FileDigest, Manifest
from towers.errors import InvalidInputError


def unit_vectors(num: int, dim: int, seed: int = 0, num_clusters: int = 0) -> NDArray[np.float32]:
    """`[N, D]` random unit vectors, around as many centres as asked for."""
    random = np.random.default_rng(seed)
    vectors = random.standard_normal((num, dim))
    if num_clusters:
        centres = random.standard_normal((num_clusters, dim))
        vectors = centres[random.integers(0, num_clusters, num)] + 0.4 * vectors
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors.astype(np.float32)


def small_artefact(
    embeddings: NDArray[np.float32],
    item_ids: Sequence[str] | None = None,
    *,
    index_type: str = EXACT,
    goal: TuningGoal | None = None,
    validation_queries: NDArray[np.float32] | None = None,
    checkpoint_version: int = 1,
    catalogue_version: str = "0.1",
    revision: int = 1,
    attributes: dict[str, Any] | None = None,
) -> LoadedArtefact:
    order = BuildOrder(
        store="",
        shard=0,
        num_shards=1,
        checkpoint_version=checkpoint_version,
        catalogue_version=catalogue_version,
        revision=revision,
        goal=goal or TuningGoal(index_type=index_type),
    )
    checkpoint = Manifest(
        version=checkpoint_version,
        created=datetime.now(UTC),
        dim=embeddings.shape[1],
        schema_fingerprint="",
        files={"item_tower.onnx": FileDigest(sha256="0", size_bytes=1)},
        metrics={},
        config={},
        data_window=None,
        code_revision="",
        parent_version=None,
    )
    ids = [str(i) for i in range(len(embeddings))] if item_ids is None else list(item_ids)
    items = pa.table({"item_id": pa.array(ids, pa.string()), **(attributes or {})})
    return artefact_of(order, checkpoint, 0.0, EmbeddedItems(items, embeddings, {}), validation_queries)


def small_index(
    embeddings: NDArray[np.float32],
    item_ids: Sequence[str] | None = None,
    *,
    filterable: Sequence[str] = (),
    **how: Any,
) -> ShardIndex:
    return ShardIndex(small_artefact(embeddings, item_ids, **how), filterable)


def ids_of(index: ShardIndex, rows: NDArray[np.int64]) -> list[str]:
    utf8, sizes = index.packed_ids(rows)
    ends = np.cumsum(sizes).tolist()
    return [utf8[end - size : end].decode() for end, size in zip(ends, sizes.tolist(), strict=True)]


def check_bad_searches_are_refused(index: ShardIndex) -> None:
    """Every bad search; each must be refused before FAISS sees it."""
    good = unit_vectors(2, 8)
    for embeddings, k in (
        (unit_vectors(2, 7), 5),
        (unit_vectors(2, 9), 5),
        (good[0], 5),
        (good * np.float32(np.nan), 5),
        (np.where(np.eye(2, 8, dtype=bool), np.inf, good).astype(np.float32), 5),
        (good * np.float32(3), 5),
        (good * np.float32(1e38), 5),
        (good, 0),
        (good, -1),
    ):
        try:
            index.search(embeddings, k)
        except InvalidInputError:
            continue
        raise RuntimeError(f"{embeddings!r}, {k} was not refused")
