"""The choice of an index: it reaches its target on queries it has not seen, keeps its bounds, and says why it chose."""

import faiss
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_indexes import unit_vectors

from benchmarks.index.vectors import clustered
from index_service import effort
from index_service.ann import exact_index, parsed_parameters
from index_service.effort import sweep
from index_service.kinds import built
from index_service.plan import TuningGoal
from index_service.recall import QuerySample, Truth, query_sample
from index_service.tune import Tuned, retuned, tuned
from towers.errors import InvalidInputError

ITEMS, QUERIES = clustered(6000, 16, 1500)
SEEN, HELD_OUT = QUERIES[:500], QUERIES[500:]


def naive_recall(items, queries, rows, k, own=None):
    """By float64 and sets of ids; the items have no equal scores."""
    recalls = []
    for i, query in enumerate(queries.astype(np.float64)):
        scores = items @ query
        if own is not None:
            scores[own[i]] = -np.inf
        found = [row for row in rows[i].tolist() if row >= 0 and (own is None or row != own[i])][:k]
        recalls.append(len(set(found) & set(np.argsort(-scores)[:k].tolist())) / k)
    return np.mean(recalls), np.std(recalls, ddof=1) / np.sqrt(len(recalls))


@pytest.mark.parametrize("k", [1, 10, 200])
@pytest.mark.parametrize("are_items", [False, True])
def test_recall_is_what_a_naive_loop_says(k, are_items):
    items = unit_vectors(1000, 8, seed=1)
    exact = exact_index(items)
    sample = query_sample(items[:300], None) if are_items else QuerySample(unit_vectors(50, 8, seed=2), None)
    truth = Truth(exact, sample, 200)
    base = faiss.index_factory(8, "IVF30,SQ8", faiss.METRIC_INNER_PRODUCT)
    base.train(items)
    base.add(items)
    rows = base.search(sample.embeddings, truth.asked(k))[1]
    expected = naive_recall(items, sample.embeddings, rows, k, sample.own_rows)
    assert truth.recall(rows, k) == pytest.approx(expected)
    assert 0 < expected[0] < 1
    assert truth.recall(exact.search(sample.embeddings, truth.asked(k))[1], k) == (1.0, 0.0)
    nothing = np.full_like(rows, -1)
    assert truth.recall(nothing, k) == (0.0, 0.0)


def test_equal_scores_may_come_in_any_order():
    items = np.repeat(unit_vectors(10, 8), 20, axis=0)
    truth = Truth(exact_index(items), QuerySample(items[:1], None), 5)
    assert truth.recall(np.array([[19, 3, 17, 11, 7]]), 5) == (1.0, 0.0)
    assert truth.recall(np.array([[19, 3, 17, 20, 7]]), 5) == (0.8, 0.0)


def test_an_item_is_no_hit_of_its_own():
    items = unit_vectors(3, 8)
    sample = query_sample(items, None)
    assert sample.measured_with == "item vectors"
    truth = Truth(exact_index(items), sample, 100)
    assert truth.largest_k == 2
    assert all(row not in others for row, others in zip(sample.own_rows, truth.rows, strict=True))


def test_validation_queries_are_preferred_where_there_are_enough():
    items = unit_vectors(100, 8)
    assert query_sample(items, None).measured_with == "item vectors"
    assert query_sample(items, items[:10]).measured_with == "item vectors"
    recorded = unit_vectors(3000, 8, seed=3)
    sample = query_sample(items, recorded)
    assert sample.measured_with == "validation queries"
    assert sample.embeddings.shape == (2000, 8)
    assert {row.tobytes() for row in sample.embeddings} <= {row.tobytes() for row in recorded}


@pytest.fixture(scope="module")
def chosen() -> Tuned:
    progress: list[float] = []
    found = tuned(exact_index(ITEMS), query_sample(ITEMS, SEEN), TuningGoal(exact_below=1000), progress.append)
    assert progress == sorted(progress)
    assert 0 < progress[-1] <= 1
    return found


def test_the_choice_reaches_the_target_for_every_k_on_queries_it_has_not_seen(chosen):
    truth = Truth(chosen.ann.exact, QuerySample(HELD_OUT, None), 1000)
    assert [setting.k for setting in chosen.ann.settings] == [10, 100, 500, 1000]
    for setting in chosen.ann.settings:
        assert setting.recall >= 0.95
        assert setting.latency_s > 0
        recall, _ = truth.recall(chosen.ann.search(HELD_OUT, setting.k)[1], setting.k)
        assert recall >= 0.95
        if parsed_parameters(setting.parameters):
            assert recall < 1, "more effort than is needed"


