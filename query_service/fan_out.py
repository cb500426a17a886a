"""One search on all shards at once, within the deadline.

Deliberately does not know how an embedding was made nor how hits are merged.
"""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import grpc
import numpy as np
from numpy.typing import NDArray
from retrieval.index.v1 import index_service_pb2, index_service_pb2_grpc

from query_service.deadline import Deadline
from query_service.hits import BrokenAnswerError, Hits, hits_of
from towers.errors import DeadlineError, InvalidInputError, TooFewShardsError
from towers.rpc import CHANNEL_OPTIONS

_LONGEST_RESERVE_S = 0.25
_RESERVED_SHARE = 0.1
_TELLING = (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.RESOURCE_EXHAUSTED)
"""Statuses whose message comes from the shard and says what to do."""

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

        Raises:
            DeadlineError: the shards that failed all ran out of time.
            TooFewShardsError: otherwise.
        """
        if len(self.hits) >= num_needed:
            return
        message = f"{len(self.hits)} of {self.num_shards} shards answered and {num_needed} are needed: " + "; ".join(
            failure.reason for failure in self.failures
        )
        if all(failure.status is grpc.StatusCode.DEADLINE_EXCEEDED for failure in self.failures):
            raise DeadlineError(message)
        raise TooFewShardsError(message)


class Shards:
    """The shards, each behind a channel that stays open."""

    def __init__(self, addresses: Sequence[str]) -> None:
        """Opens the channels; call it on the event loop.

        Args:
            addresses: The address of each shard, by number.
        """
        self.addresses = tuple(addresses)
        self.reachable = [True] * len(addresses)
        """By shard: whether its last call succeeded; True before the first."""
        self._channels = [grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) for address in addresses]
        self._stubs = [index_service_pb2_grpc.IndexServiceStub(channel) for channel in self._channels]
        for channel in self._channels:
            channel.get_state(try_to_connect=True)

    async def close(self) -> None:
        """Closes the channels."""
        await asyncio.gather(*(channel.close() for channel in self._channels))

    async def search(self, search: Search, num_needed: int, deadline: Deadline) -> Outcome:
        """Asks all shards; calls that nobody waits for any more are cancelled.

        Args:
            search: What to ask.
            num_needed: The search ends as soon as this many can no longer answer.
            deadline: A part of the time until then is kept for merging.

        Returns:
            The hits of the shards that answered in time, and why the others did not.

        Raises:
            InvalidInputError: a shard refuses what the caller asked for.
            BrokenAnswerError: a shard answered at another version.
        """
        remaining_s = deadline.remaining_s()
        timeout_s = remaining_s - min(_LONGEST_RESERVE_S, _RESERVED_SHARE * remaining_s)
        num_shards = len(self.addresses)
        embeddings = search.embeddings.astype("<f4", copy=False).tobytes()
        tasks = [asyncio.create_task(self._ask(shard, search, embeddings, timeout_s)) for shard in range(num_shards)]
        waiting = set(tasks)
        hits: dict[int, Hits] = {}
        failures: dict[int, Failure] = {}
        try:
            while waiting and num_shards - len(failures) >= num_needed:
                answered, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in answered:
                    shard, answer = task.result()
                    if isinstance(answer, Hits):
                        hits[shard] = answer
                    else:
                        failures[shard] = answer
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return Outcome(
            hits=[answer for _, answer in sorted(hits.items())],
            failures=[answer for _, answer in sorted(failures.items())],
            num_shards=num_shards,
        )

    async def _ask(self, shard: int, search: Search, embeddings: bytes, timeout_s: float) -> tuple[int, Hits | Failure]:
        request = index_service_pb2.SearchRequest(
            checkpoint_version=search.version,
            query_embeddings=embeddings,
            num_queries=len(search.embeddings),
            k=search.k,
            excluded_item_ids=search.excluded_item_ids,
            attribute_names=search.attribute_names,
            shard=shard,
            num_shards=len(self.addresses),
        )
        try:
            response = await self._stubs[shard].Search(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
                raise InvalidInputError(error.details()) from error
            self.reachable[shard] = False
            detail = f": {error.details()}" if error.code() in _TELLING else ""
            return shard, self._failure(shard, error.code(), error.code().name + detail)
        self.reachable[shard] = True
        if response.checkpoint_version != search.version:
            raise BrokenAnswerError(
                f"{self._name(shard)} answered at version {response.checkpoint_version}, asked for {search.version}"
            )
        try:
            return shard, hits_of(response, len(search.embeddings), search.k, search.attribute_names)
        except BrokenAnswerError as error:
            _log.error("the answer of %s is not used: %s", self._name(shard), error)
            return shard, self._failure(shard, grpc.StatusCode.INTERNAL, f"its answer is broken: {error}")

    def _failure(self, shard: int, status: grpc.StatusCode, why: str) -> Failure:
        return Failure(shard, status, f"{self._name(shard)}: {why}")

    def _name(self, shard: int) -> str:
        return f"shard {shard} ({self.addresses[shard]})"
