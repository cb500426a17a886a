"""One search on all shards of a layout at once, each asked through one of its replicas, within the deadline.

Deliberately does not know how an embedding was made nor how hits are merged, nor why a layout answers.
"""

import asyncio
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray
from retrieval.feature.v1 import filter_pb2
from retrieval.index.v1 import index_service_pb2, index_service_pb2_grpc

from query_service.deadline import Deadline
from query_service.hits import BrokenAnswerError, Hits, hits_of
from query_service.replicas import Replica, Shard
from towers.errors import DeadlineError, InvalidInputError, TooFewShardsError, TwoTowerError, VersionNotLoadedError
from towers.rpc import CHANNEL_OPTIONS
from towers.settings import Layout

_LONGEST_RESERVE_S = 0.25
_RESERVED_SHARE = 0.1
_FIRST_TRY_SHARE = 0.5
"""Of the time for a shard, where another replica is there for the rest of it."""
_TELLING = (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.RESOURCE_EXHAUSTED)
"""Statuses whose message comes from the shard and says what to do."""
_HEALED_ELSEWHERE = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.FAILED_PRECONDITION,
    # A replica that drains ends its last calls with this.
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
)
"""Statuses of one replica that say nothing of the others."""

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
class Failure:
    """Why a shard did not answer."""

    shard: int
    status: grpc.StatusCode
    reason: str


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
        """Refuses an answer from too few shards.

        Args:
            num_needed: At least so many; all of them where the layout has fewer.

        Raises:
            DeadlineError: the shards that failed all ran out of time.
            TooFewShardsError: otherwise.
        """
        num_needed = min(num_needed, self.num_shards)
        if len(self.hits) >= num_needed:
            return
        message = f"{len(self.hits)} of {self.num_shards} shards answered and {num_needed} are needed: " + "; ".join(
            failure.reason for failure in self.failures
        )
        if all(failure.status is grpc.StatusCode.DEADLINE_EXCEEDED for failure in self.failures):
            raise DeadlineError(message)
        raise TooFewShardsError(message)


@dataclass(frozen=True)
class Connection:
    """One replica, for the status."""

    num_shards: int
    """Of its layout."""
    shard: int
    address: str
    is_reachable: bool
    """Whether its last call was answered; True before the first."""


