"""Chooses a shard's index by measurement: the cheapest kind that reaches the target recall, and how to search it.

Deliberately does not know items, checkpoints or where indexes are stored.

The kinds differ in little that can be told without measuring, so each is built from the items and searched with the
queries. What makes that bearable for a million items:

- The number of lists of many items is predicted, not tried: from the lists that hold the exact results one knows which
  share of them any number of probes reaches, and how many vectors those probes scan.
- The lists are trained once, and each item's list is found once; every kind with lists shares both.
- Whole vectors in the lists find what halved ones find; where they scan no faster in the cache, they are not built.
- A graph is measured on two samples. Its time grows with the logarithm of the number of items at best; where that does
  not leave it clearly faster than the best so far, it is not built.
"""

import itertools
import logging
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from index_service.ann import (
    EF_SEARCH,
    K_FACTOR,
    NPROBE,
    AnnIndex,
    Knobs,
    base_type,
    exact_index,
    parsed_parameters,
    vectors_of,
    written_parameters,
)
from index_service.plan import EXACT, IndexPlan, SearchSetting, TuningGoal
from index_service.recall import QuerySample, Truth
from towers.errors import InvalidInputError

MEASURED_KS = (10, 100, 500, 1000)
"""Search parameters are tuned for searches of up to so many items, and for the target's k."""
STANDARD_ERRORS = 2.5
"""By which the measured recall exceeds the target, so that other queries reach it too."""
K_FACTORS = (1, 2, 4, 8, 16)
"""Refinement that is tried: so many times k rows are scored again with the exact vectors."""
GRAPH = "HNSW32"
_TIE = 0.95
"""Latency ratio above which two kinds are equally fast, and the smaller one is the cheaper."""
_LISTS_PER_ROOT = (1, 2, 4)
"""Numbers of lists that are considered, in units of the root of the number of items."""
_FEW = 30_000
"""For so few items numbers of lists are tried, as building is quick and single probes matter."""
_LISTS_PER_ROOT_OF_FEW = (0.5, *_LISTS_PER_ROOT)
_FEWEST_WITH_LISTS = 200
"""Fewer items are scanned sooner than lists are chosen, and do not suffice to train codes with."""
_VECTORS_PER_LIST = 39
"""Fewest that a list is trained with; with fewer items there are fewer lists."""
_TRAINING_ROUNDS = 8
_TRAINING_VECTORS = 65_536
"""For what codes are trained with."""
_MODEL_QUERIES = 250
_MODEL_VECTORS = 100_000
_SCANNED_VECTORS = 20_000
_FEWEST_IN_GRAPH = 16_000
_MOST_IN_GRAPH = 64_000
"""A graph is measured on a 16th of the items, and on a quarter of those, within these bounds."""
_WORTHWHILE = 1.2
"""A graph is built when it may be faster by this factor: it takes ten times as long to build as anything else."""
_MOST_PROBES = 8
"""Times the probes that would do without encoding; where these do not reach the target, the encoding is at fault."""
_TIMED_S = 0.4
"""For each index of a comparison."""
_FEWEST_TIMED = 15
_MOST_TIMED = 300
_OTHER_MEMORY_FLOATS = 2**20
"""4 MB: more than a core has to itself."""
_RESOLUTION = 24
"""A search parameter is found to within one part in so many."""

_SWEEP_STEP = 1.15
_SWEEP_GAIN = 1e-4
"""With less gained by a step, nothing more is."""
_SWEEP_BEGIN = 5
"""Times the least effort; before that a step that gains nothing means little."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """A kind of index at the target's k, and what became of it."""

    index_type: str
    verdict: str
    """In words."""
    setting: SearchSetting | None = None
    """The fastest that reaches the target; None where it was not measured or does not reach it."""
    size_bytes: int | None = None
    """Memory with the exact vectors; None where it was not built."""


@dataclass(frozen=True)
class Tuned:
    """The chosen index and what it was chosen from."""

    ann: AnnIndex
    candidates: tuple[Candidate, ...]


