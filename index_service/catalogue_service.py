"""The gRPC servicer that changes the catalogue: calls that come together are committed together.

Deliberately does not know what is indexed: every shard takes any item, and finds its own in the change log.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import pyarrow as pa
from retrieval.index.v1 import index_service_pb2, index_service_pb2_grpc

from index_service.item_message import table_of
from towers.catalogue import Catalogue, Delete, DeleteReport, Edit, Outcome, Upsert, UpsertReport
from towers.errors import InvalidInputError, OverloadedError, TwoTowerError

MAX_ITEMS = 10_000
"""Of one call."""
MAX_WAITING_ITEMS = 200_000
"""Of all calls that wait to be committed."""
_MAX_COMMITTED_ITEMS = 50_000
_COMMIT_INTERVAL_S = 0.1
"""From the start of one commit to the next: each costs every reader two small reads."""

_Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True)
class _Call:
    """A call that waits for its commit."""

    edit: Callable[[Mapping[str, pa.DataType]], Edit]
    """Makes the edit, given the types of the attributes in the catalogue."""
    num_items: int
    outcome: "asyncio.Future[UpsertReport | DeleteReport]"


class CatalogServicer(index_service_pb2_grpc.CatalogServiceServicer):
    """Writes to the catalogue. Belongs to one event loop."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._waiting: deque[_Call] = deque()
        self._num_waiting_items = 0
        self._committer: asyncio.Task[None] | None = None
        self._last_commit_s = -_COMMIT_INTERVAL_S

    async def UpsertItems(  # noqa: N802
        self,
        request: index_service_pb2.UpsertItemsRequest,
        context: _Context,  # noqa: ARG002
    ) -> index_service_pb2.UpsertItemsResponse:
        """Adds items, or replaces them with all their attributes."""
        _check_number("items", len(request.items))
        report = await self._committed(lambda types: Upsert(table_of(request.items, types)), len(request.items))
        assert isinstance(report, UpsertReport)
        return index_service_pb2.UpsertItemsResponse(
            num_items=report.num_items,
            num_duplicates=report.num_duplicates,
            catalogue_version=report.catalogue_version,
        )

    async def DeleteItems(  # noqa: N802
        self,
        request: index_service_pb2.DeleteItemsRequest,
        context: _Context,  # noqa: ARG002
    ) -> index_service_pb2.DeleteItemsResponse:
        """Deletes items; ids that the catalogue does not hold are allowed."""
        _check_number("item_ids", len(request.item_ids))
        report = await self._committed(lambda _: Delete(list(request.item_ids)), len(request.item_ids))
        return index_service_pb2.DeleteItemsResponse(
            num_items=report.num_items, catalogue_version=report.catalogue_version
        )

    async def _committed(
        self, edit: Callable[[Mapping[str, pa.DataType]], Edit], num_items: int
    ) -> UpsertReport | DeleteReport:
        if self._num_waiting_items + num_items > MAX_WAITING_ITEMS:
            raise OverloadedError(f"{self._num_waiting_items} items wait to be written; send more a little later")
        call = _Call(edit, num_items, asyncio.get_running_loop().create_future())
        self._waiting.append(call)
        self._num_waiting_items += num_items
        if self._committer is None or self._committer.done():
            self._committer = asyncio.create_task(self._commit_waiting())
        return await call.outcome

    async def _commit_waiting(self) -> None:
        while self._waiting:
            await asyncio.sleep(self._last_commit_s + _COMMIT_INTERVAL_S - time.monotonic())
            self._last_commit_s = time.monotonic()
            calls = self._taken()
            try:
                outcomes = await asyncio.to_thread(_commit, self._catalogue, [call.edit for call in calls])
            except Exception as error:  # None of these calls was written, and each must hear of it.
                outcomes = [error] * len(calls)
            for call, outcome in zip(calls, outcomes, strict=True):
                if call.outcome.cancelled():
                    continue
                if isinstance(outcome, Exception):
                    call.outcome.set_exception(outcome)
                else:
                    call.outcome.set_result(outcome)

    def _taken(self) -> list[_Call]:
        """The calls of the next commit, in their order; those whose caller has gone are dropped."""
        taken: list[_Call] = []
        num_items = 0
        while self._waiting and num_items < _MAX_COMMITTED_ITEMS:
            call = self._waiting.popleft()
            self._num_waiting_items -= call.num_items
            if not call.outcome.cancelled():
                taken.append(call)
                num_items += call.num_items
        return taken


def _commit(
    catalogue: Catalogue, makers: Sequence[Callable[[Mapping[str, pa.DataType]], Edit]]
) -> list[Outcome | Exception]:
    """One outcome for each edit; one that cannot be made hinders no other."""
    types = catalogue.attribute_types()
    made: list[Edit | TwoTowerError] = []
    for make in makers:
        try:
            made.append(make(types))
        except TwoTowerError as error:
            made.append(error)
    committed = iter(catalogue.commit([edit for edit in made if not isinstance(edit, TwoTowerError)]))
    return [edit if isinstance(edit, TwoTowerError) else next(committed) for edit in made]


def _check_number(name: str, number: int) -> None:
    if number == 0:
        raise InvalidInputError(f"{name}: send at least one")
    if number > MAX_ITEMS:
        raise InvalidInputError(f"{name}: {number}, more than {MAX_ITEMS}; send fewer at a time")
