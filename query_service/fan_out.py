"""One search on all shards of a layout at once, within the deadline.

Deliberately does not know how an embedding was made nor how hits are merged, why a layout answers, nor which replica.
"""

import asyncio
import logging
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray
from retrieval.feature.v1 import filter_pb2
from retrieval.index.v1 import index_service_pb2, index_service_pb2_grpc

from query_service.ask import Asking, Failure, Reply, TryCounts, name
from query_service.deadline import Deadline
from query_service.health import follow
from query_service.hits import BrokenAnswerError, Hits, hits_of
from query_service.replicas import Replica, Shard
from towers.errors import DeadlineError, TooFewShardsError, TwoTowerError, VersionNotLoadedError
from towers.rpc import CHANNEL_OPTIONS
from towers.settings import Layout

_SERVICE = index_service_pb2.DESCRIPTOR.services_by_name["IndexService"].full_name
_LONGEST_RESERVE_S = 0.25
_RESERVED_SHARE = 0.1

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Search:
    """What every shard is asked."""

    version: int
    embeddings: NDArray[np.float32]
    """`[B, D]`"""
    k: int
    excluded_item_ids: Sequence[str]
    attribute_names: Sequence[str]
    filter: filter_pb2.Filter | None = None
    num_shards: int | None = None
    """The layout that answers, by its number of shards; None: the first one."""


@dataclass(frozen=True)
class Outcome:
    """What came back."""

    hits: Sequence[Hits]
    """Of the shards that answered, in the order of the shards."""
    failures: Sequence[Failure]
    num_shards: int

    @property
    def lacks_version(self) -> bool:
        """Whether a shard says that it does not hold the version."""
        return any(failure.status is grpc.StatusCode.FAILED_PRECONDITION for failure in self.failures)

    def require(self, num_needed: int) -> None:
        """Refuses an answer from too few shards; raises what `shortfall` says."""
        shortfall = self.shortfall(num_needed)
        if shortfall is not None:
            raise shortfall

    def shortfall(self, num_needed: int) -> TwoTowerError | None:
        """Why an answer is from too few shards.

        Args:
            num_needed: At least so many; all of them where the layout has fewer.

        Returns:
            A `DeadlineError` where the shards that failed all ran out of time, otherwise a `TooFewShardsError`; None
            where enough answered.
        """
        num_needed = min(num_needed, self.num_shards)
        if len(self.hits) >= num_needed:
            return None
        message = f"{len(self.hits)} of {self.num_shards} shards answered and {num_needed} are needed: " + "; ".join(
            failure.reason for failure in self.failures
        )
        if all(failure.status is grpc.StatusCode.DEADLINE_EXCEEDED for failure in self.failures):
            return DeadlineError(message)
        return TooFewShardsError(message)


@dataclass(frozen=True)
class Connection:
    """One replica, for the status."""

    num_shards: int
    """Of its layout."""
    shard: int
    address: str
    is_reachable: bool
    """Whether its last call was answered, True before the first, and it says that it serves, where it is not alone."""
    is_slow: bool
    """Whether others go first because of how long it takes."""


