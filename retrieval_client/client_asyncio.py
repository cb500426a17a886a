"""The client for asyncio.

Deliberately thin: requests are built in `questions`, responses read in `answers`.
"""

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Iterable, Sequence
from functools import partial
from types import TracebackType
from typing import Protocol, Self, TypeVar

import grpc
from retrieval.query.v1 import query_service_pb2, query_service_pb2_grpc

from retrieval_client.answers import (
    Embeddings,
    Explanation,
    Retrieval,
    ServiceStatus,
    embeddings_of,
    explanation_of,
    retrieval_of,
    retrievals_of,
    status_of,
)
from retrieval_client.batches import MAX_CALLS, batches
from retrieval_client.channel import Metadata, Priority, balanced_options, metadata_of, plain_options
from retrieval_client.errors import RetrievalError, error_of, error_of_batch
from retrieval_client.filters import Filter
from retrieval_client.questions import (
    Features,
    StreamedQuery,
    batch_retrieve_request,
    embed_request,
    explain_request,
    retrieve_request,
    stream_request,
)
from retrieval_client.stream_asyncio import AsyncStream

_Request = TypeVar("_Request", contravariant=True)
_Response = TypeVar("_Response", covariant=True)


class _Method(Protocol[_Request, _Response]):
    def __call__(self, request: _Request, *, timeout: float | None, metadata: Metadata) -> Awaitable[_Response]: ...


