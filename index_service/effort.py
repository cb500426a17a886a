"""The search parameters of one index: the least effort that reaches a recall, and what each effort gives.

Deliberately does not know other indexes.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from index_service.ann import EF_SEARCH, K_FACTOR, NPROBE, AnnIndex, Knobs, written_parameters
from index_service.plan import SearchSetting, TuningGoal
from index_service.recall import Truth
from index_service.timing import latencies

STANDARD_ERRORS = 2.5
"""By which the measured recall exceeds the target, so that other queries reach it too."""
K_FACTORS = (1, 2, 4, 8, 16)
"""Refinement that is tried: so many times k rows are scored again with the exact vectors."""
MODEL_QUERIES = 250
_MOST_PROBES = 8
"""Times the probes that would do without encoding; where these do not reach the target, the encoding is at fault."""
_RESOLUTION = 24
"""A search parameter is found to within one part in so many."""
_SWEEP_STEP = 1.15
_SWEEP_GAIN = 1e-4
"""With less gained by a step, nothing more is."""
_SWEEP_BEGIN = 5
"""Times the least effort; before that a step that gains nothing means little."""


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
            setting = measured_setting(ann, truth, k, knobs)
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


def fastest_knobs(ann: AnnIndex, truth: Truth, goal: TuningGoal, k: int) -> Knobs | None:
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


def measured_setting(
    ann: AnnIndex, truth: Truth, k: int, knobs: Knobs, latency_s: float | None = None
) -> SearchSetting:
    """Recall and latency of one index at these search parameters; a latency that is known is not measured again."""
    _, rows = ann.search_at(knobs, truth.queries_for(k), truth.asked(k))
    recall, _ = truth.recall(rows, k)
    if latency_s is None:
        (latency_s,) = latencies([(ann, knobs)], truth.queries.embeddings, k)
    return SearchSetting(k=k, parameters=written_parameters(knobs), recall=recall, latency_s=latency_s)


def widest_knobs(ann: AnnIndex) -> Knobs:
    """The search parameters that spare nothing."""
    return {**ann.limits, **({K_FACTOR: K_FACTORS[-1]} if ann.can_refine else {})}


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
            shares = shares_reached(quantizer, ann.vectors, truth, k)
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


def shares_reached(quantizer: Any, vectors: NDArray[np.float32], truth: Truth, k: int) -> NDArray[np.float64]:
    """`[L]` the share of the exact results that lie in each query's first 1, 2, … L lists."""
    queries = truth.queries.embeddings[:MODEL_QUERIES]
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
