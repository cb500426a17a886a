"""A sample of the live queries, answered by the standby version too, and how the answers compare.

Deliberately does not know how a version is asked. The live answer has left before the standby version is asked.
"""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from query_service.deadline import Deadline
from query_service.traffic import Latencies
from query_service.versions import Place
from towers.errors import TwoTowerError, VersionNotLoadedError

MOST_QUERIES = 16
"""Larger batches are not sampled: they are answered in threads, where they would take time from live ones."""
_MOST_AT_ONCE = 4
_PAUSE_S = 1.0
"""After a shard said that it does not hold the standby version yet."""

_log = logging.getLogger(__name__)

ItemIds = Sequence[Sequence[str]]
"""Of B queries, the best first."""


@dataclass
class Comparison:
    """How one version's answers compare with another's, so far."""

    live: Place
    standby: Place
    num_queries: int = 0
    num_errors: int = 0
    """Queries that the standby version failed to answer."""
    summed_overlap: float = 0.0
    live_latencies: Latencies = field(default_factory=Latencies)
    standby_latencies: Latencies = field(default_factory=Latencies)

    @property
    def mean_overlap(self) -> float:
        """Mean share of the live answer's items that the standby version returned too; 0 before the first."""
        return self.summed_overlap / self.num_queries if self.num_queries else 0.0


class Shadow:
    """Compares a sample.

    1. A live answer never waits for it: what does not fit beside the comparisons under way is dropped.
    2. It has a deadline of its own.
    3. While a shard does not hold the standby version, nothing is counted.
    """

    def __init__(self, share: float, timeout_s: float) -> None:
        """Nothing is asked yet.

        Args:
            share: Of the requests; 0: none.
            timeout_s: The longest that the standby version may take.
        """
        self._share = share
        self._timeout_s = timeout_s
        self._comparison: Comparison | None = None
        self._under_way: set[asyncio.Task[None]] = set()
        self._rests_until_s = 0.0

    def between(self, live: Place, standby: Place) -> Comparison:
        """The comparison of these two; it begins anew when they are others than before."""
        if self._comparison is None or (self._comparison.live, self._comparison.standby) != (live, standby):
            self._comparison = Comparison(live, standby)
        return self._comparison

    def wants(self, num_queries: int) -> bool:
        """Whether a request of so many queries belongs to the sample, and there is room for it."""
        return (
            random.random() < self._share  # noqa: S311
            and num_queries <= MOST_QUERIES
            and len(self._under_way) < _MOST_AT_ONCE
            and time.monotonic() >= self._rests_until_s
        )

    def compare(
        self,
        live: Place,
        standby: Place,
        item_ids: ItemIds,
        live_s: float,
        ask: Callable[[Deadline], Awaitable[ItemIds]],
    ) -> None:
        """Asks the standby version, later.

        Args:
            live: What answered.
            standby: What is asked.
            item_ids: The live answer.
            live_s: Seconds that it took.
            ask: Asks the standby version for all its shards' best.
        """
        task = asyncio.create_task(self._compare(self.between(live, standby), item_ids, live_s, ask))
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)

    async def close(self) -> None:
        """Drops what is under way."""
        for task in self._under_way:
            task.cancel()
        await asyncio.gather(*self._under_way, return_exceptions=True)

    async def _compare(
        self,
        comparison: Comparison,
        item_ids: ItemIds,
        live_s: float,
        ask: Callable[[Deadline], Awaitable[ItemIds]],
    ) -> None:
        started_s = time.perf_counter()
        try:
            others = await ask(Deadline.after(self._timeout_s))
        except VersionNotLoadedError:
            self._rests_until_s = time.monotonic() + _PAUSE_S
            return
        except Exception as error:  # Whatever it is, nobody waits for it.
            if not comparison.num_errors:
                is_bug = not isinstance(error, TwoTowerError)
                _log.warning("version %d fails in the shadow: %s", comparison.standby.version, error, exc_info=is_bug)
            comparison.num_errors += len(item_ids)
            return
        comparison.live_latencies.add(live_s)
        comparison.standby_latencies.add(time.perf_counter() - started_s)
        for live_ids, standby_ids in zip(item_ids, others, strict=True):
            if live_ids:
                comparison.num_queries += 1
                comparison.summed_overlap += len(set(live_ids) & set(standby_ids)) / len(live_ids)