class AsyncRetrievalClient:
    """Calls one query service from one event loop; close it, or use it in an `async with` block.

    A call that fails because the service cannot be reached, or has too much to do, is tried twice more within its
    deadline, after growing pauses.
    """

    def __init__(
        self, address: str, timeout_s: float = 2.0, num_connections: int = 1, priority: Priority | None = None
    ) -> None:
        """Connects at the first call.

        Args:
            address: `host:port`, `unix:/path`, or for several replicas, in turn, `dns:///name:port` or
                `ipv4:host:port,host:port`: those that are not ready, or drain, are left out.
            timeout_s: Deadline of a call that has none of its own.
            num_connections: To each replica, used in turn: one connection keeps to one worker of a service that has
                several (`--workers`), so give a few times as many as there are workers.
            priority: Of all calls: what is sheddable is refused first when the service has too much to do, what is
                critical last. None: the service's own choice, sheddable for `stream_retrieve`, else default.

        Raises:
            ValueError: `num_connections` is below 1, or there is no such priority.
            RuntimeError: no event loop is running; make the client inside the coroutine that uses it.
        """
        asyncio.get_running_loop()
        self._timeout_s = timeout_s
        self._metadata = metadata_of(priority)
        options = balanced_options(address, num_connections)
        self._channels = [grpc.aio.insecure_channel(address, options=options) for _ in range(num_connections)]
        self._stubs = itertools.cycle([query_service_pb2_grpc.QueryServiceStub(channel) for channel in self._channels])
        self._status_channel = grpc.aio.insecure_channel(address, options=plain_options())

    async def retrieve(
        self,
        features: Features,
        k: int = 10,
        *,
        excluded_item_ids: Sequence[str] = (),
        min_shards: int = 0,
        attribute_names: Sequence[str] = (),
        filter: Filter | None = None,  # noqa: A002
        timeout_s: float | None = None,
    ) -> Retrieval:
        """Finds the k best items for one query.

        Args:
            features: Raw features by name.
            k: How many items, at least 1.
            excluded_item_ids: Items that must not be returned.
            min_shards: Fail with `UnavailableError` when fewer shards than this answer. Where the catalogue has fewer,
                all of them. 0: any one will do, and where none answers, an earlier answer or popular items.
            attribute_names: Catalogue columns to return with each item.
            filter: Only items that meet this are returned.
            timeout_s: Deadline of this call.

        Raises:
            InvalidRequestError: the request is wrong; the message names the field or the feature.
            UnavailableError: the service cannot be reached or too few shards answered.
            DeadlineExceededError: the answer was not there in time.
            RetrievalError: any other status.
            TypeError: a value that cannot be a feature; the message names it.
            ValueError: a number that is not finite or too large to be sent exactly.
        """
        request = retrieve_request(features, k, excluded_item_ids, min_shards, attribute_names, filter)
        return retrieval_of(await self._call(self._stub().Retrieve, request, timeout_s))

    async def batch_retrieve(
        self,
        queries: Sequence[Features],
        k: int = 10,
        *,
        excluded_item_ids: Sequence[str] = (),
        min_shards: int = 0,
        attribute_names: Sequence[str] = (),
        filter: Filter | None = None,  # noqa: A002
        timeout_s: float | None = None,
    ) -> tuple[Retrieval, ...]:
        """Finds the k best items for each of many queries in one call, all at one checkpoint version.

        Arguments and errors as of `retrieve`; the items excluded and the filter are the same for all queries.
        """
        request = batch_retrieve_request(queries, k, excluded_item_ids, min_shards, attribute_names, filter)
        return retrievals_of(await self._call(self._stub().BatchRetrieve, request, timeout_s))

    async def retrieve_all(
        self,
        queries: Iterable[Features],
        k: int = 10,
        *,
        excluded_item_ids: Sequence[str] = (),
        min_shards: int = 0,
        attribute_names: Sequence[str] = (),
        filter: Filter | None = None,  # noqa: A002
        batch_size: int = 64,
        timeout_s: float | None = None,
    ) -> AsyncIterator[Retrieval]:
        """Finds the k best items for each of any number of queries, cut into batches, a few of which are under way.

        The fastest way through many queries that ask alike. Each batch is at one checkpoint version, and its first
        query that fails ends it all: where queries may be wrong or exclude items of their own, use `stream_retrieve`.

        Args:
            queries: Raw features by name; taken as the answers are.
            k: How many items, at least 1.
            excluded_item_ids: Items that must not be returned for any query.
            min_shards: As of `retrieve`.
            attribute_names: Catalogue columns to return with each item.
            filter: Only items that meet this are returned.
            batch_size: Queries of one call.
            timeout_s: Deadline of each call.

        Returns:
            The answers in the order of the queries.

        Raises:
            RetrievalError: as of `batch_retrieve`; the message says where the batch begins.
            TypeError: as of `retrieve`.
            ValueError: likewise, or `batch_size` is below 1.
        """
        under_way: deque[asyncio.Task[tuple[Retrieval, ...]]] = deque()

        async def ask(start: int, request: query_service_pb2.BatchRetrieveRequest) -> tuple[Retrieval, ...]:
            limit_s = self._timeout_s if timeout_s is None else timeout_s
            try:
                return retrievals_of(
                    await self._stub().BatchRetrieve(request, timeout=limit_s, metadata=self._metadata)
                )
            except grpc.aio.AioRpcError as error:
                raise error_of_batch(start, error.code(), error.details()) from error

        try:
            for start, batch in batches(queries, batch_size):
                request = batch_retrieve_request(batch, k, excluded_item_ids, min_shards, attribute_names, filter)
                under_way.append(asyncio.create_task(ask(start, request)))
                if len(under_way) == MAX_CALLS:
                    for answer in await under_way.popleft():
                        yield answer
            while under_way:
                for answer in await under_way.popleft():
                    yield answer
        finally:
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)

    def stream_retrieve(
        self,
        queries: Iterable[Features | StreamedQuery] | AsyncIterable[Features | StreamedQuery],
        k: int = 10,
        *,
        excluded_item_ids: Sequence[str] = (),
        min_shards: int = 0,
        attribute_names: Sequence[str] = (),
        filter: Filter | None = None,  # noqa: A002
    ) -> AsyncIterator[Retrieval | RetrievalError]:
        """Finds the k best items for each query of a long list, one answer after another in the order of the queries.

        For back-fills: queries are taken from the iterator no faster than the service answers, and where a replica
        goes, the rest is asked of another one. A new version that goes live in the middle changes the later answers:
        each says its `checkpoint_version`.

        Args:
            queries: Raw features by name; `StreamedQuery` where a query has exclusions of its own.
            k: How many items, at least 1.
            excluded_item_ids: Items that must not be returned for any query.
            min_shards: As of `retrieve`.
            attribute_names: Catalogue columns to return with each item.
            filter: Only items that meet this are returned.

        Returns:
            For each query its answer, or the error that it failed with; the others go on.

        Raises:
            UnavailableError: no replica could be reached, several times in a row.
            RetrievalError: the stream as a whole failed.
            TypeError: a value that cannot be a feature, once the answers to the queries before it have come.
            ValueError: a number that is not finite or too large to be sent exactly, likewise.
        """

        async def requests() -> AsyncIterator[query_service_pb2.StreamRetrieveRequest]:
            number = 0
            async for query in _each(queries):
                yield stream_request(number, query, k, excluded_item_ids, min_shards, attribute_names, filter)
                number += 1

        return AsyncStream(partial(self._stub().StreamRetrieve, metadata=self._metadata), requests()).outcomes()

    async def explain(
        self,
        features: Features,
        item_id: str,
        k: int = 10,
        *,
        excluded_item_ids: Sequence[str] = (),
        filter: Filter | None = None,  # noqa: A002
        checkpoint_version: int | None = None,
        timeout_s: float | None = None,
    ) -> Explanation:
        """Says why an item is, or is not, among the k best for a query: "why is this item not here".

        Give the same query, k, exclusions and filter as to the `retrieve` whose answer surprised. Slower than that:
        it scores every item, so give it more time.

        Args:
            features: Raw features by name.
            item_id: The item; one that the catalogue does not hold is an answer, not an error.
            k: How many items were asked for.
            excluded_item_ids: Items that were excluded.
            filter: The filter that there was.
            checkpoint_version: The version whose answer is to be explained, live or standing by; None: the live one.
            timeout_s: Deadline of this call.

        Raises:
            RetrievalError: as of `retrieve`; UNAVAILABLE where one shard does not answer.
        """
        request = explain_request(features, item_id, k, excluded_item_ids, filter, checkpoint_version)
        return explanation_of(await self._call(self._stub().Explain, request, timeout_s))

    async def embed(self, queries: Sequence[Features], *, timeout_s: float | None = None) -> Embeddings:
        """Returns the embeddings of queries. Errors as of `retrieve`."""
        return embeddings_of(await self._call(self._stub().Embed, embed_request(queries), timeout_s))

    async def get_status(self, *, timeout_s: float | None = None) -> ServiceStatus:
        """Returns what this replica serves.

        Raises:
            RetrievalError: the service did not answer.
        """
        stub = query_service_pb2_grpc.QueryServiceStub(self._status_channel)
        return status_of(await self._call(stub.GetStatus, query_service_pb2.GetStatusRequest(), timeout_s))

    async def close(self) -> None:
        """Disconnects."""
        await asyncio.gather(*(channel.close() for channel in (*self._channels, self._status_channel)))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def _stub(self) -> "query_service_pb2_grpc.QueryServiceAsyncStub":
        """That of the next connection."""
        return next(self._stubs)

    async def _call(
        self, method: _Method[_Request, _Response], request: _Request, timeout_s: float | None
    ) -> _Response:
        try:
            limit_s = self._timeout_s if timeout_s is None else timeout_s
            return await method(request, timeout=limit_s, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise error_of(error.code(), error.details()) from error


async def _each(
    queries: Iterable[Features | StreamedQuery] | AsyncIterable[Features | StreamedQuery],
) -> AsyncIterator[Features | StreamedQuery]:
    if isinstance(queries, AsyncIterable):
        async for query in queries:
            yield query
    else:
        for query in queries:
            yield query
