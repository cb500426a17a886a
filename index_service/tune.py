"""Chooses a shard's index by measurement: the cheapest kind that reaches the target recall, and how to search it.

Deliberately does not know items, checkpoints or where indexes are stored.

The kinds differ in little that can be told without measuring, so each is built from the items and searched with the
queries. What makes that bearable for a million items:

- Few items are searched exactly whatever is measured, so only the time of that is.
- The number of lists of many items is predicted, not tried: from the lists that hold the exact results one knows which
  share of them any number of probes reaches, and how many vectors those probes scan.
- The lists are trained once, and each item's list is found once; every kind with lists shares both.
- Whole vectors in the lists find what halved ones find; where they scan no faster in the cache, they are not built.
- A graph is measured on two samples. Its time grows with the logarithm of the number of items at best; where that does
  not leave it clearly faster than the best so far, it is not built.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import faiss
import numpy as np

from index_service.ann import K_FACTOR, NPROBE, AnnIndex, Knobs, exact_index, parsed_parameters, vectors_of
from index_service.effort import MODEL_QUERIES, fastest_knobs, measured_setting, shares_reached, widest_knobs
from index_service.kinds import GRAPH, TrainedLists, built, encoded_types, num_lists_for, sampled, trained_quantizer
from index_service.plan import EXACT, IndexPlan, SearchSetting, TuningGoal
from index_service.recall import QuerySample, Truth
from index_service.timing import latencies
from towers.errors import InvalidInputError

MEASURED_KS = (10, 100, 500, 1000)
"""Search parameters are tuned for searches of up to so many items, and for the target's k."""
_TIE = 0.95
"""Latency ratio above which two kinds are equally fast, and the smaller one is the cheaper."""
_LISTS_PER_ROOT = (1, 2, 4)
"""Numbers of lists that are considered, in units of the root of the number of items."""
_FEW = 30_000
"""For so few items numbers of lists are tried, as building is quick and single probes matter."""
_LISTS_PER_ROOT_OF_FEW = (0.5, *_LISTS_PER_ROOT)
_FEWEST_WITH_LISTS = 200
"""Fewer items are scanned sooner than lists are chosen, and do not suffice to train codes with."""
_NUM_TIMED_ALONE = 50
"""Searches of an index that is compared with no other: their time decides nothing but whether a bound is kept."""
_MODEL_VECTORS = 100_000
_SCANNED_VECTORS = 20_000
_FEWEST_IN_GRAPH = 16_000
_MOST_IN_GRAPH = 64_000
"""A graph is measured on a 16th of the items, and on a quarter of those, within these bounds."""
_WORTHWHILE = 1.2
"""A graph is built when it may be faster by this factor: it takes ten times as long to build as anything else."""


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
    if goal.index_type is None and exact.ntotal < max(goal.exact_below, _FEWEST_WITH_LISTS):
        return _exactly_searched(exact, queries, goal, report, on_built)
    truth = Truth(exact, queries, max(*MEASURED_KS, goal.target_k))
    report(0.1)
    if goal.index_type is not None:
        return _pinned(exact, truth, goal, on_built)
    contest = _Contest(exact, truth, goal, on_built)
    contest.enter(AnnIndex(IndexPlan(index_type=EXACT, settings=()), None, exact))
    lists = _measured_lists(exact, truth, goal) if exact.ntotal <= _FEW else None
    lists = lists or _predicted_lists(exact, truth, goal)
    report(0.5)
    for progress, index_type in enumerate(encoded_types(lists.num_lists, exact.d)):
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
    knobs = fastest_knobs(ann, truth, goal, goal.target_k)
    if knobs is None:
        return None
    setting = measured_setting(ann, truth, goal.target_k, knobs)
    if _refusal(ann, setting, goal):
        return None
    return _with_settings(ann, truth, goal, setting)


