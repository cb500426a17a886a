"""The shard against exact search, and at its edges."""

import datetime as dt
import subprocess
import sys
from dataclasses import replace
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_indexes import check_bad_searches_are_refused, ids_of, small_artefact, small_index, unit_vectors

from index_service.ann import parsed_parameters
from index_service.filters import AllMet, Exists, OneOf, Range
from index_service.shard import ShardIndex
from towers.errors import InvalidInputError


def exact_ids(items, query, k, excluded=()):
    """The k best ids by float64, best first, and their scores."""
    scores = items.astype(np.float64) @ query.astype(np.float64)
    order = [i for i in np.argsort(-scores, kind="stable") if str(i) not in set(excluded)][:k]
    return [str(i) for i in order], scores[order]


@pytest.mark.parametrize("num_queries", [1, 3, 40])
@pytest.mark.parametrize("k", [1, 10, 300, 1000])
def test_exact_index_equals_numpy(num_queries, k):
    items, queries = unit_vectors(300, 16, seed=1), unit_vectors(num_queries, 16, seed=2)
    index = small_index(items)
    hits = index.search(queries, k)
    assert index.manifest.index_type == "Flat"
    assert hits.counts.tolist() == [min(k, 300)] * num_queries
    for i, query in enumerate(queries):
        part = slice(i * min(k, 300), (i + 1) * min(k, 300))
        ids, scores = exact_ids(items, query, k)
        assert ids_of(index, hits.rows[part]) == ids
        np.testing.assert_allclose(hits.scores[part], scores, atol=1e-6)


def test_exclusion_is_exact_and_leaves_k_results():
    items, queries = unit_vectors(200, 8, seed=3), unit_vectors(4, 8, seed=4)
    index = small_index(items)
    for num_excluded in (1, 50, 195, 199):
        excluded = [str(i) for i in range(num_excluded)]
        hits = index.search(queries, 20, None, [*excluded, *excluded, "not an item"])
        num_hits = min(20, 200 - num_excluded)
        assert hits.counts.tolist() == [num_hits] * 4
        for i, query in enumerate(queries):
            assert (
                ids_of(index, hits.rows[i * num_hits : (i + 1) * num_hits]) == exact_ids(items, query, 20, excluded)[0]
            )
    everything = [str(i) for i in range(200)]
    assert index.rows_of(everything).tolist() == list(range(200))
    assert index.search(queries, 20, None, everything).counts.tolist() == [0] * 4


def test_ivf_reaches_the_recall_that_its_manifest_states():
    items = unit_vectors(6000, 32, seed=5, num_clusters=60)
    index = small_index(items, index_type="IVF153,SQ8")
    assert index.manifest.index_type == "IVF153,SQ8"
    assert index.ann.base.nlist == 153
    for setting in index.ann.settings:
        assert setting.recall >= 0.95
        k = setting.k
        hits = index.search(items[:30], k)
        assert hits.counts.tolist() == [k] * 30
        num_right = sum(
            len(set(ids_of(index, hits.rows[i * k : (i + 1) * k])) & set(exact_ids(items, items[i], k)[0]))
            for i in range(30)
        )
        assert num_right / (30 * k) >= 0.93  # A sample of its own, so a little less than measured is fair.
    assert parsed_parameters(index.ann.settings[0].parameters)["nprobe"] < 153
    for scores in index.search(unit_vectors(50, 32, seed=6), 100).scores.reshape(50, 100):
        assert (np.diff(scores) <= 0).all()


def test_ivf_probes_more_lists_until_there_are_k():
    items = unit_vectors(3000, 16, seed=7, num_clusters=30)
    index = small_index(items, index_type="IVF76,SQ8")
    queries = items[:5]
    assert index.search(queries, 10_000).counts.tolist() == [3000] * 5
    # Excluded are all but 7 of the most distant: they lie in lists that the first probe does not reach.
    for query in queries:
        kept = exact_ids(items, query, 3000)[0][-7:]
        excluded = sorted({str(i) for i in range(3000)} - set(kept))
        hits = index.search(query[None, :], 10, None, excluded)
        assert hits.counts.tolist() == [7]
        assert set(ids_of(index, hits.rows)) == set(kept)
    # Queries that are short and queries that are not, in one call.
    both = index.search(np.concatenate([queries, -queries]), 500, None, [str(i) for i in range(2400)])
    assert both.counts.tolist() == [500] * 10
    assert (both.rows >= 0).all()


@pytest.mark.parametrize("num_items", [1, 2, 40])
def test_tiny_ivf(num_items):
    items = unit_vectors(num_items, 4, seed=9)
    index = small_index(items, index_type="IVF1,SQ8")
    assert index.search(items, 5).counts.tolist() == [min(5, num_items)] * num_items


