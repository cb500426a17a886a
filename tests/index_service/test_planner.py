"""The planner against exact search among the allowed rows, for every kind of index."""

import itertools

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_indexes import unit_vectors

from benchmarks.index.vectors import clustered
from index_service.ann import AnnIndex, base_type, exact_index, in_order_of_lists
from index_service.lists import is_numbered_by_list
from index_service.plan import IndexPlan, SearchSetting
from index_service.planner import search_allowed
from index_service.row_set import RowSet

NUM, DIM, K = 20_000, 32, 20
KINDS = {
    "Flat": "",
    "IVF128,SQ8": "nprobe=8",
    "IVF128,Flat": "nprobe=8",
    "IVF128,PQ16x4fs,RFlat": "nprobe=8,k_factor_rf=8",
    "HNSW16": "efSearch=64",
}


@pytest.fixture(scope="module")
def vectors():
    return clustered(NUM, DIM, 40)


@pytest.fixture(scope="module", params=list(KINDS))
def ann(request, vectors):
    plan = IndexPlan(
        index_type=request.param,
        settings=(SearchSetting(k=K, parameters=KINDS[request.param], recall=0.96, latency_s=1e-4),),
    )
    if request.param == "Flat":
        return AnnIndex(plan, None, exact_index(vectors[0]))
    base = faiss.index_factory(DIM, base_type(request.param), faiss.METRIC_INNER_PRODUCT)
    base.train(vectors[0])
    base.add(vectors[0])
    index, order = in_order_of_lists(AnnIndex(plan, base, exact_index(vectors[0])))
    np.testing.assert_array_equal(index.vectors, vectors[0][order])
    return index


def masks(vectors, share):
    """Rows spread over the space; those around a point; those around the first query, which lie near; and the rest."""
    random = np.random.default_rng(3)
    yield "spread", random.random(len(vectors)) < share
    for name, direction in (("a region", vectors[random.integers(len(vectors))]), ("another", -vectors[0])):
        similarities = vectors @ direction
        yield name, similarities >= np.quantile(similarities, 1 - share)


def exact_rows(vectors, queries, allowed, k):
    rows = np.flatnonzero(allowed)
    return rows[faiss.knn(queries, vectors[rows], min(k, len(rows)), metric=faiss.METRIC_INNER_PRODUCT)[1]]


def check(ann, queries, k, mask):
    """Each answer is as full as can be, allowed, unique, ordered and scored right; returns its recall."""
    scores, rows = search_allowed(ann, queries, k, RowSet(mask))
    num = min(k, int(mask.sum()))
    assert rows.shape == scores.shape == (len(queries), num)
    if num == 0:
        return 1.0
    assert mask[rows].all()
    assert all(len(set(found)) == num for found in rows.tolist())
    assert (np.diff(scores, axis=1) <= 0).all()
    np.testing.assert_allclose(scores, np.einsum("bd,bkd->bk", queries, ann.vectors[rows]), atol=0.02)
    expected = exact_rows(ann.vectors, queries, mask, k)
    return np.mean([len(set(a) & set(b)) / num for a, b in zip(rows.tolist(), expected.tolist(), strict=True)])


@pytest.mark.parametrize("share", [0.9, 0.5, 0.2, 0.05, 0.01, 0.0005])
def test_recall_behind_a_filter(ann, vectors, share):
    for name, mask in masks(ann.vectors, share):
        assert check(ann, vectors[1], K, mask) >= 0.95, name


@pytest.mark.parametrize("k", [1, 300, 10_000, 30_000])
def test_there_are_k_whenever_so_many_are_allowed(ann, vectors, k):
    for share in (1.0, 0.6, 0.3, 0.02):
        for _, mask in masks(ann.vectors, share):
            check(ann, vectors[1][:3], k, mask)
    check(ann, vectors[1][:3], k, np.ones(NUM, dtype=bool))


@pytest.mark.parametrize("k", [K, 200])
@pytest.mark.parametrize("num_excluded", [1, 5, 21, 100, 1_000, 5_000, 15_000])
def test_what_is_excluded_near_the_query(ann, vectors, num_excluded, k):
    queries = vectors[1][:10]
    best = exact_rows(ann.vectors, queries, np.ones(NUM, dtype=bool), num_excluded)
    recalls = []
    for number, query in enumerate(queries):
        mask = np.ones(NUM, dtype=bool)
        mask[best[number]] = False
        recalls.append(check(ann, query[None], k, mask))
    assert np.mean(recalls) >= 0.95
    # All of them left out for all the queries at once, as a request of several does.
    mask = np.ones(NUM, dtype=bool)
    mask[best] = False
    assert check(ann, queries, k, mask) >= 0.95