def test_the_cheapest_candidate_is_chosen_and_each_of_the_others_has_a_reason(chosen):
    types = [candidate.index_type for candidate in chosen.candidates]
    assert types[0] == "Flat"
    assert types[-1] == "HNSW32"
    assert {index_type.partition(",")[2] for index_type in types[1:-1]} == {
        "PQ8x4fs,Refine(Flat)",
        "SQ8",
        "SQfp16",
        "Flat",
    }
    assert len({index_type.partition(",")[0] for index_type in types[1:-1]}) == 1, "the lists are shared"
    (winner,) = [candidate for candidate in chosen.candidates if candidate.verdict == "chosen"]
    assert winner.index_type == chosen.ann.plan.index_type
    assert winner.size_bytes == chosen.ann.size_bytes
    assert winner.setting == next(setting for setting in chosen.ann.settings if setting.k == 100)
    for candidate in chosen.candidates:
        assert candidate.verdict in ("chosen", "costs more") or candidate.verdict.startswith("not built: ")


def test_fewer_items_than_exact_below_are_searched_exactly():
    progress: list[float] = []
    goal = TuningGoal(exact_below=1000, target_k=50)
    found = tuned(exact_index(ITEMS[:900]), query_sample(ITEMS[:900], SEEN), goal, progress.append)
    assert found.ann.plan.index_type == "Flat"
    assert [(setting.k, setting.parameters) for setting in found.ann.settings] == [
        (k, "") for k in (10, 50, 100, 500, 1000)
    ]
    assert {setting.recall for setting in found.ann.settings} == {1.0}
    assert all(setting.latency_s > 0 for setting in found.ann.settings)
    (candidate,) = found.candidates
    assert (candidate.index_type, candidate.verdict, candidate.setting) == ("Flat", "chosen", found.ann.settings[1])
    assert progress == sorted(progress)
    assert len(progress) == 5


def half_alike(spread: float) -> np.ndarray:
    """Half of the items are so alike that only more than 8 bits in the range of the other half tell them apart."""
    alike = unit_vectors(1, 8, seed=8) + spread * unit_vectors(1000, 8, seed=9)
    alike /= np.linalg.norm(alike, axis=1, keepdims=True)
    return np.concatenate([unit_vectors(1000, 8, seed=10), alike])


def every_fifth(items: np.ndarray) -> QuerySample:
    """Of either half."""
    rows = np.arange(0, len(items), 5)
    return QuerySample(items[rows], rows)


def test_every_kind_reaches_the_target_where_eight_bits_cannot_tell_vectors_apart():
    items = half_alike(3e-3)
    found = tuned(exact_index(items), every_fifth(items), TuningGoal(exact_below=10))
    settings = {candidate.index_type.partition(",")[2]: candidate.setting for candidate in found.candidates}
    assert parsed_parameters(settings["SQ8"].parameters)["k_factor_rf"] > 1
    assert all(setting.recall >= 0.95 for setting in found.ann.settings)


def test_searches_for_few_items_are_refined_where_the_codes_do_not_tell_them_apart():
    items = half_alike(0.2)
    exact, queries = exact_index(items), every_fifth(items)
    found = tuned(exact, queries, TuningGoal(index_type="IVF4,SQ8")).ann
    assert len({"k_factor_rf" in setting.parameters for setting in found.settings}) == 2
    for setting in found.settings:
        knobs = parsed_parameters(setting.parameters)
        truth = Truth(exact, queries, setting.k)
        plain_rows = found.search_at({"nprobe": 4}, queries.embeddings, truth.asked(setting.k))[1]
        is_enough = effort.reaches(truth, plain_rows, setting.k, 0.95)
        assert ("k_factor_rf" in knobs) == (not is_enough)
        rows = found.search(queries.embeddings, truth.asked(setting.k), setting.k)[1]
        assert truth.recall(rows, setting.k)[0] >= 0.95


def test_bounds_are_kept_and_named_where_nothing_keeps_them():
    exact, queries = exact_index(ITEMS), query_sample(ITEMS, SEEN)
    vectors_mb = ITEMS.nbytes / 1e6
    tight = tuned(exact, queries, TuningGoal(exact_below=10, max_index_mb=vectors_mb * 1.2))
    assert tight.ann.size_bytes <= vectors_mb * 1.2e6
    (graph,) = [candidate for candidate in tight.candidates if candidate.index_type == "HNSW32"]
    assert "MB are more than max_index_mb = " in graph.verdict
    with pytest.raises(InvalidInputError, match=r"no index of 6000 items reaches .* Flat: its 0\.4 MB are more than"):
        tuned(exact, queries, TuningGoal(exact_below=10, max_index_mb=0.1))
    with pytest.raises(InvalidInputError, match=r"more than max_latency_ms = 1e-06.*Raise max_latency_ms or"):
        tuned(exact, queries, TuningGoal(exact_below=10_000, max_latency_ms=1e-6))
    with pytest.raises(InvalidInputError, match=r"no index of 6000 items .* Flat: its 0\.4 MB are more than"):
        tuned(exact, queries, TuningGoal(exact_below=10_000, max_index_mb=0.1))
    with pytest.raises(InvalidInputError, match=r"the pinned index_type 'Flat': its .* MB are more than max_index_mb"):
        tuned(exact, queries, TuningGoal(index_type="Flat", max_index_mb=0.1))


