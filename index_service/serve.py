"""One shard replica as a process: follows the deployment record and the catalogue, and answers.

Deliberately does not know what a search is.
"""

import asyncio
import logging
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Generic, TypeVar

from retrieval.index.v1 import index_service_pb2_grpc

from index_service.catalogue_service import CatalogServicer
from index_service.load import IndexLoader
from index_service.memory import return_freed_memory
from index_service.service import SERVICE_NAME, IndexServicer, search_executor
from index_service.settings import IndexSettings
from index_service.versions import Versions
from towers import event_loop
from towers.catalogue import Catalogue
from towers.deployment import Deployment, DeploymentStore
from towers.errors import TwoTowerError
from towers.rpc import RpcServer, until_stopped
from towers.store import Store

CATALOGUE_POLL_S = 0.1
_BACKGROUND_NICENESS = 10
"""Of the threads that read the change log, embed, load and save: searches come first where cores are few."""
_NO_CATALOGUE = "the catalogue is not loaded; load it: twotower catalog load items.parquet"

_Value = TypeVar("_Value")
_log = logging.getLogger(__name__)


def run(settings: IndexSettings) -> None:
    """Serves until SIGTERM or SIGINT, then drains.

    Raises:
        InvalidInputError: the store's URL is not valid, or the address cannot be bound.
    """
    event_loop.run(_serve(settings))


async def _serve(settings: IndexSettings) -> None:
    return_freed_memory()
    asyncio.get_running_loop().set_default_executor(
        ThreadPoolExecutor(thread_name_prefix="background", initializer=_yield_to_searches)
    )
    stopped = asyncio.create_task(until_stopped())
    store = Store(settings.store)
    server = RpcServer(
        settings.address, SERVICE_NAME, drain_s=settings.drain_s, grace_s=settings.grace_s, reflect=settings.reflection
    )
    loader = IndexLoader(store, settings.shard, settings.num_shards, settings.goal, settings.filterable)
    versions = Versions(
        loader, settings.num_shards, settings.rebuild_share, lambda: server.set_ready(versions.is_ready)
    )
    # More threads than cores would only make searches wait for each other.
    with search_executor(_num_cores()) as executor:
        index_service_pb2_grpc.add_IndexServiceServicer_to_server(
            IndexServicer(versions, executor, settings.shard, settings.num_shards), server.grpc
        )
        index_service_pb2_grpc.add_CatalogServiceServicer_to_server(CatalogServicer(Catalogue(store)), server.grpc)
        await server.start()
        tasks = (
            asyncio.create_task(versions.run()),
            asyncio.create_task(_follow_deployment(store, versions, settings.poll_interval_s)),
            asyncio.create_task(_follow_catalogue(store, versions)),
        )
        await asyncio.wait((stopped, *tasks), return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        await server.drain_and_stop()
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    _log.info("shard %d of %d has stopped", settings.shard, settings.num_shards)


def _yield_to_searches() -> None:
    # Elsewhere a thread has no priority of its own.
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _BACKGROUND_NICENESS)


def _num_cores() -> int:
    """Cores that this process may use, fewer than the machine has in a container."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


async def _follow_deployment(store: Store, versions: Versions, interval_s: float) -> None:
    records = DeploymentStore(store)
    reader: _Reader[Deployment] = _Reader("the deployment record")
    while True:
        known = versions.deployment
        newest = await reader.read(partial(records.newer_than, known) if known.revision else records.current)
        if newest is not None and newest.revision > known.revision:
            _log.info(
                "deployment revision %d: live %s, standby %s",
                newest.revision,
                newest.live_version,
                newest.standby_version,
            )
            versions.follow(newest)
        await asyncio.sleep(interval_s)


async def _follow_catalogue(store: Store, versions: Versions) -> None:
    catalogue = Catalogue(store)
    reader: _Reader[str | None] = _Reader("the catalogue")
    while True:
        catalogue_version = await reader.read(catalogue.version)
        if catalogue_version is not None:
            versions.follow_catalogue(catalogue_version)
        else:
            versions.report_catalogue_problem(reader.problem or _NO_CATALOGUE)
        await asyncio.sleep(CATALOGUE_POLL_S)


class _Reader(Generic[_Value]):
    """Reads off the event loop. Where that fails, what is known stays; it is logged once, not at each poll."""

    def __init__(self, what: str) -> None:
        self.problem = ""
        self._what = what

    async def read(self, read: Callable[[], _Value]) -> _Value | None:
        """The value; None when it cannot be read, and `problem` says why."""
        try:
            value = await asyncio.to_thread(read)
        except Exception as error:  # Nothing that a store's client may raise is worth the versions in memory.
            problem = f"{self._what} cannot be read: {error}"
            if problem != self.problem:
                _log.warning("%s; what is loaded stays", problem, exc_info=not isinstance(error, TwoTowerError))
            self.problem = problem
            return None
        if self.problem:
            _log.info("%s can be read again", self._what)
        self.problem = ""
        return value
