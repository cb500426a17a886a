"""Where an item stands, against a dictionary and a sorted list: live updates, filters, ties, items of other shards."""

import asyncio
import functools

import numpy as np
import pytest
from retrieval.index.v1 import index_service_pb2 as index_pb2
from small_indexes import small_index, unit_vectors
from test_index_service import Context, available_versions
from test_live_index import DIM, CountingTower, built_from, changes_of, embedding_of

from index_service.filters import OneOf
from index_service.live import LiveIndex
from index_service.rank import standing
from index_service.service import IndexServicer, search_executor
from towers.errors import DeadlineError, InvalidInputError, VersionNotLoadedError, WrongShardError

QUERIES = unit_vectors(3, DIM, seed=11)


@pytest.fixture
def state():
    return {f"item{number}": {"vector": number, "tags": ["ab"[number % 2]]} for number in range(10)}


@pytest.fixture
def live(state, monkeypatch):
    """Three parts: built, sealed and newest items; patched, replaced and deleted ones; and one without an embedding."""
    monkeypatch.setattr("index_service.live._MOST_SCANNED", 2)
    live = LiveIndex(built_from(state), functools.cache(CountingTower))
    new = [{"vector": number, "tags": ["a"]} for number in range(12)]
    for version, step in (
        ("0.2", {"new1": new[10], "new2": new[11], "item3": new[3], "item4": None}),
        ("0.3", {"item5": new[6], "item6": None, "broken": {"tags": ["a"]}}),
        ("0.4", {"twin": new[6], "new2": None}),
    ):
        live.apply(changes_of(version, step))
        state.update(step)
    for item_id in ("item4", "item6", "new2", "broken"):
        del state[item_id]
    assert all(part.num_items for part in (live.view.base, live.view.sealed, live.view.newest))
    return live


@pytest.mark.parametrize("tag", [None, "a"])
@pytest.mark.parametrize("excluded", [(), ("item0", "item5", "new1", "unknown")])
def test_rank_and_score_are_those_of_a_sorted_list(live, state, tag, excluded):
    condition = OneOf("tags", frozenset({tag})) if tag else None
    met = {item_id for item_id, row in state.items() if tag is None or tag in row["tags"]}
    # Items of the same vector have the same score to the last bit.
    scores = {item_id: np.float32(embedding_of(row) @ QUERIES[0].astype(np.float64)) for item_id, row in state.items()}
    for item_id, row in state.items():
        found = standing(live.view, QUERIES, item_id, condition, excluded)
        np.testing.assert_allclose(found.scores, QUERIES @ embedding_of(row), atol=1e-6)
        assert found.meets_condition == (item_id in met)
        assert found.quarantine_reason is None
        others = met - set(excluded) - {item_id}
        assert found.num_better == sum((-scores[other], other) < (-scores[item_id], item_id) for other in others)
        assert found.num_counted == len(met - set(excluded))
        # A shard that does not hold the item ranks the same score in the same way.
        elsewhere = standing(live.view, QUERIES[:1], f"~{item_id}", condition, excluded, float(found.scores[0]))
        assert elsewhere.scores is None
        assert elsewhere.num_better == found.num_better + sum(
            scores[other] == scores[item_id] and other >= item_id for other in met - set(excluded)
        )


def test_an_item_that_is_not_held(live):
    for item_id in ("item4", "new2", "never"):
        found = standing(live.view, QUERIES, item_id, None, ())
        assert (found.scores, found.quarantine_reason, found.num_better) == (None, None, 0)
    quarantined = standing(live.view, QUERIES, "broken", None, ())
    assert quarantined.scores is None
    assert "finite" in quarantined.quarantine_reason


def test_the_index_may_miss_what_is_ranked():
    vectors = unit_vectors(2_000, 8, num_clusters=20)
    view = LiveIndex(small_index(vectors, index_type="IVF32,SQ8"), None).view
    query = vectors[:1]
    best = np.argsort(-(vectors @ query[0]), kind="stable")
    for rank in (0, 1, 500, 1_999):
        assert standing(view, query, str(best[rank]), None, ()).num_better == rank


def test_wrong_embeddings_are_refused(live):
    for embeddings in (QUERIES[:, :2], QUERIES * np.nan, QUERIES * 3):
        with pytest.raises(InvalidInputError, match="query_embeddings"):
            standing(live.view, embeddings, "item0", None, ())


def request_for(item_id, **fields):
    query = unit_vectors(1, 4).astype("<f4").tobytes()
    fields = {"checkpoint_version": 1, "query_embeddings": query, "num_queries": 1, "num_shards": 1, **fields}
    return index_pb2.RankItemRequest(item_id=item_id, **fields)


def test_the_answer_of_the_service():
    async def run():
        versions = await available_versions()
        with search_executor(1) as executor:
            servicer = IndexServicer(versions, executor, 0, 1)
            held = await servicer.RankItem(request_for("0"), Context())
            assert held.state == index_pb2.ITEM_STATE_HELD
            assert np.frombuffer(held.scores, "<f4") == pytest.approx([1.0])
            assert (held.num_better, held.num_counted, held.meets_filter) == (0, 5, True)
            assert (held.checkpoint_version, held.catalogue_version) == (1, "0.1")
            other = await servicer.RankItem(request_for("other", score=-2.0), Context())
            assert (other.state, other.num_better) == (index_pb2.ITEM_STATE_NOT_HELD, 5)
            for request, error in (
                (request_for("0", checkpoint_version=2), VersionNotLoadedError),
                (request_for("0", num_shards=2), WrongShardError),
                (request_for(""), InvalidInputError),
                (request_for("0", score=float("nan")), InvalidInputError),
                (request_for("0", num_queries=2), InvalidInputError),
            ):
                with pytest.raises(error):
                    await servicer.RankItem(request, Context())
            with pytest.raises(DeadlineError):
                await servicer.RankItem(request_for("0"), Context(remaining_s=-1.0))

    asyncio.run(run())