def tuned(
    exact: Any,
    queries: QuerySample,
    goal: TuningGoal,
    report: Callable[[float], None] = lambda _: None,
    on_built: Callable[[AnnIndex], None] = lambda _: None,
) -> Tuned:
    """Builds the cheapest index that reaches the goal.

    Cheapest is fastest; of two that are equally fast, the smaller.

    Args:
        exact: `IndexFlatIP` of the N items.
        queries: What to measure with.
        goal: What to reach.
        report: Told the share of the work that is done.
        on_built: Given each index that was built, without search settings.

    Raises:
        InvalidInputError: nothing reaches the target within the bounds, or the pinned type cannot be built.
    """
    if exact.ntotal == 0:
        return Tuned(AnnIndex(IndexPlan(index_type=EXACT, settings=()), None, exact), ())
    truth = Truth(exact, queries, max(*MEASURED_KS, goal.target_k))
    report(0.1)
    if goal.index_type is not None:
        return _pinned(exact, truth, goal, on_built)
    contest = _Contest(exact, truth, goal, on_built)
    contest.enter(AnnIndex(IndexPlan(index_type=EXACT, settings=()), None, exact))
    if exact.ntotal >= max(goal.exact_below, _FEWEST_WITH_LISTS):
        lists = _measured_lists(exact, truth, goal) if exact.ntotal <= _FEW else None
        lists = lists or _predicted_lists(exact, truth, goal)
        report(0.5)
        for progress, index_type in enumerate(_encoded_types(lists.num_lists, exact.d)):
            contest.enter_unless_hopeless(index_type, lists)
            report(0.5 + 0.05 * progress)
        contest.enter_graph_unless_hopeless()
    report(0.8)
    return contest.result()


def retuned(base: Any, exact: Any, queries: QuerySample, plan: IndexPlan, goal: TuningGoal) -> AnnIndex | None:
    """The same kind of index for other items of the same tower, without training: only its searches are tuned anew.

    Args:
        base: The FAISS index of the earlier build; it is emptied and filled with the new items.
        exact: `IndexFlatIP` of the new items.
        queries: What to measure with.
        plan: The earlier plan.
        goal: What to reach.

    Returns:
        None where it does not reach the goal any more, or is a kind that must be built anew.
    """
    if faiss.try_extract_index_ivf(base) is None:
        return None
    base.reset()
    base.add(vectors_of(exact))
    ann = AnnIndex(IndexPlan(index_type=plan.index_type, settings=()), base, exact)
    truth = Truth(exact, queries, max(*MEASURED_KS, goal.target_k))
    knobs = _fastest_knobs(ann, truth, goal, goal.target_k)
    if knobs is None:
        return None
    setting = _measured(ann, truth, goal.target_k, knobs)
    if _refusal(ann, setting, goal):
        return None
    return _with_settings(ann, truth, goal, setting)


def sweepable_types(num_items: int, dim: int) -> list[str]:
    """Factory strings of all kinds and sizes that `tuned` chooses among, in full, and of neighbours that it leaves out.

    For a sweep that shows what the choice is worth.
    """
    multiples = (*_LISTS_PER_ROOT_OF_FEW, 8)
    list_numbers = sorted({_num_lists(num_items, multiple) for multiple in multiples})
    encoded = [index_type for number in list_numbers for index_type in _encoded_types(number, dim)]
    return [EXACT, *encoded, GRAPH]


