"""The best hits of all shards.

Deliberately does not know how the hits were found.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from retrieval.feature.v1 import feature_pb2

from query_service.hits import Hits


@dataclass(frozen=True)
class Ranking:
    """The best items of one query, best first."""

    item_ids: Sequence[str]
    scores: NDArray[np.float32]
    attributes: Sequence[Sequence[feature_pb2.FeatureValue]]
    """One column for each attribute asked for, in the order of the items."""


def merge(shards: Sequence[Hits], num_queries: int, k: int, num_attributes: int) -> list[Ranking]:
    """Merges the hits of all shards; only the winners' ids and attributes are read.

    Args:
        shards: The hits of each shard that answered, for the same B queries.
        num_queries: B.
        k: Most items of each query.
        num_attributes: How many attributes were asked for.

    Returns:
        B rankings. Scores never rise; items of equal score are in the order of their ids.
    """
    query_of = np.concatenate([np.repeat(np.arange(num_queries), hits.counts) for hits in shards])  # [H]
    scores = np.concatenate([hits.scores for hits in shards])  # [H]
    id_bytes = b"".join(hits.item_id_bytes for hits in shards)
    id_sizes = np.concatenate([hits.item_id_sizes for hits in shards])  # [H]
    id_ends = np.cumsum(id_sizes)  # [H]

    def ids_of(rows: NDArray[np.intp]) -> list[bytes]:
        starts = id_ends[rows] - id_sizes[rows]
        return [id_bytes[start:end] for start, end in zip(starts.tolist(), id_ends[rows].tolist(), strict=True)]

    order = np.lexsort((-scores, query_of))
    queries_in_order, scores_in_order = query_of[order], scores[order]
    is_tie = (queries_in_order[1:] == queries_in_order[:-1]) & (scores_in_order[1:] == scores_in_order[:-1])
    if is_tie.any():
        tied = order[np.append(is_tie, False) | np.append(False, is_tie)]
        item_ids = ids_of(tied)
        # The order of UTF-8 bytes is that of the strings.
        id_rank = np.zeros(len(scores), dtype=np.int64)
        id_rank[tied[sorted(range(len(tied)), key=item_ids.__getitem__)]] = np.arange(len(tied))
        order = np.lexsort((id_rank, -scores, query_of))

    starts = np.searchsorted(query_of[order], np.arange(num_queries + 1)).tolist()  # [B + 1]
    shard_of = np.repeat(np.arange(len(shards)), [len(hits.scores) for hits in shards])  # [H]
    hit_of = np.concatenate([np.arange(len(hits.scores)) for hits in shards])  # [H]
    rankings = []
    for start, end in itertools.pairwise(starts):
        winners = order[start : min(start + k, end)]  # [K]
        places = list(zip(shard_of[winners].tolist(), hit_of[winners].tolist(), strict=True))
        rankings.append(
            Ranking(
                item_ids=[item_id.decode() for item_id in ids_of(winners)],
                scores=scores[winners],
                attributes=[
                    [shards[shard].attributes[column][hit] for shard, hit in places] for column in range(num_attributes)
                ],
            )
        )
    return rankings