def sweepable_types(num_items: int, dim: int) -> list[str]:
    """Factory strings of all kinds and sizes that `tuned` chooses among, in full, and of neighbours that it leaves out.

    For a sweep that shows what the choice is worth.
    """
    multiples = (*_LISTS_PER_ROOT_OF_FEW, 8)
    list_numbers = sorted({num_lists_for(num_items, multiple) for multiple in multiples})
    encoded = [index_type for number in list_numbers for index_type in encoded_types(number, dim)]
    return [EXACT, *encoded, GRAPH]


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
        knobs = fastest_knobs(ann, self._truth, self._goal, self._goal.target_k)
        if knobs is None:
            verdict = f"does not reach a recall of {self._goal.target_recall:g}"
            self._candidates.append(Candidate(index_type, verdict, None, ann.size_bytes))
            return
        if self._best is None:
            setting = measured_setting(ann, self._truth, self._goal.target_k, knobs)
        else:
            best_ann, best_setting = self._best
            best_knobs = parsed_parameters(best_setting.parameters)
            latency_s, best_latency_s = latencies(
                [(ann, knobs), (best_ann, best_knobs)], self._truth.queries.embeddings, self._goal.target_k
            )
            setting = measured_setting(ann, self._truth, self._goal.target_k, knobs, latency_s)
            best_setting = best_setting.model_copy(update={"latency_s": best_latency_s})
            self._best = (best_ann, best_setting)
        refusal = _refusal(ann, setting, self._goal)
        self._candidates.append(Candidate(index_type, refusal, setting, ann.size_bytes))
        if not refusal and (self._best is None or _is_cheaper(ann, setting, *self._best)):
            self._best = (ann, setting)

    def enter_unless_hopeless(self, index_type: str, lists: "TrainedLists") -> None:
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


def _measured_lists(exact: Any, truth: Truth, goal: TuningGoal) -> TrainedLists | None:
    """The number of lists whose search is the fastest with items in 8 bits; None where these do not do."""
    numbers = {num_lists_for(exact.ntotal, per_root) for per_root in _LISTS_PER_ROOT_OF_FEW}
    found: list[tuple[TrainedLists, tuple[AnnIndex, Knobs]]] = []
    for number in sorted(numbers):
        lists = TrainedLists(exact, trained_quantizer(exact, number))
        ann = lists.built(f"IVF{number},SQ8")
        knobs = fastest_knobs(ann, truth, goal, goal.target_k)
        if knobs is not None:
            found.append((lists, (ann, knobs)))
    if not found:
        return None
    measured = latencies([search for _, search in found], truth.queries.embeddings, goal.target_k)
    return found[int(np.argmin(measured))][0]


def _predicted_lists(exact: Any, truth: Truth, goal: TuningGoal) -> TrainedLists:
    """The number of lists whose search is predicted to be the fastest."""
    vectors = vectors_of(exact)
    k = min(goal.target_k, truth.largest_k)
    sample = sampled(vectors, _MODEL_VECTORS)
    scan_s = _scan_time(exact, truth.queries, "SQ8", k) / min(len(vectors), _SCANNED_VECTORS)
    best: tuple[float, Any] | None = None
    for per_root in _LISTS_PER_ROOT:
        num_lists = num_lists_for(len(vectors), per_root)
        if best is not None and num_lists == best[1].ntotal:
            break
        quantizer = trained_quantizer(exact, num_lists)
        shares = shares_reached(quantizer, vectors, truth, k)  # [L]
        num_probes = int(np.searchsorted(shares[:-1], goal.target_recall)) + 1
        sizes = np.bincount(quantizer.search(sample, 1)[1].reshape(-1), minlength=num_lists)  # [L]
        probed = quantizer.search(truth.queries.embeddings[:MODEL_QUERIES], num_probes)[1]
        num_scanned = float(sizes[probed].sum(axis=1).mean()) * len(vectors) / len(sample)
        parts = AnnIndex(IndexPlan(index_type=EXACT, settings=()), None, quantizer)
        (coarse_s,) = latencies([(parts, {})], truth.queries.embeddings, num_probes)
        predicted_s = coarse_s + num_scanned * scan_s
        if best is not None and predicted_s >= best[0]:
            break
        best = (predicted_s, quantizer)
    assert best is not None
    return TrainedLists(exact, best[1])


