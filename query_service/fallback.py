"""What is answered where no shard is: what was answered before to the same question, or what is popular.

Deliberately does not know why the shards failed. All of it is the live version's own.
"""

import itertools
import time
from collections import Counter, OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from retrieval.query.v1 import query_service_pb2

from query_service.merge import Ranking

STALE, POPULAR = "stale_result", "popular_items"
"""How the first of the reasons begins."""
_SAMPLED = 16
"""One full answer in so many is counted."""
_COUNTED = 10
"""Of its items, from the best: further down nearly everything comes."""
_WINDOW_S = 60.0
"""What is popular was returned in the last one or two of these: an item that is gone leaves."""
_MOST_VERSIONS = 2


@dataclass
class FallbackCounts:
    """Answers that were less than full, since the process started."""

    num_partial: int = 0
    num_stale: int = 0
    num_popular: int = 0


class Fallback:
    """Remembers full answers, and gives them where there is no other."""

    def __init__(self, stale_s: float, num_stale: int, num_popular: int) -> None:
        """Nothing is remembered yet.

        Args:
            stale_s: How old an answer may be; 0: none is remembered.
            num_stale: The most answers that are.
            num_popular: The most items that are given because they are popular; 0: none.
        """
        self._stale_s = stale_s
        self._num_stale = num_stale
        self._num_popular = num_popular
        self._answers: OrderedDict[Hashable, tuple[float, bytes]] = OrderedDict()
        """When each was given, and the answer; the oldest first."""
        self._popular: OrderedDict[int, _Popular] = OrderedDict()
        """By version; the one that answered last at the end."""
        self._num_passed = _SAMPLED
        """Queries since one was counted; the first is."""
        self.counts = FallbackCounts()

    @property
    def keeps_answers(self) -> bool:
        """Whether `remember` is of use."""
        return self._stale_s > 0

    def count(self, version: int, rankings: Sequence[Ranking]) -> None:
        """Counts what a version returned in full."""
        self._num_passed += len(rankings)
        if not self._num_popular or self._num_passed < _SAMPLED:
            return
        self._num_passed = 0
        popular = self._popular.setdefault(version, _Popular())
        self._popular.move_to_end(version)
        if len(self._popular) > _MOST_VERSIONS:
            self._popular.popitem(last=False)
        popular.add(rankings[0].item_ids[:_COUNTED])

    def remember(self, question: Hashable, response: query_service_pb2.RetrieveResponse) -> None:
        """Remembers a full answer.

        Args:
            question: All that the answer depends on, the version included.
            response: The answer.
        """
        self._answers.pop(question, None)
        self._answers[question] = time.monotonic(), response.SerializeToString()
        if len(self._answers) > self._num_stale:
            self._answers.popitem(last=False)

    def earlier(self, question: Hashable) -> query_service_pb2.RetrieveResponse | None:
        """What was answered to the very same question, its first reason set; None where that is too long ago."""
        given_s, content = self._answers.get(question, (0.0, b""))
        age_s = time.monotonic() - given_s
        if not content or age_s > self._stale_s:
            return None
        response: query_service_pb2.RetrieveResponse = query_service_pb2.RetrieveResponse.FromString(content)
        response.degraded_reasons.append(f"{STALE}: no shard answered; this is what they said {age_s:.0f} s ago")
        self.counts.num_stale += 1
        return response

    def popular(
        self, version: int, k: int, excluded_item_ids: Sequence[str]
    ) -> query_service_pb2.RetrieveResponse | None:
        """The k items that a version returned most often lately, with scores of 0; None where none is known."""
        counted = self._popular.get(version)
        if counted is None:
            return None
        excluded = set(excluded_item_ids)
        allowed = (item_id for item_id in counted.most_returned(self._num_popular) if item_id not in excluded)
        item_ids = list(itertools.islice(allowed, k))
        if not item_ids:
            return None
        self.counts.num_popular += 1
        return query_service_pb2.RetrieveResponse(
            item_ids=item_ids,
            scores=[0.0] * len(item_ids),
            checkpoint_version=version,
            degraded_reasons=[f"{POPULAR}: no shard answered; these are returned most often lately, whatever is asked"],
        )


class _Popular:
    """How often items were returned, in this window and in the one before."""

    def __init__(self) -> None:
        self._start_s = time.monotonic()
        self._now: Counter[str] = Counter()
        self._before: Counter[str] = Counter()
        self._sorted: list[str] | None = None

    def add(self, item_ids: Sequence[str]) -> None:
        elapsed_s = time.monotonic() - self._start_s
        if elapsed_s > _WINDOW_S:
            self._before = self._now if elapsed_s < 2 * _WINDOW_S else Counter()
            self._now, self._start_s = Counter(), time.monotonic()
        self._now.update(item_ids)
        self._sorted = None

    def most_returned(self, number: int) -> list[str]:
        if self._sorted is None:
            # Sorted once: while no shard answers, nothing is added.
            self._sorted = [item_id for item_id, _ in (self._now + self._before).most_common(number)]
        return self._sorted