class Shards:
    """The shards of all layouts, each replica behind a channel that stays open."""

    def __init__(self, layouts: Sequence[Layout]) -> None:
        """Opens the channels; call it on the event loop.

        Args:
            layouts: By layout and shard, the addresses of the replicas; no two layouts have as many shards.
        """
        self._channels: list[grpc.aio.Channel] = []
        self._layouts = {
            len(layout): [Shard([self._connected(address) for address in addresses]) for addresses in layout]
            for layout in layouts
        }
        self.num_shards = tuple(self._layouts)
        """Of each layout; the first one answers unless a search names another."""

    async def close(self) -> None:
        """Closes the channels."""
        await asyncio.gather(*(channel.close() for channel in self._channels))

    def connections(self) -> Iterator[Connection]:
        """All replicas, by layout and shard."""
        for num_shards, layout in self._layouts.items():
            for number, shard in enumerate(layout):
                for replica in shard.replicas:
                    yield Connection(num_shards, number, replica.address, replica.is_reachable)

    async def search(self, search: Search, num_needed: int, deadline: Deadline) -> Outcome:
        """Asks all shards of the layout; calls that nobody waits for any more are cancelled.

        A shard whose replica fails is asked once more, at another replica.

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
        tasks = [
            asyncio.create_task(self._ask(number, shard, search, _request(search, embeddings, number, num_shards), end))
            for number, shard in enumerate(self._layouts[num_shards])
        ]
        waiting = set(tasks)
        hits: dict[int, Hits] = {}
        failures: dict[int, Failure] = {}
        try:
            while waiting and num_shards - len(failures) >= num_needed:
                answered, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in answered:
                    number, answer = task.result()
                    if isinstance(answer, Hits):
                        hits[number] = answer
                    else:
                        failures[number] = answer
        finally:
            # Where all have ended well, there is nothing to end.
            if len(hits) + len(failures) < num_shards:
                for task in waiting:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        return Outcome(
            hits=[answer for _, answer in sorted(hits.items())],
            failures=[answer for _, answer in sorted(failures.items())],
            num_shards=num_shards,
        )

    async def rank_item(
        self, request: index_service_pb2.RankItemRequest, deadline: Deadline
    ) -> index_service_pb2.RankItemResponse:
        """Asks one shard, the one that the request names, and once more at another replica where there is one.

        Raises:
            InvalidInputError: the shard refuses what the caller asked for.
            VersionNotLoadedError: the shard does not hold the version.
            TooFewShardsError: it does not answer.
            DeadlineError: it does not answer in time.
            BrokenAnswerError: it answered at another version.
        """
        number, version = request.shard, request.checkpoint_version
        first, second = self._layouts[request.num_shards][number].next_two(version, time.monotonic())
        timeout_s = deadline.remaining_s() * (_FIRST_TRY_SHARE if second else 1.0)
        response: index_service_pb2.RankItemResponse
        try:
            response = await first.stub.RankItem(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            if second is None or error.code() not in _HEALED_ELSEWHERE:
                raise _error_of(number, first, error) from error
            try:
                response = await second.stub.RankItem(request, timeout=deadline.remaining_s())
            except grpc.aio.AioRpcError as again:
                raise _error_of(number, second, again) from again
        if response.checkpoint_version != version:
            raise BrokenAnswerError(
                f"shard {number} ranked at version {response.checkpoint_version}, asked for {version}"
            )
        return response

    async def _ask(
        self, number: int, shard: Shard, search: Search, request: index_service_pb2.SearchRequest, end: Deadline
    ) -> tuple[int, Hits | Failure]:
        """Asks one replica and, where it fails in a way that another can heal, one other."""
        first, second = shard.next_two(search.version, time.monotonic())
        if second is None:
            return number, await self._ask_replica(number, first, search, request, end.remaining_s())
        answer = await self._ask_replica(number, first, search, request, _FIRST_TRY_SHARE * end.remaining_s())
        remaining_s = end.remaining_s()
        if isinstance(answer, Hits) or answer.status not in _HEALED_ELSEWHERE or remaining_s <= 0:
            return number, answer
        again = await self._ask_replica(number, second, search, request, remaining_s)
        if isinstance(again, Hits):
            return number, again
        # That a replica lacks the version makes the caller look at the record, whatever is wrong with the other.
        has_told = grpc.StatusCode.FAILED_PRECONDITION in (answer.status, again.status)
        status = grpc.StatusCode.FAILED_PRECONDITION if has_told else again.status
        return number, Failure(number, status, f"{answer.reason}, then {again.reason}")

    async def _ask_replica(
        self,
        number: int,
        replica: Replica,
        search: Search,
        request: index_service_pb2.SearchRequest,
        timeout_s: float,
    ) -> Hits | Failure:
        try:
            response = await replica.stub.Search(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            status = error.code()
            if status is grpc.StatusCode.INVALID_ARGUMENT:
                raise InvalidInputError(error.details()) from error
            if status is grpc.StatusCode.FAILED_PRECONDITION:
                replica.lacks(search.version, time.monotonic())
            else:
                replica.failed(time.monotonic())
            detail = f": {error.details()}" if status in _TELLING else ""
            return _failure(number, replica, status, status.name + detail)
        replica.answered()
        if response.checkpoint_version != search.version:
            raise BrokenAnswerError(
                f"{_name(number, replica)} answered at version {response.checkpoint_version}, "
                f"asked for {search.version}"
            )
        try:
            return hits_of(response, len(search.embeddings), search.k, search.attribute_names)
        except BrokenAnswerError as error:
            _log.error("the answer of %s is not used: %s", _name(number, replica), error)
            return _failure(number, replica, grpc.StatusCode.INTERNAL, f"its answer is broken: {error}")

    def _connected(self, address: str) -> Replica:
        channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        channel.get_state(try_to_connect=True)
        self._channels.append(channel)
        stub: Any = index_service_pb2_grpc.IndexServiceStub(channel)
        return Replica(address, stub)


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


def _error_of(number: int, replica: Replica, error: grpc.aio.AioRpcError) -> TwoTowerError:
    message = f"{_name(number, replica)}: {error.code().name}: {error.details()}"
    match error.code():
        case grpc.StatusCode.INVALID_ARGUMENT:
            return InvalidInputError(error.details())
        case grpc.StatusCode.FAILED_PRECONDITION:
            return VersionNotLoadedError(message)
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineError(message)
        case _:
            return TooFewShardsError(message)


def _failure(number: int, replica: Replica, status: grpc.StatusCode, why: str) -> Failure:
    return Failure(number, status, f"{_name(number, replica)}: {why}")


def _name(number: int, replica: Replica) -> str:
    return f"shard {number} ({replica.address})"