def test_empty_shard():
    index = small_index(
        np.empty((0, 8), np.float32),
        attributes={"title": pa.array([], pa.string())},
        index_type="IVF16,SQ8",
        filterable=["title"],
    )
    hits = index.search(unit_vectors(3, 8), 10, None, ["1"])
    assert hits.counts.tolist() == [0, 0, 0]
    assert index.packed_ids(hits.rows)[0] == b""
    assert index.attributes.values("title", hits.rows) == []
    assert index.search(unit_vectors(3, 8), 10, Exists("title")).counts.tolist() == [0, 0, 0]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=300), unique=True, max_size=20))
def test_any_id_comes_back_exactly(item_ids):
    index = small_index(unit_vectors(len(item_ids), 4), item_ids)
    rows = index.rows_of(item_ids)
    assert sorted(ids_of(index, rows)) == sorted(item_ids)
    for item_id in item_ids:
        assert ids_of(index, index.rows_of([item_id])) == [item_id]


def test_ids_whose_hashes_collide_are_told_apart():
    artefact = small_artefact(unit_vectors(5, 4))
    index = ShardIndex(replace(artefact, item_hashes=artefact.item_hashes[[2] * 5]))
    wanted = ids_of(index, np.array([2]))
    assert [index.rows_of([item_id]).tolist() for item_id in wanted] == [[2]]
    assert index.rows_of(["absent"]).tolist() == []


def test_attributes_of_rows():
    moment = dt.datetime(2024, 5, 1, 12, tzinfo=dt.UTC)
    attributes = {
        "title": pa.array(["a", None, "ü"]),
        "year": pa.array([1, 2, None]),
        "price": pa.array([Decimal("1.5"), None, None]),
        "added": pa.array([moment, None, moment], pa.timestamp("us", "UTC")),
        "genres": pa.array([["x", "y"], [], None]),
        "raw": pa.array([b"1", b"2", b"3"]),
    }
    index = small_index(unit_vectors(3, 4), ["0", "1", "2"], attributes=attributes)
    assert index.attributes.names == ("title", "year", "price", "added", "genres")
    rows = np.array([index.rows_of([item_id])[0] for item_id in ("2", "0", "1", "0")])
    assert index.attributes.values("title", rows) == ["ü", "a", None, "a"]
    assert index.attributes.values("genres", rows) == [None, ["x", "y"], [], ["x", "y"]]
    assert index.attributes.values("added", rows) == [moment, moment, None, moment]
    with pytest.raises(InvalidInputError, match=r"unknown attribute 'raw'; known: \['added', 'genres', 'price'"):
        index.attributes.values("raw", rows)


@pytest.mark.parametrize("index_type", ["IVF76,SQ8", "IVF76,PQ8x4fs,Refine(Flat)", "HNSW16", "Flat"])
def test_a_filter_and_exclusions_together(index_type):
    items, queries = unit_vectors(3000, 16, seed=11, num_clusters=30), unit_vectors(3, 16, seed=12)
    years = np.arange(3000) % 50 + 1970
    genres = [["drama", "crime"][: i % 3] for i in range(3000)]
    index = small_index(
        items,
        index_type=index_type,
        attributes={"year": pa.array(years), "genres": pa.array(genres, pa.list_(pa.string()))},
        filterable=["year", "genres"],
    )
    condition = AllMet((Range("year", at_least=2000.0), OneOf("genres", frozenset({"crime"}))))
    excluded = [str(i) for i in range(0, 3000, 4)]
    forbidden = {*excluded, *(str(i) for i in range(3000) if years[i] < 2000 or "crime" not in genres[i])}
    num_allowed = 3000 - len(forbidden)
    for k in (10, 1000):
        hits = index.search(queries, k, condition, excluded)
        num_hits = min(k, num_allowed)
        assert hits.counts.tolist() == [num_hits] * 3
        for i, query in enumerate(queries):
            found = ids_of(index, hits.rows[i * num_hits : (i + 1) * num_hits])
            assert found == exact_ids(items, query, k, forbidden)[0]
    with pytest.raises(InvalidInputError, match="attribute 'title' is not filterable"):
        index.search(queries, 10, Exists("title"))
    with pytest.raises(InvalidInputError, match="attribute 'year' holds numbers"):
        index.search(queries, 10, OneOf("year", frozenset({"2000"})))


@pytest.mark.parametrize("index_type", ["IVF2,SQ8", "IVF2,PQ4x4fs,Refine(Flat)", "HNSW8", "Flat"])
def test_bad_searches_are_refused(index_type):
    check_bad_searches_are_refused(small_index(unit_vectors(100, 8), index_type=index_type))


def test_bad_searches_are_refused_without_assertions():
    code = (
        "from small_indexes import check_bad_searches_are_refused, small_index, unit_vectors\n"
        "check_bad_searches_are_refused(small_index(unit_vectors(100, 8), index_type='IVF2,SQ8'))\n"
        "check_bad_searches_are_refused(small_index(unit_vectors(100, 8)))\n"
        "print('refused', __debug__)"
    )
    run = subprocess.run(
        [sys.executable, "-O", "-c", code],
        cwd=__file__.rpartition("/")[0],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.stdout == "refused False\n", run.stderr