def built(index_type: str, exact: Any) -> AnnIndex:
    """An index of any type that FAISS knows, without search settings.

    Raises:
        InvalidInputError: FAISS does not know the type, or cannot build it from these items.
    """
    if index_type == EXACT:
        return AnnIndex(IndexPlan(index_type=EXACT, settings=()), None, exact)
    ivf = re.fullmatch(r"IVF(\d+),(SQ8|SQfp16|Flat|PQ\d+x4fs,Refine\(Flat\))", index_type)
    if ivf and int(ivf.group(1)) <= exact.ntotal:
        return _Lists(exact, _trained_quantizer(exact, int(ivf.group(1)))).built(index_type)
    try:
        base = faiss.index_factory(exact.d, base_type(index_type), faiss.METRIC_INNER_PRODUCT)
        if isinstance(base, faiss.IndexNSG | faiss.IndexNNDescent):
            raise RuntimeError("such a graph cannot be searched behind a filter")  # And building it may not end.
        base.train(vectors_of(exact))
        base.add(vectors_of(exact))
        ann = AnnIndex(IndexPlan(index_type=index_type, settings=()), base, exact)
        every_row = faiss.IDSelectorRange(0, exact.ntotal)
        ann.search(vectors_of(exact)[:1], 1, selector=every_row)
    except RuntimeError as error:
        reason = str(error).splitlines()[0].rpartition(": ")[2]
        raise InvalidInputError(
            f"index_type {index_type!r} cannot be built from {exact.ntotal} items of dimension {exact.d}: {reason}; "
            'give a FAISS factory string, for example "IVF1024,SQ8"'
        ) from error
    return ann


def sweep(ann: AnnIndex, truth: Truth, k: int, enough: float = 0.9995) -> Iterator[SearchSetting]:
    """Recall and latency of one index over its search parameters, from the least effort to the most that helps.

    Args:
        ann: The index.
        truth: What to measure with.
        k: At least 1.
        enough: The recall at which more effort is of no interest.
    """
    name = next(iter(ann.limits), None)
    factors: Sequence[int] = K_FACTORS if ann.is_refined else (1,)
    for factor in factors:
        value, seen = _least(ann, k), 0.0
        while True:
            knobs = {} if name is None else {name: value}
            if ann.is_refined:
                knobs[K_FACTOR] = factor
            setting = _measured(ann, truth, k, knobs)
            yield setting
            if name is None or value >= ann.limits[name] or setting.recall >= enough:
                break
            if setting.recall - seen < _SWEEP_GAIN and value >= _least(ann, k) * _SWEEP_BEGIN:
                break
            seen = setting.recall
            value = min(ann.limits[name], max(value + 1, round(value * _SWEEP_STEP)))


def reaches(truth: Truth, rows: NDArray[np.int64], k: int, target_recall: float) -> bool:
    """Whether a search's recall is above the target by more than chance."""
    recall, standard_error = truth.recall(rows, k)
    return recall - STANDARD_ERRORS * standard_error >= target_recall


