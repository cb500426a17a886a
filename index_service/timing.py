"""How long searches take, measured so that indexes can be compared.

Deliberately does not know why they are.
"""

import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import faiss
import numpy as np
from numpy.typing import NDArray

from index_service.ann import AnnIndex, Knobs, written_parameters
from index_service.plan import IndexPlan, SearchSetting

_TIMED_S = 0.4
"""For each index of a comparison."""
_FEWEST_TIMED = 15
_MOST_TIMED = 300
_OTHER_MEMORY_FLOATS = 2**20
"""4 MB: more than a core has to itself."""


def latencies(
    searches: Sequence[tuple[AnnIndex, Knobs]], queries: NDArray[np.float32], k: int, most: int = _MOST_TIMED
) -> list[float]:
    """Median seconds of one search for one query with one thread, of each.

    They take turns, so that noise hits all, and each time in another order, as a search is faster after one like it.
    Before each, other memory is used, as it is between the searches of a server: what is near in a cache by luck says
    little about the next request.

    Args:
        searches: Indexes, and how they are searched.
        queries: `[Q, D]`
        k: At least 1.
        most: Searches of each that are timed.
    """
    other_memory = np.zeros(_OTHER_MEMORY_FLOATS, dtype=np.float32)
    timed = [searched_at(ann, knobs, k) for ann, knobs in searches]
    with _one_thread():
        singles = [np.ascontiguousarray(query[None]) for query in queries]  # Q times [1, D]
        times: list[list[float]] = [[] for _ in searches]
        random = np.random.default_rng(0)
        spent_s = 0.0
        for number, query in enumerate(itertools.islice(itertools.cycle(singles), most)):
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
