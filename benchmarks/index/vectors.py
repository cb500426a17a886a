"""Embeddings to measure with: synthetic ones that search like real ones, or those of a checkpoint.

Deliberately never uniform noise: on noise every approximate index looks bad and all look alike.
"""

import numpy as np
from numpy.typing import NDArray

from index_service.build import embed_shard
from towers.errors import InvalidInputError
from towers.store import Store

_INTRINSIC_DIM = 16
_ITEMS_PER_CLUSTER = 200
_SPREAD = 0.6
"""Of an item around its cluster's centre, beside centres of length 1."""
_NOISE = 0.05


def clustered(
    num_items: int, dim: int, num_queries: int, seed: int = 0
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Items `[N, D]` and queries `[Q, D]`, unit rows: clustered, of low intrinsic dimension."""
    random = np.random.default_rng(seed)
    num_clusters = max(8, num_items // _ITEMS_PER_CLUSTER)
    basis = np.linalg.qr(random.standard_normal((dim, _INTRINSIC_DIM)))[0].T.astype(np.float32)  # [I, D]
    centres = random.standard_normal((num_clusters, _INTRINSIC_DIM), dtype=np.float32)  # [C, I]
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)

    def draw(count: int) -> NDArray[np.float32]:
        points = centres[random.integers(num_clusters, size=count)]  # [count, I]
        points += _SPREAD / np.sqrt(_INTRINSIC_DIM) * random.standard_normal(points.shape, dtype=np.float32)
        vectors = points @ basis  # [count, D]
        vectors += _NOISE / np.sqrt(dim) * random.standard_normal(vectors.shape, dtype=np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return np.ascontiguousarray(vectors)

    return draw(num_items), draw(num_queries)


def of_checkpoint(store_url: str, version: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Items `[N, D]` and queries `[Q, D]`, unit rows: the whole catalogue and the checkpoint's validation queries.

    Raises:
        InvalidInputError: the checkpoint has no validation queries.
        TwoTowerError: the checkpoint or the catalogue cannot be read.
    """
    embedded = embed_shard(Store(store_url), version, None, 0, 1, lambda _: None)
    if embedded.validation_queries is None:
        raise InvalidInputError(f"checkpoint {version} of {store_url} has no validation queries")
    queries = np.random.default_rng(0).permutation(embedded.validation_queries)
    return embedded.items.embeddings, queries