def test_the_nearest_excluded_behind_a_filter(ann, vectors):
    for share in (0.5, 0.1):
        for name, mask in masks(ann.vectors, share):
            recalls = []
            for query in vectors[1][:10]:
                allowed = mask.copy()
                allowed[exact_rows(ann.vectors, query[None], mask, 500)[0]] = False
                recalls.append(check(ann, query[None], K, allowed))
            assert np.mean(recalls) >= 0.95, name


def test_at_the_edges(ann, vectors):
    for num_allowed in (0, 1, 2):
        mask = np.zeros(NUM, dtype=bool)
        mask[:num_allowed] = True
        assert check(ann, vectors[1][:2], K, mask) == 1.0
    _, rows = search_allowed(ann, vectors[1][:0], K, RowSet(np.arange(NUM) % 2 == 0))
    assert rows.shape == (0, K)


def test_rows_are_numbered_by_list(ann):
    if not isinstance(ann.base, faiss.IndexIVF):
        assert ann.lists is None
        return
    assert is_numbered_by_list(ann.base)
    lists = ann.lists
    assert (lists.starts[0], lists.starts[-1]) == (0, NUM)
    # Each vector finds itself first in its own list.
    rows = np.arange(0, NUM, 997)
    own = np.searchsorted(lists.starts, rows, side="right") - 1
    nearest = ann.base.quantizer.search(ann.vectors[rows], 1)[1][:, 0]
    assert nearest.tolist() == own.tolist()


def test_where_too_few_were_found_all_that_is_left_is_expected_elsewhere(ann, vectors):
    if ann.lists is None:
        return
    mask = np.zeros(NUM, dtype=bool)
    mask[: ann.lists.starts[5]] = True
    reach = ann.lists.reach(RowSet(mask))
    nothing_found = np.full(2, -np.inf, dtype=np.float32)
    visited = np.array([[0, -1], [3, 1]])
    expected = ann.lists.expected(ann.lists.scores(vectors[1][:2]), reach, visited, nothing_found)
    left = np.tile(reach.counts, (2, 1))
    left[[0, 1, 1], [0, 3, 1]] = 0
    np.testing.assert_allclose(expected, left, rtol=1e-3)
    alone = ann.lists.expected(ann.lists.scores(vectors[1][:1]), reach, visited[:1], nothing_found[:1])
    np.testing.assert_array_equal(alone, expected[:1])


def test_lists_whose_rows_have_other_numbers_are_not_used(vectors):
    base = faiss.index_factory(DIM, "IVF128,SQ8", faiss.METRIC_INNER_PRODUCT)
    base.train(vectors[0])
    base.add(vectors[0])
    plan = IndexPlan(index_type="IVF128,SQ8", settings=())
    ann = AnnIndex(plan, base, exact_index(vectors[0]))
    assert ann.lists is None
    for share in (0.5, 0.05):
        for _, mask in masks(vectors[0], share):
            assert check(ann, vectors[1], K, mask) == 1.0


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 400).flatmap(
        lambda num: st.tuples(st.lists(st.booleans(), min_size=num, max_size=num), st.sets(st.integers(0, num)))
    )
)
def test_rows_of_ranges(drawn):
    members, cuts = drawn
    num = len(members)
    mask = np.array(members)
    bounds = np.array([*sorted({0, num} | cuts), num])
    for rows in (RowSet(mask), RowSet.of_rows(np.flatnonzero(mask), num)):
        counts = rows.counts_between(bounds)
        right = np.array([mask[a:b].sum() for a, b in itertools.pairwise(bounds)])
        assert counts.tolist() == right.tolist()
        some = np.arange(0, len(bounds) - 1, 2)
        found = rows.rows_between(bounds[some], bounds[some + 1]).tolist()
        assert found == sorted(set(found))
        assert mask[found].all()
        assert {row for i in some for row in range(bounds[i], bounds[i + 1]) if mask[row]} <= set(found)


def test_a_small_index_with_lists_of_nothing():
    few = unit_vectors(40, 8)
    base = faiss.index_factory(8, "IVF4,Flat", faiss.METRIC_INNER_PRODUCT)
    base.train(few)
    base.add(few[:3])
    plan = IndexPlan(
        index_type="IVF4,Flat", settings=(SearchSetting(k=1, parameters="nprobe=1", recall=1, latency_s=1),)
    )
    ann, _ = in_order_of_lists(AnnIndex(plan, base, exact_index(few[:3])))
    assert check(ann, few, 3, np.array([True, False, True])) == 1.0
    assert check(ann, few, 3, np.ones(3, dtype=bool)) == 1.0


def test_graphs_may_come_and_go():
    few = unit_vectors(40, 8)
    for _ in range(5):
        graph = faiss.index_factory(8, "HNSW4", faiss.METRIC_INNER_PRODUCT)
        graph.add(few)
        ann = AnnIndex(IndexPlan(index_type="HNSW4", settings=()), graph, exact_index(few))
        assert ann.search_exactly(few, 1)[1][:, 0].tolist() == list(range(40))
        del graph, ann
