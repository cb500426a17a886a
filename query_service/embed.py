"""Embeddings of queries: from the cache, or from the tower.

Deliberately does not know what is done with them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from query_service.cache import EmbeddingCache
from query_service.digest import digests_of
from query_service.offload import Offload
from query_service.parse import InvalidQueriesError, RawFeatures, encode
from query_service.versions import Pin
from towers.errors import InvalidFeatureError
from towers.features import Arrays


@dataclass(frozen=True)
class Embedded:
    """Unit embeddings of B queries, all of one version."""

    embeddings: NDArray[np.float32]
    """`[B, D]`"""
    is_cached: Sequence[bool]
    """B, whether each came from the cache."""


class Embedder:
    """Embeds queries with the tower of a pinned version."""

    def __init__(self, cache: EmbeddingCache, offload: Offload) -> None:
        self._cache = cache
        self._offload = offload

    async def embed(self, queries: Sequence[RawFeatures], pin: Pin) -> Embedded:
        """Embeds B queries: one cache round trip for all, one tower pass for those not found.

        Raises:
            InvalidQueriesError: a feature that the schema does not allow, or values so large that the embedding is
                not finite.
        """
        num_queries = len(queries)
        arrays = await self._offload.run(num_queries, encode, queries, pin)
        if not self._cache.is_enabled:
            embeddings = await self._tower_pass(arrays, list(range(num_queries)), pin)
            return Embedded(embeddings, [False] * num_queries)
        digests = await self._offload.run(num_queries, digests_of, arrays, pin.fingerprint)
        found = await self._cache.get(pin.version, digests, pin.tower.dim)
        missing = [position for position, embedding in enumerate(found) if embedding is None]
        embeddings = np.empty((num_queries, pin.tower.dim), dtype=np.float32)  # [B, D]
        for position, embedding in enumerate(found):
            if embedding is not None:
                embeddings[position] = embedding
        if missing:
            embeddings[missing] = await self._tower_pass(arrays, missing, pin)
            self._cache.put(pin.version, [digests[position] for position in missing], embeddings[missing])
        return Embedded(embeddings, [embedding is not None for embedding in found])

    async def _tower_pass(self, arrays: Arrays, rows: Sequence[int], pin: Pin) -> NDArray[np.float32]:
        num_queries = len(next(iter(arrays.values())))
        is_all = len(rows) == num_queries
        chosen = arrays if is_all else {name: array[rows] for name, array in arrays.items()}
        embeddings = await self._offload.run(len(rows), pin.tower.embed, chosen)
        is_finite = np.isfinite(embeddings).all(axis=1)
        if not is_finite.all():
            error = InvalidFeatureError(
                f"version {pin.version} gives it no finite embedding; its vector features are too large, or "
                "too much is missing"
            )
            failures = {row: error for row, is_right in zip(rows, is_finite.tolist(), strict=True) if not is_right}
            raise InvalidQueriesError(failures, num_queries)
        return embeddings