def _scan_time(exact: Any, queries: QuerySample, encoding: str, k: int) -> float:
    """Seconds to scan a sample of the items in one list, which stays in the cache."""
    sample = exact_index(sampled(vectors_of(exact), _SCANNED_VECTORS))
    ann = TrainedLists(sample, exact_index(vectors_of(sample)[:1])).built(f"IVF1,{encoding}")
    return latencies([(ann, {NPROBE: 1, K_FACTOR: 1})], queries.embeddings, k)[0]


def _predicted_graph_ratio(exact: Any, queries: QuerySample, goal: TuningGoal, rival: tuple[AnnIndex, Knobs]) -> float:
    """The least that a search of the whole graph can take, from two samples, in units of a rival's time."""
    largest = min(max(exact.ntotal // 16, _FEWEST_IN_GRAPH), _MOST_IN_GRAPH)
    seconds = []
    for size in (largest // 4, largest):
        sample = exact_index(sampled(vectors_of(exact), size))
        # Items of the whole are no items of the sample, so a query that is one need not leave itself out.
        truth = Truth(sample, QuerySample(queries.embeddings[:MODEL_QUERIES], None), goal.target_k)
        ann = built(GRAPH, sample)
        knobs = fastest_knobs(ann, truth, goal, goal.target_k) or dict(ann.limits)
        graph_s, rival_s = latencies([(ann, knobs), rival], queries.embeddings, goal.target_k)
        seconds.append(graph_s)
    per_doubling_s = max(0.0, seconds[1] - seconds[0]) / 2
    return (seconds[1] + per_doubling_s * math.log2(exact.ntotal / largest)) / rival_s


def _with_settings(ann: AnnIndex, truth: Truth, goal: TuningGoal, target: SearchSetting) -> AnnIndex:
    """The index with search parameters for every k; where the target is out of reach, with the best there are."""
    settings = []
    for k in sorted({*MEASURED_KS, goal.target_k}):
        if k == goal.target_k:
            settings.append(target)
            continue
        knobs = fastest_knobs(ann, truth, goal, k)
        if knobs is None:
            knobs = widest_knobs(ann)
            _log.warning("%s does not reach a recall of %s at k = %d", ann.plan.index_type, goal.target_recall, k)
        settings.append(measured_setting(ann, truth, k, knobs))
    plan = IndexPlan(index_type=ann.plan.index_type, settings=tuple(settings))
    return AnnIndex(plan, ann.base, ann.exact)


def _exactly_searched(
    exact: Any,
    queries: QuerySample,
    goal: TuningGoal,
    report: Callable[[float], None],
    on_built: Callable[[AnnIndex], None],
) -> Tuned:
    """The exact index: its recall is known, and what its searches cost at every k is timed."""
    ann = AnnIndex(IndexPlan(index_type=EXACT, settings=()), None, exact)
    on_built(ann)
    settings = []
    ks = sorted({*MEASURED_KS, goal.target_k})
    for number, k in enumerate(ks, start=1):
        (latency_s,) = latencies([(ann, {})], queries.embeddings, k, _NUM_TIMED_ALONE)
        settings.append(SearchSetting(k=k, parameters="", recall=1.0, latency_s=latency_s))
        report(number / len(ks))
    target = next(setting for setting in settings if setting.k == goal.target_k)
    refusal = _refusal(ann, target, goal)
    candidate = Candidate(EXACT, refusal or "chosen", target, ann.size_bytes)
    if refusal:
        raise InvalidInputError(_why_none([candidate], goal, exact.ntotal))
    return Tuned(AnnIndex(IndexPlan(index_type=EXACT, settings=tuple(settings)), None, exact), (candidate,))


def _pinned(exact: Any, truth: Truth, goal: TuningGoal, on_built: Callable[[AnnIndex], None]) -> Tuned:
    assert goal.index_type is not None
    ann = built(goal.index_type, exact)
    on_built(ann)
    knobs = fastest_knobs(ann, truth, goal, goal.target_k)
    if knobs is None:
        knobs = widest_knobs(ann)
        _log.warning("the pinned %s does not reach a recall of %s", goal.index_type, goal.target_recall)
    setting = measured_setting(ann, truth, goal.target_k, knobs)
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