class _Contest:
    """Keeps the cheapest index so far, and why each of the others is not it."""

    def __init__(self, exact: Any, truth: Truth, goal: TuningGoal, on_built: Callable[[AnnIndex], None]) -> None:
        self._on_built = on_built
        self._exact = exact
        self._truth = truth
        self._goal = goal
        self._best: tuple[AnnIndex, SearchSetting] | None = None
        self._candidates: list[Candidate] = []

    def enter(self, ann: AnnIndex) -> None:
        """Measures a kind of index, beside the best so far."""
        self._on_built(ann)
        index_type = ann.plan.index_type
        knobs = _fastest_knobs(ann, self._truth, self._goal, self._goal.target_k)
        if knobs is None:
            verdict = f"does not reach a recall of {self._goal.target_recall:g}"
            self._candidates.append(Candidate(index_type, verdict, None, ann.size_bytes))
            return
        if self._best is None:
            setting = _measured(ann, self._truth, self._goal.target_k, knobs)
        else:
            best_ann, best_setting = self._best
            best_knobs = parsed_parameters(best_setting.parameters)
            latency_s, best_latency_s = latencies(
                [(ann, knobs), (best_ann, best_knobs)], self._truth.queries.embeddings, self._goal.target_k
            )
            setting = _measured(ann, self._truth, self._goal.target_k, knobs, latency_s)
            best_setting = best_setting.model_copy(update={"latency_s": best_latency_s})
            self._best = (best_ann, best_setting)
        refusal = _refusal(ann, setting, self._goal)
        self._candidates.append(Candidate(index_type, refusal, setting, ann.size_bytes))
        if not refusal and (self._best is None or _is_cheaper(ann, setting, *self._best)):
            self._best = (ann, setting)

    def enter_unless_hopeless(self, index_type: str, lists: "_Lists") -> None:
        """Builds and measures a kind with lists, unless it is twice as large as one that does the same."""
        encoding = index_type.partition(",")[2]
        smaller = index_type.replace(",Flat", ",SQfp16")
        if encoding == "Flat" and any(c.index_type == smaller and c.setting is not None for c in self._candidates):
            queries, k = self._truth.queries, self._goal.target_k
            if _scan_time(self._exact, queries, "SQfp16", k) <= _scan_time(self._exact, queries, encoding, k):
                verdict = f"not built: {smaller} scans as fast, in half the memory"
                self._candidates.append(Candidate(index_type, verdict))
                return
        self.enter(lists.built(index_type))

    def enter_graph_unless_hopeless(self) -> None:
        """Builds and measures a graph, unless two samples show that it is slower than the best so far."""
        if self._best is not None and self._exact.ntotal > 2 * _FEWEST_IN_GRAPH:
            ann, setting = self._best
            rival = (ann, parsed_parameters(setting.parameters))
            ratio = _predicted_graph_ratio(self._exact, self._truth.queries, self._goal, rival)
            if ratio * _WORTHWHILE > 1:
                verdict = f"not built: by two samples at least {ratio:.1f} times {ann.plan.index_type}"
                self._candidates.append(Candidate(GRAPH, verdict))
                return
        self.enter(built(GRAPH, self._exact))

    def result(self) -> Tuned:
        """The winner, tuned for every k.

        Raises:
            InvalidInputError: none reaches the goal within its bounds.
        """
        if self._best is None:
            raise InvalidInputError(_why_none(self._candidates, self._goal, self._exact.ntotal))
        ann, setting = self._best
        candidates = tuple(_judged(candidate, ann.plan.index_type, setting) for candidate in self._candidates)
        return Tuned(_with_settings(ann, self._truth, self._goal, setting), candidates)


class _Lists:
    """Lists of an IVF index that are trained, and the list of each item: what all kinds with lists share."""

    def __init__(self, exact: Any, quantizer: Any) -> None:
        self._exact = exact
        self._quantizer = quantizer
        self.num_lists: int = quantizer.ntotal
        self._numbers: NDArray[np.int64] | None = None

    def built(self, index_type: str) -> AnnIndex:
        """An index with these lists; its type is one of `_encoded_types`."""
        vectors, dim = vectors_of(self._exact), self._exact.d
        if self._numbers is None:
            self._numbers = self._quantizer.search(vectors, 1)[1].reshape(-1)  # [N]
        encoding = index_type.split(",")[1]
        index = _empty_ivf(faiss.clone_index(self._quantizer), dim, encoding)
        index.train(_sampled(vectors, _TRAINING_VECTORS))
        index.add_core(len(vectors), faiss.swig_ptr(vectors), None, faiss.swig_ptr(self._numbers))
        if encoding.startswith("PQ"):
            index = faiss.IndexIVFPQFastScan(index)
        index = faiss.clone_index(index)  # It owns its lists, and has no room to spare.
        return AnnIndex(IndexPlan(index_type=index_type, settings=()), index, self._exact)