@pytest.mark.parametrize(
    "index_type",
    [
        "Flat",
        "IVF16,SQ8",
        "IVF16,Flat",
        "IVF16,PQ8x4fs,Refine(Flat)",
        "IVF16,PQ8x4,RFlat",
        "IVF16_HNSW8,SQfp16",
        "HNSW8",
        "HNSW8,SQ8",
        "SQ8",
        "PCA12,IVF16,Flat,Refine(Flat)",
    ],
)
def test_any_type_can_be_pinned(index_type):
    items = ITEMS[:2000]
    found = tuned(exact_index(items), query_sample(items, SEEN[:150]), TuningGoal(index_type=index_type)).ann
    assert found.plan.index_type == index_type
    truth = Truth(found.exact, QuerySample(HELD_OUT[:200], None), 500)
    for setting in found.settings[:3]:
        recall, _ = truth.recall(found.search(HELD_OUT[:200], setting.k)[1], setting.k)
        assert recall >= 0.92
        # A selector is honoured, whatever the type.
        rows = found.search(HELD_OUT[:5], 10, setting.k, faiss.IDSelectorRange(100, 200))[1]
        assert ((rows >= 100) & (rows < 200) | (rows == -1)).all()


def test_a_pinned_type_that_misses_the_target_is_searched_as_widely_as_it_can(caplog):
    goal = TuningGoal(index_type="IVF16,PQ1x4fs", target_recall=0.9999)
    found = tuned(exact_index(ITEMS), query_sample(ITEMS, SEEN), goal).ann
    (setting,) = [setting for setting in found.settings if setting.k == goal.target_k]
    assert setting.recall < 0.9999
    assert setting.parameters == "nprobe=16,k_factor_rf=16"
    assert "the pinned IVF16,PQ1x4fs does not reach a recall of 0.9999" in caplog.text


@pytest.mark.parametrize("index_type", ["IVF9000,SQ8", "Nonsense", "PQ7", "IVF10,", "LSH", "NSG4"])
def test_a_pinned_type_that_cannot_be_built_is_refused_in_words(index_type):
    goal = TuningGoal(index_type=index_type)
    with pytest.raises(InvalidInputError, match=r"cannot be built from 500 items of dimension 16: .*give a FAISS"):
        tuned(exact_index(ITEMS[:500]), query_sample(ITEMS[:500], SEEN), goal)


@pytest.mark.parametrize("num_items", [0, 1, 2, 30])
def test_few_items_are_no_special_case(num_items):
    items = unit_vectors(num_items, 8)
    for goal in (TuningGoal(), TuningGoal(exact_below=0), TuningGoal(target_k=7)):
        found = tuned(exact_index(items), query_sample(items, None), goal).ann
        assert (found.search(unit_vectors(4, 8, seed=1), 5)[1] >= 0).sum() == 4 * min(5, num_items)


def test_an_earlier_index_is_filled_again_without_training():
    goal = TuningGoal(index_type="IVF60,SQ8")
    earlier = tuned(exact_index(ITEMS[:5000]), query_sample(ITEMS[:5000], SEEN), goal).ann
    centroids = earlier.base.quantizer.reconstruct_n(0, 60)
    found = retuned(earlier.base, exact_index(ITEMS), query_sample(ITEMS, SEEN), earlier.plan, TuningGoal())
    assert found is not None
    assert (found.plan.index_type, found.base.ntotal) == ("IVF60,SQ8", 6000)
    np.testing.assert_array_equal(found.base.quantizer.reconstruct_n(0, 60), centroids)
    truth = Truth(found.exact, QuerySample(HELD_OUT, None), 1000)
    for setting in found.settings:
        assert truth.recall(found.search(HELD_OUT, setting.k)[1], setting.k)[0] >= 0.95


def test_an_earlier_index_that_will_not_do_is_chosen_anew():
    exact, queries = exact_index(ITEMS), query_sample(ITEMS, SEEN)
    graph = built("HNSW8", exact)
    assert retuned(graph.base, exact, queries, graph.plan, TuningGoal()) is None
    coarse = built("IVF16,PQ1x4fs", exact)
    assert retuned(coarse.base, exact, queries, coarse.plan, TuningGoal(target_recall=0.9999)) is None
    lists = built("IVF16,SQ8", exact)
    assert retuned(lists.base, exact, queries, lists.plan, TuningGoal(max_latency_ms=1e-6)) is None


def test_a_sweep_rises_from_the_least_effort_to_what_the_index_can():
    exact = exact_index(ITEMS)
    truth = Truth(exact, QuerySample(SEEN[:100], None), 100)
    points = list(sweep(built("IVF60,SQfp16", exact), truth, 100))
    assert points[0].parameters == "nprobe=1"
    assert [point.recall for point in points] == sorted(point.recall for point in points)
    assert points[-1].recall > 0.99
    assert [point.recall for point in sweep(built("Flat", exact), truth, 100)] == [1.0]


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 400), st.integers(1, 400))
def test_the_smallest_value_is_found_from_any_start(least, size, start, right):
    limit = least + size
    found = effort._smallest(lambda value: value >= right, least, start, limit)
    if right > limit:
        assert found is None
    else:
        exact = max(least, right)
        assert exact <= found <= exact + max(1, found // 24)
