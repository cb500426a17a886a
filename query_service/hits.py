"""One shard's answer as arrays, checked before anybody uses it.

Deliberately does not know the other shards.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from retrieval.feature.v1 import feature_pb2
from retrieval.index.v1 import index_service_pb2


class BrokenAnswerError(Exception):
    """A shard's answer that breaks the protocol: a bug of the shard, never the caller's fault."""


@dataclass(frozen=True)
class Hits:
    """H hits for B queries; those of query 0 come first."""

    counts: NDArray[np.int64]
    """`[B]` hits of each query."""
    scores: NDArray[np.float32]
    """`[H]`"""
    item_id_bytes: bytes
    """UTF-8, one after another."""
    item_id_sizes: NDArray[np.int64]
    """`[H]` bytes of each item id in `item_id_bytes`."""
    attributes: Sequence[Sequence[feature_pb2.FeatureValue]]
    """One column of H values for each attribute asked for."""


def hits_of(
    response: index_service_pb2.SearchResponse, num_queries: int, k: int, attribute_names: Sequence[str]
) -> Hits:
    """Reads a response.

    Args:
        response: The response.
        num_queries: B.
        k: Most hits of each query.
        attribute_names: The attributes asked for.

    Raises:
        BrokenAnswerError: sizes that do not fit together, a score that is not finite, an id that is not UTF-8.
    """
    # Each look at a field of bytes copies it.
    item_ids = response.item_ids
    try:
        counts = np.frombuffer(response.hit_counts, dtype="<u4").astype(np.int64)  # [B]
        scores = np.frombuffer(response.scores, dtype="<f4")  # [H]
        sizes = np.frombuffer(response.item_id_sizes, dtype="<u4").astype(np.int64)  # [H]
        item_ids.decode()
    except ValueError as error:
        raise BrokenAnswerError(f"its columns cannot be read: {error}") from error
    num_hits, num_bytes = int(counts.sum()), int(sizes.sum())
    if len(counts) != num_queries or counts.max(initial=0) > k:
        raise BrokenAnswerError(f"it has hits for {len(counts)} queries, at most {counts.max(initial=0)} each")
    if len(scores) != num_hits or len(sizes) != num_hits or num_bytes != len(item_ids):
        raise BrokenAnswerError("its columns differ in length")
    if not np.isfinite(scores).all():
        raise BrokenAnswerError("a score is not finite")
    if not item_ids.isascii():
        starts = (sizes.cumsum() - sizes)[sizes > 0]
        if ((np.frombuffer(item_ids, dtype=np.uint8)[starts] & 0xC0) == 0x80).any():
            raise BrokenAnswerError("an item id starts inside a character")
    columns = {column.name: column.values for column in response.attributes}
    for name in attribute_names:
        if len(columns.get(name, ())) != num_hits:
            raise BrokenAnswerError(f"attribute {name!r} does not have a value for each hit")
    return Hits(counts, scores, item_ids, sizes, [columns[name] for name in attribute_names])
