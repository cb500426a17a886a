"""How sure a mean over queries is: percentile bootstrap intervals (Efron 1979).

Deliberately does not know what the figures are.
"""

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
NUM_RESAMPLES = 1000


def intervals(figures: NDArray[np.float64]) -> NDArray[np.float64]:
    """Bounds of the 95 % intervals of column means, queries drawn anew with all their columns.

    So the interval of a difference between two models is that of the column of their differences. The draws are the
    same every time.

    Args:
        figures: `[Q, M]` M figures of each query. Queries stand for users: one each.

    Returns:
        `[2, M]` lower and upper bounds.
    """
    random = np.random.default_rng(0)
    num_queries = len(figures)
    means = np.empty((NUM_RESAMPLES, figures.shape[1]))
    for row in means:
        times_drawn = np.bincount(random.integers(num_queries, size=num_queries), minlength=num_queries)
        row[:] = times_drawn @ figures / num_queries
    tail = (1 - CONFIDENCE) / 2
    bounds: NDArray[np.float64] = np.quantile(means, [tail, 1 - tail], axis=0)
    return bounds