class Shards:
    """The shards of all layouts, each replica behind a channel that stays open."""

    def __init__(self, layouts: Sequence[Layout], *, is_hedged: bool = True) -> None:
        """Opens the channels; call it on the event loop.

        Args:
            layouts: By layout and shard, the addresses of the replicas; no two layouts have as many shards.
            is_hedged: Whether a replica that is late has another one asked beside it, and a slow one stands back.
        """
        self._channels: list[grpc.aio.Channel] = []
        self._followers: list[asyncio.Task[None]] = []
        self._layouts = {
            len(layout): [Shard(self._connected(addresses), is_timed=is_hedged) for addresses in layout]
            for layout in layouts
        }
        self.num_shards = tuple(self._layouts)
        """Of each layout; the first one answers unless a search names another."""
        self.counts = TryCounts()

    async def close(self) -> None:
        """Closes the channels."""
        for follower in self._followers:
            follower.cancel()
        await asyncio.gather(*self._followers, return_exceptions=True)
        await asyncio.gather(*(channel.close() for channel in self._channels))

    def connections(self) -> Iterator[Connection]:
        """All replicas, by layout and shard."""
        for num_shards, layout in self._layouts.items():
            for number, shard in enumerate(layout):
                for replica in shard.replicas:
                    is_reachable = replica.is_reachable and replica.is_serving
                    yield Connection(num_shards, number, replica.address, is_reachable, replica.slowness.is_on)

    async def search(self, search: Search, num_needed: int, deadline: Deadline) -> Outcome:
        """Asks all shards of the layout; calls that nobody waits for any more are cancelled.

        Args:
            search: What to ask.
            num_needed: The search ends as soon as this many, or all that there are, can no longer answer.
            deadline: A part of the time until then is kept for merging.

        Returns:
            The hits of the shards that answered in time, and why the others did not.

        Raises:
            InvalidInputError: a shard refuses what the caller asked for.
            BrokenAnswerError: a shard answered at another version.
        """
        remaining_s = deadline.remaining_s()
        end = Deadline(deadline.at_s - min(_LONGEST_RESERVE_S, _RESERVED_SHARE * remaining_s))
        num_shards = search.num_shards or self.num_shards[0]
        num_needed = min(num_needed, num_shards)
        embeddings = search.embeddings.astype("<f4", copy=False).tobytes()
        hits: dict[int, Hits] = {}
        failures: dict[int, Failure] = {}
        asking = Asking("Search", search.version, _work(search), end, self.counts)
        try:
            for number, shard in enumerate(self._layouts[num_shards]):
                asking.ask(number, shard, _request(search, embeddings, number, num_shards))
            while asking.num_open and num_shards - len(failures) >= num_needed:
                reply = await asking.next()
                answer = reply if isinstance(reply, Failure) else _hits(reply, search)
                if isinstance(answer, Hits):
                    hits[reply.shard] = answer
                else:
                    failures[reply.shard] = answer
        finally:
            asking.close()
        return Outcome(
            hits=[answer for _, answer in sorted(hits.items())],
            failures=[answer for _, answer in sorted(failures.items())],
            num_shards=num_shards,
        )

    async def rank_item(
        self, request: index_service_pb2.RankItemRequest, deadline: Deadline
    ) -> index_service_pb2.RankItemResponse:
        """Asks one shard, the one that the request names.

        Raises:
            InvalidInputError: the shard refuses what the caller asked for.
            VersionNotLoadedError: the shard does not hold the version.
            TooFewShardsError: it does not answer.
            DeadlineError: it does not answer in time.
            BrokenAnswerError: it answered at another version.
        """
        number, version = request.shard, request.checkpoint_version
        asking = Asking("RankItem", version, "RankItem", deadline, self.counts)
        try:
            asking.ask(number, self._layouts[request.num_shards][number], request)
            reply = await asking.next()
        finally:
            asking.close()
        if isinstance(reply, Failure):
            raise _error_of(reply)
        _require_version(reply, version)
        response: index_service_pb2.RankItemResponse = reply.response
        return response

    def _connected(self, addresses: Sequence[str]) -> list[Replica]:
        replicas = []
        for address in addresses:
            channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
            channel.get_state(try_to_connect=True)
            self._channels.append(channel)
            stub: Any = index_service_pb2_grpc.IndexServiceStub(channel)
            replicas.append(Replica(address, stub))
            # One that is alone is asked anyway.
            if len(addresses) > 1:
                self._followers.append(asyncio.create_task(follow(replicas[-1], channel, _SERVICE)))
        return replicas


def _request(search: Search, embeddings: bytes, number: int, num_shards: int) -> index_service_pb2.SearchRequest:
    return index_service_pb2.SearchRequest(
        checkpoint_version=search.version,
        query_embeddings=embeddings,
        num_queries=len(search.embeddings),
        k=search.k,
        excluded_item_ids=search.excluded_item_ids,
        attribute_names=search.attribute_names,
        shard=number,
        num_shards=num_shards,
        filter=search.filter,
    )


def _work(search: Search) -> Hashable:
    """What takes about the same time: as many queries and hits, within a factor of two, behind a filter or not."""
    is_narrowed = (search.filter is not None, bool(search.excluded_item_ids))
    return len(search.embeddings).bit_length(), search.k.bit_length(), *is_narrowed


def _hits(reply: Reply, search: Search) -> Hits | Failure:
    _require_version(reply, search.version)
    try:
        return hits_of(reply.response, len(search.embeddings), search.k, search.attribute_names)
    except BrokenAnswerError as error:
        who = name(reply.shard, reply.replica)
        _log.error("the answer of %s is not used: %s", who, error)
        return Failure(reply.shard, grpc.StatusCode.INTERNAL, f"{who}: its answer is broken: {error}")


def _require_version(reply: Reply, version: int) -> None:
    if reply.response.checkpoint_version != version:
        raise BrokenAnswerError(
            f"{name(reply.shard, reply.replica)} answered at version {reply.response.checkpoint_version}, "
            f"asked for {version}"
        )


def _error_of(failure: Failure) -> TwoTowerError:
    match failure.status:
        case grpc.StatusCode.FAILED_PRECONDITION:
            return VersionNotLoadedError(failure.reason)
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineError(failure.reason)
        case _:
            return TooFewShardsError(failure.reason)
