"""The merge against a naive sort."""

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from retrieval.feature.v1 import feature_pb2

from query_service.hits import Hits
from query_service.merge import merge

# Few values, so that ties are common, in a shard and across shards.
scores = st.sampled_from([-0.5, 0.0, 0.25, 0.5, 1.0])
item_ids = st.text("aäß漢1", min_size=1, max_size=3)
answers = st.lists(st.tuples(scores, item_ids), max_size=8)


def hits_from(queries: list[list[tuple[float, str]]]) -> Hits:
    """What a shard answers, best first, each item with its id as an attribute."""
    hits = [hit for query in queries for hit in sorted(query, key=lambda hit: (-hit[0], hit[1]))]
    encoded = [item_id.encode() for _, item_id in hits]
    return Hits(
        counts=np.array([len(query) for query in queries], dtype=np.int64),
        scores=np.array([score for score, _ in hits], dtype=np.float32),
        item_id_bytes=b"".join(encoded),
        item_id_sizes=np.array([len(item_id) for item_id in encoded], dtype=np.int64),
        attributes=[[feature_pb2.FeatureValue(string_value=item_id) for _, item_id in hits]],
    )


@given(num_queries=st.integers(1, 4), num_shards=st.integers(1, 4), k=st.integers(1, 12), data=st.data())
@settings(max_examples=100, deadline=None)
def test_the_best_of_all_shards_by_score_then_id(num_queries: int, num_shards: int, k: int, data: Any) -> None:
    shards = [[data.draw(answers) for _ in range(num_queries)] for _ in range(num_shards)]
    rankings = merge([hits_from(shard) for shard in shards], num_queries, k, num_attributes=1)
    assert len(rankings) == num_queries
    for query, ranking in enumerate(rankings):
        found = [hit for shard in shards for hit in shard[query]]
        expected = sorted(found, key=lambda hit: (-hit[0], hit[1]))[:k]
        assert list(zip(ranking.scores, ranking.item_ids, strict=True)) == expected
        assert [value.string_value for value in ranking.attributes[0]] == list(ranking.item_ids)


def test_no_attributes_asked_for() -> None:
    [ranking] = merge([hits_from([[(0.5, "a")]])], num_queries=1, k=1, num_attributes=0)
    assert list(ranking.attributes) == []


def test_no_hits_at_all() -> None:
    rankings = merge([hits_from([[], []]), hits_from([[], []])], num_queries=2, k=3, num_attributes=1)
    assert [list(ranking.item_ids) for ranking in rankings] == [[], []]
