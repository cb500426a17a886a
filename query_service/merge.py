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
    scores: Sequence[float]
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
    id_ends = np.cumsum(np.concatenate([hits.item_id_sizes for hits in shards]))  # [H]
    id_starts = np.append(0, id_ends[:-1])  # [H]
    id_bytes = b"".join([hits.item_id_bytes for hits in shards])
    text = id_bytes.decode() if id_bytes.isascii() else None

    def ids_of(hits: NDArray[np.intp]) -> list[str]:
        places = zip(id_starts[hits].tolist(), id_ends[hits].tolist(), strict=True)
        if text is not None:
            return [text[start:end] for start, end in places]
        return [id_bytes[start:end].decode() for start, end in places]

    places = _places(query_of, scores)  # [H]
    # Each shard's hits are in order already, and this sort makes use of that.
    order = np.argsort(places, kind="stable")  # [H]
    in_order = places[order]
    is_as_next = in_order[1:] == in_order[:-1]
    if is_as_next.any():
        tied = order[np.append(is_as_next, False) | np.append(False, is_as_next)]
        item_ids = ids_of(tied)
        id_rank = np.zeros(len(scores), dtype=np.int64)
        id_rank[tied[sorted(range(len(tied)), key=item_ids.__getitem__)]] = np.arange(len(tied))
        order = np.lexsort((id_rank, places))

    counts = sum(hits.counts for hits in shards)  # [B]
    rank = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)  # [H]
    winners = order[rank < k]
    item_ids, winning_scores = ids_of(winners), scores[winners].tolist()
    columns = [_column(shards, column, winners) for column in range(num_attributes)]
    ends = np.cumsum(np.minimum(counts, k)).tolist()
    return [
        Ranking(item_ids[start:end], winning_scores[start:end], [column[start:end] for column in columns])
        for start, end in itertools.pairwise([0, *ends])
    ]


def _places(query_of: NDArray[np.intp], scores: NDArray[np.float32]) -> NDArray[np.int64]:
    """`[H]` numbers that rise from query to query and, within one, from the best score to the worst."""
    # Read as whole numbers, floats are in order but for the negative ones, which go backwards. Taking a score from 0
    # makes no -0.
    costs = (np.float32(0) - scores).view(np.int32)
    return (query_of << 32) + np.where(costs < 0, costs ^ 0x7FFFFFFF, costs)


def _column(shards: Sequence[Hits], column: int, hits: NDArray[np.intp]) -> list[feature_pb2.FeatureValue]:
    """The values of an attribute; hits are counted through all shards."""
    firsts = np.cumsum([0, *(len(shard.scores) for shard in shards)])
    shard_of = np.searchsorted(firsts, hits, side="right") - 1
    places = zip(shard_of.tolist(), (hits - firsts[shard_of]).tolist(), strict=True)
    return [shards[shard].attributes[column][hit] for shard, hit in places]
