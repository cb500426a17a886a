"""Many queries, cut into batches.

Deliberately does not know how a batch is asked.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping

from retrieval_client.questions import Features

MAX_CALLS = 4
"""Batches under way at once: while one is answered, the next ones are on their way."""


def batches(queries: Iterable[Features], batch_size: int) -> Iterator[tuple[int, list[Features]]]:
    """Each batch, and the position of its first query.

    Raises:
        TypeError: one mapping where many are meant.
        ValueError: the size is below 1.
    """
    if isinstance(queries, Mapping):
        raise TypeError("queries: expected feature mappings, got one mapping")
    if batch_size < 1:
        raise ValueError(f"batch_size: {batch_size} is below 1")
    left = iter(queries)
    for start in itertools.count(0, batch_size):
        batch = list(itertools.islice(left, batch_size))
        if not batch:
            return
        yield start, batch
