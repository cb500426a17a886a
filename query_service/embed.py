"""Embeddings of queries: those that this process holds, else from the cache that all share, else from the tower.

Deliberately does not know what is done with them.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from query_service.cache import EmbeddingCache
from query_service.digest import digests_of
from query_service.hot import HotQueries
from query_service.offload import Offload
from query_service.parse import InvalidQueriesError, RawFeatures, encode
from query_service.payoff import Cost, Payoff
from query_service.recent import RecentEmbeddings
from query_service.versions import Pin
from towers.errors import InvalidFeatureError
from towers.features import Arrays
from towers.tower import Tower


@dataclass(frozen=True)
class Embedded:
    """Unit embeddings of B queries, all of one version."""

    embeddings: NDArray[np.float32]
    """`[B, D]`"""
    is_cached: Sequence[bool]
    """B, whether each came from a cache."""


_Flight = asyncio.Future[Embedded | None]
"""Done with what was asked for, or with None where that failed or was given up."""


_FOUND_SMOOTHING = 0.01
"""Weight of the newest batch in the share of queries that are found."""
_SETTLED = 2
"""Times as many queries as there are entries: then the table is full, or most queries are found."""


class Held:
    """What this process has of one tower: its recent embeddings, those under way, and what they cost."""

    def __init__(self, dim: int, num_entries: int, may_leave_out: bool) -> None:
        self.recent = RecentEmbeddings(num_entries, dim)
        self.under_way: dict[bytes, tuple[_Flight, int]] = {}
        """By digest: who gets it, and its row there."""
        self.tower = Cost()
        self.local = Payoff(self.tower, may_leave_out)
        """Of digests and `recent`."""
        self.shared = Payoff(self.tower, may_leave_out)
        """Of the cache that all processes share."""
        self.num_hits = 0
        """In `recent`."""
        self.num_misses = 0
        self.num_joined = 0
        """Of these, those that another request was getting already."""
        self.num_ahead = 0
        """Embedded before anyone asked."""
        self._num_entries = num_entries
        self._share_found = 1.0

    def count_found(self, num_found: int, num_missing: int, *, is_last: bool) -> None:
        """Counts what was looked for in `recent`.

        Args:
            num_found: Queries whose embedding was there.
            num_missing: Queries whose embedding was not.
            is_last: Whether those go to the tower, as there is no other cache.
        """
        self.num_hits += num_found
        self.num_misses += num_missing
        num_queries = num_found + num_missing
        self._share_found += _FOUND_SMOOTHING * (num_found / num_queries - self._share_found)
        # Before, it has not seen as many queries as it has room for, and what it finds says little.
        is_settled = self.num_hits + self.num_misses >= _SETTLED * self._num_entries
        is_used_alone = is_last or self.shared.is_left_out
        self.local.share_found = self._share_found if is_settled and is_used_alone else 1.0


class Embedder:
    """Embeds queries with the tower of a pinned version.

    1. What is held belongs to the tower that made it, and goes with it: no version can serve another's.
    2. Of queries alike, however many batches ask for them at once, one is looked up or computed, save where computing
       is cheaper than finding that out.
    """

    def __init__(
        self, cache: EmbeddingCache, offload: Offload, hot: HotQueries, num_entries: int, may_leave_out: bool
    ) -> None:
        """Nothing is held yet.

        Args:
            cache: What all processes share.
            offload: Where large work is done.
            hot: Is told the queries.
            num_entries: The most embeddings of one tower that this process holds itself; 0: none.
            may_leave_out: Whether a lookup that costs more than the tower is left out.
        """
        self._cache = cache
        self._offload = offload
        self._hot = hot
        self._num_entries = num_entries
        self._may_leave_out = may_leave_out
        self._held: WeakKeyDictionary[Tower, Held] = WeakKeyDictionary()

    def held(self) -> list[tuple[int, Held]]:
        """What is held, by version."""
        return sorted(((tower.version, held) for tower, held in self._held.items()), key=lambda pair: pair[0])

    async def embed(self, queries: Sequence[RawFeatures], pin: Pin) -> Embedded:
        """Embeds B queries: one cache round trip for all, one tower pass for those not found.

        Raises:
            InvalidQueriesError: a feature that the schema does not allow, or values so large that the embedding is
                not finite.
        """
        num_queries = len(queries)
        arrays = await self._offload.run(num_queries, encode, queries, pin)
        self._hot.notice(queries)
        held = self._held_of(pin.tower)
        if not (self._num_entries or self._cache.is_enabled) or not held.local.wants_lookup():
            embeddings = await self._tower_pass(arrays, range(num_queries), pin, held)
            return Embedded(embeddings, [False] * num_queries)
        started_s = time.perf_counter()
        digests = await self._offload.run(num_queries, digests_of, arrays, pin.fingerprint)
        embeddings, missing = held.recent.read(digests)
        held.local.lookup.add(time.perf_counter() - started_s, num_queries)
        held.count_found(num_queries - len(missing), len(missing), is_last=not self._cache.is_enabled)
        is_cached = [True] * num_queries
        while missing:
            missing = await self._fill(missing, digests, arrays, pin, held, embeddings, is_cached)
        return Embedded(embeddings, is_cached)

    async def embed_ahead(self, queries: Sequence[RawFeatures], pin: Pin) -> int:
        """Embeds what is not held yet of a few queries, away from the event loop.

        Queries that this version has no embedding for are left out.

        Returns:
            How many were embedded.
        """
        held = self._held_of(pin.tower)
        if not self._num_entries or held.local.is_left_out:
            return 0
        digests, arrays = await asyncio.to_thread(_encoded, queries, pin)
        rows = [row for row, digest in enumerate(digests) if digest not in held.recent]
        if not rows:
            return 0
        chosen = {name: array[rows] for name, array in arrays.items()}
        embeddings = await asyncio.to_thread(pin.tower.embed, chosen)
        finite = np.flatnonzero(np.isfinite(embeddings).all(axis=1))
        made = [digests[rows[place]] for place in finite]
        held.recent.add(made, embeddings[finite])
        held.num_ahead += len(made)
        if not held.shared.is_left_out:
            self._cache.put(pin.version, made, embeddings[finite])
        return len(made)

    async def _fill(
        self,
        missing: Sequence[int],
        digests: Sequence[bytes],
        arrays: Arrays,
        pin: Pin,
        held: Held,
        embeddings: NDArray[np.float32],
        is_cached: list[bool],
    ) -> list[int]:
        """Gets what this process does not hold; what others are getting already is waited for.

        Returns:
            The positions of those that others were getting in vain.
        """
        flight: _Flight = asyncio.get_running_loop().create_future()
        first_of: list[int] = []
        joined: list[tuple[int, _Flight, int]] = []
        for position in missing:
            under_way = held.under_way.get(digests[position])
            if under_way is None:
                held.under_way[digests[position]] = (flight, len(first_of))
                first_of.append(position)
            else:
                joined.append((position, *under_way))
        got: Embedded | None = None
        try:
            if first_of:
                got = await self._get([digests[position] for position in first_of], first_of, arrays, pin, held)
                if len(first_of) == len(embeddings):
                    embeddings[:] = got.embeddings
                else:
                    embeddings[first_of] = got.embeddings
                for position, was_cached in zip(first_of, got.is_cached, strict=True):
                    is_cached[position] = was_cached
        finally:
            for position in first_of:
                del held.under_way[digests[position]]
            flight.set_result(got)
        if not joined:
            return []
        held.num_joined += len(joined)
        # Awaited by itself, a future would be cancelled with whoever waits.
        await asyncio.wait({flight for _, flight, _ in joined})
        left = []
        for position, flight, row in joined:
            theirs = flight.result()
            if theirs is None:
                left.append(position)
            else:
                embeddings[position] = theirs.embeddings[row]
                is_cached[position] = theirs.is_cached[row]
        return left

    async def _get(
        self, digests: Sequence[bytes], rows: Sequence[int], arrays: Arrays, pin: Pin, held: Held
    ) -> Embedded:
        """Embeddings that this process does not hold: from the cache that all share, or from the tower."""
        if not self._cache.is_enabled or not held.shared.wants_lookup():
            made = await self._tower_pass(arrays, rows, pin, held)
            held.recent.add(digests, made)
            return Embedded(made, [False] * len(rows))
        started_s = time.perf_counter()
        found = await self._cache.get(pin.version, digests, pin.tower.dim)
        if self._cache.is_reachable:
            held.shared.lookup.add(time.perf_counter() - started_s, len(rows))
        embeddings = np.empty((len(rows), pin.tower.dim), dtype=np.float32)  # [B, D]
        missing = []
        for place, embedding in enumerate(found):
            if embedding is None:
                missing.append(place)
            else:
                embeddings[place] = embedding
        if missing:
            made = await self._tower_pass(arrays, [rows[place] for place in missing], pin, held)
            embeddings[missing] = made
            self._cache.put(pin.version, [digests[place] for place in missing], made)
        held.recent.add(digests, embeddings)
        return Embedded(embeddings, [embedding is not None for embedding in found])

    async def _tower_pass(self, arrays: Arrays, rows: Sequence[int], pin: Pin, held: Held) -> NDArray[np.float32]:
        num_queries = len(next(iter(arrays.values())))
        is_all = len(rows) == num_queries
        chosen = arrays if is_all else {name: array[rows] for name, array in arrays.items()}
        started_s = time.perf_counter()
        embeddings = await self._offload.run(len(rows), pin.tower.embed, chosen)
        held.tower.add(time.perf_counter() - started_s, len(rows))
        is_finite = np.isfinite(embeddings).all(axis=1)
        if not is_finite.all():
            error = InvalidFeatureError(
                f"version {pin.version} gives it no finite embedding; its vector features are too large, or "
                "too much is missing"
            )
            failures = {row: error for row, is_right in zip(rows, is_finite.tolist(), strict=True) if not is_right}
            raise InvalidQueriesError(failures, num_queries)
        return embeddings

    def _held_of(self, tower: Tower) -> Held:
        held = self._held.get(tower)
        if held is None:
            held = self._held[tower] = Held(tower.dim, self._num_entries, self._may_leave_out)
        return held


def _encoded(queries: Sequence[RawFeatures], pin: Pin) -> tuple[list[bytes], Arrays]:
    """Digests and arrays of the queries that this version can encode, none twice."""
    try:
        arrays = encode(queries, pin)
    except InvalidQueriesError as error:
        right = [query for position, query in enumerate(queries) if position not in error.failures]
        return _encoded(right, pin) if right else ([], {})
    digests = digests_of(arrays, pin.fingerprint)
    rows = list({digest: row for row, digest in enumerate(digests)}.values())
    return [digests[row] for row in rows], {name: array[rows] for name, array in arrays.items()}