def _encoded_types(num_lists: int, dim: int) -> list[str]:
    """Kinds with lists, small ones first."""
    half = next(size for size in range(max(1, dim // 2), 0, -1) if dim % size == 0)
    return [f"IVF{num_lists},{encoding}" for encoding in (f"PQ{half}x4fs,Refine(Flat)", "SQ8", "SQfp16", "Flat")]


def _empty_ivf(quantizer: Any, dim: int, encoding: str) -> Any:
    """An IVF index as FAISS's factory makes it, with a quantizer that is trained."""
    num_lists, metric = quantizer.ntotal, faiss.METRIC_INNER_PRODUCT
    if encoding == "Flat":
        return faiss.IndexIVFFlat(quantizer, dim, num_lists, metric)
    if encoding.startswith("SQ"):
        kinds = {"SQ8": faiss.ScalarQuantizer.QT_8bit, "SQfp16": faiss.ScalarQuantizer.QT_fp16}
        return faiss.IndexIVFScalarQuantizer(quantizer, dim, num_lists, kinds[encoding], metric, True)
    return faiss.IndexIVFPQ(quantizer, dim, num_lists, int(encoding[2:].partition("x")[0]), 4, metric)


def _num_lists(num_items: int, per_root: float) -> int:
    return max(1, min(int(per_root * math.sqrt(num_items)), num_items // _VECTORS_PER_LIST))


def _trained_quantizer(exact: Any, num_lists: int) -> Any:
    clustering = faiss.Clustering(exact.d, num_lists)
    clustering.niter = _TRAINING_ROUNDS
    clustering.spherical = True
    clustering.min_points_per_centroid = 1
    clustering.seed = 1
    quantizer = faiss.IndexFlatIP(exact.d)
    clustering.train(_sampled(vectors_of(exact), _VECTORS_PER_LIST * num_lists), quantizer)
    return quantizer


def _measured_lists(exact: Any, truth: Truth, goal: TuningGoal) -> _Lists | None:
    """The number of lists whose search is the fastest with items in 8 bits; None where these do not do."""
    numbers = {_num_lists(exact.ntotal, per_root) for per_root in _LISTS_PER_ROOT_OF_FEW}
    found: list[tuple[_Lists, tuple[AnnIndex, Knobs]]] = []
    for number in sorted(numbers):
        lists = _Lists(exact, _trained_quantizer(exact, number))
        ann = lists.built(f"IVF{number},SQ8")
        knobs = _fastest_knobs(ann, truth, goal, goal.target_k)
        if knobs is not None:
            found.append((lists, (ann, knobs)))
    if not found:
        return None
    measured = latencies([search for _, search in found], truth.queries.embeddings, goal.target_k)
    return found[int(np.argmin(measured))][0]


def _predicted_lists(exact: Any, truth: Truth, goal: TuningGoal) -> _Lists:
    """The number of lists whose search is predicted to be the fastest."""
    vectors = vectors_of(exact)
    k = min(goal.target_k, truth.largest_k)
    sample = _sampled(vectors, _MODEL_VECTORS)
    scan_s = _scan_time(exact, truth.queries, "SQ8", k) / min(len(vectors), _SCANNED_VECTORS)
    best: tuple[float, Any] | None = None
    for per_root in _LISTS_PER_ROOT:
        num_lists = _num_lists(len(vectors), per_root)
        if best is not None and num_lists == best[1].ntotal:
            break
        quantizer = _trained_quantizer(exact, num_lists)
        shares = _shares_reached(quantizer, vectors, truth, k)  # [L]
        num_probes = int(np.searchsorted(shares[:-1], goal.target_recall)) + 1
        sizes = np.bincount(quantizer.search(sample, 1)[1].reshape(-1), minlength=num_lists)  # [L]
        probed = quantizer.search(truth.queries.embeddings[:_MODEL_QUERIES], num_probes)[1]
        num_scanned = float(sizes[probed].sum(axis=1).mean()) * len(vectors) / len(sample)
        parts = AnnIndex(IndexPlan(index_type=EXACT, settings=()), None, quantizer)
        (coarse_s,) = latencies([(parts, {})], truth.queries.embeddings, num_probes)
        predicted_s = coarse_s + num_scanned * scan_s
        if best is not None and predicted_s >= best[0]:
            break
        best = (predicted_s, quantizer)
    assert best is not None
    return _Lists(exact, best[1])


def _shares_reached(quantizer: Any, vectors: NDArray[np.float32], truth: Truth, k: int) -> NDArray[np.float64]:
    """`[L]` the share of the exact results that lie in each query's first 1, 2, … L lists."""
    queries = truth.queries.embeddings[:_MODEL_QUERIES]
    rows = truth.rows[: len(queries), : max(1, min(k, truth.largest_k))]  # [Q, K]
    if rows.size == 0:
        return np.ones(quantizer.ntotal)
    held = np.unique(rows)
    lists = quantizer.search(vectors[held], 1)[1].reshape(-1)  # [H]
    order = quantizer.search(queries, quantizer.ntotal)[1]  # [Q, L]
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(quantizer.ntotal)[None, :], axis=1)  # [Q, L]
    reached = np.take_along_axis(ranks, lists[np.searchsorted(held, rows)], axis=1)  # [Q, K]
    return np.cumsum(np.bincount(reached.reshape(-1), minlength=quantizer.ntotal)) / reached.size


def _scan_time(exact: Any, queries: QuerySample, encoding: str, k: int) -> float:
    """Seconds to scan a sample of the items in one list, which stays in the cache."""
    sample = exact_index(_sampled(vectors_of(exact), _SCANNED_VECTORS))
    ann = _Lists(sample, exact_index(vectors_of(sample)[:1])).built(f"IVF1,{encoding}")
    return latencies([(ann, {NPROBE: 1, K_FACTOR: 1})], queries.embeddings, k)[0]


def _predicted_graph_ratio(exact: Any, queries: QuerySample, goal: TuningGoal, rival: tuple[AnnIndex, Knobs]) -> float:
    """The least that a search of the whole graph can take, from two samples, in units of a rival's time."""
    largest = min(max(exact.ntotal // 16, _FEWEST_IN_GRAPH), _MOST_IN_GRAPH)
    seconds = []
    for size in (largest // 4, largest):
        sample = exact_index(_sampled(vectors_of(exact), size))
        # Items of the whole are no items of the sample, so a query that is one need not leave itself out.
        truth = Truth(sample, QuerySample(queries.embeddings[:_MODEL_QUERIES], None), goal.target_k)
        ann = built(GRAPH, sample)
        knobs = _fastest_knobs(ann, truth, goal, goal.target_k) or dict(ann.limits)
        graph_s, rival_s = latencies([(ann, knobs), rival], queries.embeddings, goal.target_k)
        seconds.append(graph_s)
    per_doubling_s = max(0.0, seconds[1] - seconds[0]) / 2
    return (seconds[1] + per_doubling_s * math.log2(exact.ntotal / largest)) / rival_s


def _fastest_knobs(ann: AnnIndex, truth: Truth, goal: TuningGoal, k: int) -> Knobs | None:
    """The search parameters that reach the target recall soonest; None where none do.

    Refinement that the kind of index does without is tried only where nothing else reaches the target: codes that tell
    the hundred best items apart need not tell the ten best apart.
    """
    name = next(iter(ann.limits), None)
    if not ann.is_refined:
        knobs = _least_knobs(ann, truth, goal, k, name, {}, {})
        if knobs is not None or not ann.can_refine:
            return knobs
    options: list[Knobs] = []
    for factor in K_FACTORS:
        knobs = _least_knobs(ann, truth, goal, k, name, {K_FACTOR: factor}, options[0] if options else {})
        if knobs is not None:
            options.append(knobs)
        # More refinement costs more and saves fewer probes each time.
        if len(options) == 2:
            break
    if len(options) < 2:
        return next(iter(options), None)
    measured = latencies([(ann, knobs) for knobs in options], truth.queries.embeddings, k)
    return options[int(np.argmin(measured))]


def _least_knobs(
    ann: AnnIndex, truth: Truth, goal: TuningGoal, k: int, name: str | None, fixed: Knobs, known: Knobs
) -> Knobs | None:
    """The least effort that reaches the target with the other parameters fixed; `known` is near it, if anything is."""
    queries = truth.queries_for(k)

    def is_enough(value: int) -> bool:
        knobs = fixed if name is None else {name: value, **fixed}
        _, rows = ann.search_at(knobs, queries, truth.asked(k))
        return reaches(truth, rows, k, goal.target_recall)

    if name is None:
        return fixed if is_enough(1) else None
    start = known[name] if name in known else _first_guess(ann, truth, goal, k)
    limit = min(ann.limits[name], max(start * _MOST_PROBES, _least(ann, k)))
    value = _smallest(is_enough, _least(ann, k), start, limit)
    return None if value is None else {name: value, **fixed}


def _least(ann: AnnIndex, k: int) -> int:
    """Where the search for a parameter begins; an efSearch below k is no less than k."""
    return min(k, ann.limits[EF_SEARCH]) if EF_SEARCH in ann.limits else 1


def _first_guess(ann: AnnIndex, truth: Truth, goal: TuningGoal, k: int) -> int:
    """A value of the parameter that is about right where nothing is encoded."""
    if isinstance(ann.base, faiss.IndexIVF):
        quantizer = faiss.downcast_index(ann.base.quantizer)
        if isinstance(quantizer, faiss.IndexFlat):
            shares = _shares_reached(quantizer, ann.vectors, truth, k)
            return int(np.searchsorted(shares[:-1], goal.target_recall)) + 1
    return max(_least(ann, k), ann.limits.get(NPROBE, 0) // _MOST_PROBES)


def _smallest(is_enough: Callable[[int], bool], least: int, start: int, limit: int) -> int | None:
    """The smallest value from `least` to `limit` that is enough, found from `start`; None where none is.

    Enough must stay enough. The result is the smallest to within one part in `_RESOLUTION`.
    """
    too_little, enough = least - 1, min(max(start, least), limit)
    while not is_enough(enough):
        if enough == limit:
            return None
        too_little, enough = enough, min(limit, 2 * enough)
    while enough - too_little > max(1, enough // _RESOLUTION):
        middle = (too_little + enough) // 2
        if is_enough(middle):
            enough = middle
        else:
            too_little = middle
    return enough


def _measured(ann: AnnIndex, truth: Truth, k: int, knobs: Knobs, latency_s: float | None = None) -> SearchSetting:
    _, rows = ann.search_at(knobs, truth.queries_for(k), truth.asked(k))
    recall, _ = truth.recall(rows, k)
    if latency_s is None:
        (latency_s,) = latencies([(ann, knobs)], truth.queries.embeddings, k)
    return SearchSetting(k=k, parameters=written_parameters(knobs), recall=recall, latency_s=latency_s)


def latencies(searches: Sequence[tuple[AnnIndex, Knobs]], queries: NDArray[np.float32], k: int) -> list[float]:
    """Median seconds of one search for one query with one thread, of each.

    They take turns, so that noise hits all, and each time in another order, as a search is faster after one like it.
    Before each, other memory is used, as it is between the searches of a server: what is near in a cache by luck says
    little about the next request.
    """
    other_memory = np.zeros(_OTHER_MEMORY_FLOATS, dtype=np.float32)
    timed = [searched_at(ann, knobs, k) for ann, knobs in searches]
    with _one_thread():
        singles = [np.ascontiguousarray(query[None]) for query in queries]  # Q times [1, D]
        times: list[list[float]] = [[] for _ in searches]
        random = np.random.default_rng(0)
        spent_s = 0.0
        for number, query in enumerate(itertools.islice(itertools.cycle(singles), _MOST_TIMED)):
            for place in random.permutation(len(timed)).tolist():
                other_memory += 1.0
                start_s = time.perf_counter()
                timed[place].search(query, k)
                times[place].append(time.perf_counter() - start_s)
                spent_s += times[place][-1]
            if number >= _FEWEST_TIMED and spent_s > _TIMED_S * len(searches):
                break
    return [statistics.median(found) for found in times]


def searched_at(ann: AnnIndex, knobs: Knobs, k: int) -> AnnIndex:
    """The index with these search parameters, as it would be served."""
    setting = SearchSetting(k=k, parameters=written_parameters(knobs), recall=0.0, latency_s=0.0)
    return AnnIndex(IndexPlan(index_type=ann.plan.index_type, settings=(setting,)), ann.base, ann.exact)


@contextmanager
def _one_thread() -> Iterator[None]:
    num_threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(num_threads)


def _with_settings(ann: AnnIndex, truth: Truth, goal: TuningGoal, target: SearchSetting) -> AnnIndex:
    """The index with search parameters for every k; where the target is out of reach, with the best there are."""
    settings = []
    for k in sorted({*MEASURED_KS, goal.target_k}):
        if k == goal.target_k:
            settings.append(target)
            continue
        knobs = _fastest_knobs(ann, truth, goal, k)
        if knobs is None:
            knobs = _widest_knobs(ann)
            _log.warning("%s does not reach a recall of %s at k = %d", ann.plan.index_type, goal.target_recall, k)
        settings.append(_measured(ann, truth, k, knobs))
    plan = IndexPlan(index_type=ann.plan.index_type, settings=tuple(settings))
    return AnnIndex(plan, ann.base, ann.exact)


def _widest_knobs(ann: AnnIndex) -> Knobs:
    return {**ann.limits, **({K_FACTOR: K_FACTORS[-1]} if ann.can_refine else {})}


def _pinned(exact: Any, truth: Truth, goal: TuningGoal, on_built: Callable[[AnnIndex], None]) -> Tuned:
    assert goal.index_type is not None
    ann = built(goal.index_type, exact)
    on_built(ann)
    knobs = _fastest_knobs(ann, truth, goal, goal.target_k)
    if knobs is None:
        knobs = _widest_knobs(ann)
        _log.warning("the pinned %s does not reach a recall of %s", goal.index_type, goal.target_recall)
    setting = _measured(ann, truth, goal.target_k, knobs)
    if refusal := _refusal(ann, setting, goal):
        raise InvalidInputError(f"the pinned index_type {goal.index_type!r}: {refusal}; choose another, or raise it")
    candidate = Candidate(goal.index_type, "pinned", setting, ann.size_bytes)
    return Tuned(_with_settings(ann, truth, goal, setting), (candidate,))


def _refusal(ann: AnnIndex, setting: SearchSetting, goal: TuningGoal) -> str:
    """Which bound an index exceeds, in words; empty where none."""
    if goal.max_index_mb is not None and ann.size_bytes > goal.max_index_mb * 1e6:
        return f"its {ann.size_bytes / 1e6:.1f} MB are more than max_index_mb = {goal.max_index_mb:g}"
    if goal.max_latency_ms is not None and setting.latency_s * 1e3 > goal.max_latency_ms:
        return f"its {setting.latency_s * 1e3:.3f} ms are more than max_latency_ms = {goal.max_latency_ms:g}"
    return ""


def _is_cheaper(ann: AnnIndex, setting: SearchSetting, best_ann: AnnIndex, best_setting: SearchSetting) -> bool:
    ratio = setting.latency_s / best_setting.latency_s
    if _TIE <= ratio <= 1 / _TIE:
        return ann.size_bytes < best_ann.size_bytes
    return ratio < 1


def _judged(candidate: Candidate, chosen_type: str, chosen: SearchSetting) -> Candidate:
    """A candidate with its verdict, now that the winner and its last measurement are known."""
    if candidate.verdict:
        return candidate
    if candidate.index_type == chosen_type:
        return replace(candidate, verdict="chosen", setting=chosen)
    return replace(candidate, verdict="costs more")


def _why_none(candidates: Sequence[Candidate], goal: TuningGoal, num_items: int) -> str:
    reasons = "; ".join(f"{candidate.index_type}: {candidate.verdict}" for candidate in candidates)
    return (
        f"no index of {num_items} items reaches a recall of {goal.target_recall:g} at k = {goal.target_k} within the "
        f"bounds: {reasons}. Raise max_latency_ms or max_index_mb, lower target_recall, or use more shards"
    )


def _sampled(vectors: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """Up to so many of the vectors, each at most once, always the same ones."""
    if size >= len(vectors):
        return vectors
    rows = np.random.default_rng(0).choice(len(vectors), size=size, replace=False)
    return vectors[np.sort(rows)]
