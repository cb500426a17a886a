"""Which indexes are in memory: exactly those of the versions that the deployment record names.

Deliberately does not know how an index is obtained, nor who searches it.

What it guarantees:

1. A version that the record omits takes no new request at once; its index goes when the last request that holds it
   ends. Omission never waits for a load, so that two versions at most are resident.
2. One version is loaded at a time, the live one before the standby.
3. A request holds one index from beginning to end. A new catalogue is swapped in between requests.
4. A failure keeps what there is: the version goes on answering at the catalogue it has.
5. A failure is tried again, later each time, and at once when the record or the catalogue changes.
"""

import asyncio
import enum
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from index_service.load import LoadedIndex
from index_service.order import CorruptCheckpointError
from index_service.shard import ShardIndex
from towers.deployment import NO_DEPLOYMENT, Deployment
from towers.errors import TwoTowerError, VersionNotLoadedError

FIRST_RETRY_S = 0.5
LAST_RETRY_S = 10.0

_log = logging.getLogger(__name__)


class State(enum.Enum):
    """Life of a version; the names are those of the protocol."""

    BUILDING = enum.auto()
    LOADING = enum.auto()
    AVAILABLE = enum.auto()
    UNLOADING = enum.auto()
    FAILED = enum.auto()


@dataclass(frozen=True)
class VersionStatus:
    """What there is to say about one version."""

    version: int
    state: State
    reason: str
    """Why it failed; of an available version, why its refresh failed."""
    is_corrupt: bool
    """Whether it failed because the checkpoint itself is at fault."""
    progress: float
    """Share of the work done, from 0 to 1."""
    loaded: LoadedIndex | None


class Loader(Protocol):
    """Where indexes come from."""

    async def load(
        self, checkpoint_version: int, catalogue_version: str, report: Callable[[float], None]
    ) -> LoadedIndex:
        """Obtains an index; `report` is told the progress of a build."""

    async def prune(self, checkpoint_version: int, created_before: datetime) -> None:
        """Deletes a checkpoint's stored indexes that are older than a moment."""


class _Version:
    """One version that the record names, or that requests still hold."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.is_wanted = True
        self.loaded: LoadedIndex | None = None
        self.num_pins = 0
        self.is_loading = False
        self.build_progress: float | None = None
        self.failure = ""
        self.is_corrupt = False
        self.num_failures = 0
        self.retry_at = 0.0

    def try_soon(self) -> None:
        self.num_failures = 0
        self.retry_at = 0.0


class Versions:
    """The indexes in memory. Belongs to one event loop; its methods are called from there."""

    def __init__(self, loader: Loader, on_change: Callable[[], Awaitable[None]]) -> None:
        """Starts with nothing.

        Args:
            loader: Where indexes come from.
            on_change: Awaited after each change of what is available.
        """
        self.deployment: Deployment = NO_DEPLOYMENT
        self._loader = loader
        self._on_change = on_change
        self._versions: dict[int, _Version] = {}
        self._catalogue_version: str | None = None
        self._catalogue_problem = ""
        self._load: tuple[int, asyncio.Task[None]] | None = None
        self._changed = asyncio.Event()

    def follow(self, deployment: Deployment) -> None:
        """Takes a deployment record as the truth."""
        self.deployment = deployment
        for version in list(self._versions.values()):
            version.is_wanted = version.version in deployment.versions
            version.try_soon()
            self._drop_if_done(version)
        for number in deployment.versions:
            self._versions.setdefault(number, _Version(number))
        if self._load is not None and self._load[0] not in deployment.versions:
            self._load[1].cancel()
        self._changed.set()

    def follow_catalogue(self, catalogue_version: str) -> None:
        """Takes a state of the catalogue as the newest."""
        self._catalogue_problem = ""
        if catalogue_version != self._catalogue_version:
            self._catalogue_version = catalogue_version
            for version in self._versions.values():
                version.try_soon()
            self._changed.set()

    def report_catalogue_problem(self, problem: str) -> None:
        """Says why the catalogue's state is not known; the last known one stays."""
        self._catalogue_problem = problem

    @contextmanager
    def pin(self, version: int) -> Iterator[ShardIndex]:
        """Holds the index of a version.

        Raises:
            VersionNotLoadedError: the version is not available here.
        """
        held = self._versions.get(version)
        if held is None or held.loaded is None or not held.is_wanted:
            available = sorted(other.version for other in self._versions.values() if other.loaded and other.is_wanted)
            raise VersionNotLoadedError(f"checkpoint_version {version} is not loaded; loaded: {available}")
        held.num_pins += 1
        try:
            yield held.loaded.index
        finally:
            held.num_pins -= 1
            self._drop_if_done(held)

    @property
    def is_live_available(self) -> bool:
        """Whether the live version can be searched."""
        live = self._versions.get(self.deployment.live_version or 0)
        return live is not None and live.loaded is not None

    def statuses(self) -> list[VersionStatus]:
        """All versions in memory or on their way there, oldest first."""
        return [self._status(self._versions[number]) for number in sorted(self._versions)]

    async def run(self) -> None:
        """Loads what is wanted, until cancelled; a load in progress is then cancelled too."""
        try:
            while True:
                self._changed.clear()
                wait_s = self._start_next(time.monotonic())
                await self._on_change()
                with suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await self._changed.wait()
        finally:
            if self._load is not None:
                self._load[1].cancel()
                await asyncio.wait((self._load[1],))

    def _start_next(self, now_s: float) -> float | None:
        """Starts the load that is due, unless one is in progress; else the seconds until one is due, if ever."""
        if self._load is not None and not self._load[1].done():
            return None
        waits_s = []
        for number in self.deployment.versions:
            version = self._versions[number]
            if self._catalogue_version is None or self._catalogue_version == _catalogue_of(version):
                continue
            if version.retry_at <= now_s:
                task = asyncio.create_task(self._load_one(version, self._catalogue_version))
                task.add_done_callback(lambda _: self._changed.set())
                self._load = (number, task)
                return None
            waits_s.append(version.retry_at - now_s)
        return min(waits_s, default=None)

    async def _load_one(self, version: _Version, catalogue_version: str) -> None:
        def report(progress: float) -> None:
            version.build_progress = progress

        replaced = version.loaded
        version.is_loading = True
        try:
            loaded = await self._loader.load(version.version, catalogue_version, report)
        except Exception as error:
            self._fail(version, error)
        else:
            self._swap(version, loaded)
        finally:
            version.is_loading = False
            version.build_progress = None
        if replaced is not None and replaced is not version.loaded:
            await self._prune(version.version, replaced.index.manifest.created)

    def _swap(self, version: _Version, loaded: LoadedIndex) -> None:
        # Requests in flight hold the old index themselves; it is freed at the last reference.
        version.loaded = loaded
        version.failure = ""
        version.try_soon()
        manifest = loaded.index.manifest
        _log.info(
            "%s is available: %d items, %d quarantined, %s, %s",
            loaded.index,
            manifest.num_items,
            manifest.num_quarantined,
            manifest.index_type,
            "from the store" if loaded.is_from_store else "built here",
        )

    async def _prune(self, version: int, created_before: datetime) -> None:
        """The index just replaced stays in the store, for replicas that are a poll behind."""
        try:
            await self._loader.prune(version, created_before)
        except TwoTowerError as error:
            _log.warning("old indexes of checkpoint %d stay in the store: %s", version, error)

    def _fail(self, version: _Version, error: Exception) -> None:
        is_expected = isinstance(error, TwoTowerError)
        reason = str(error) if is_expected else "internal error; see the shard's log"
        wait_s = min(FIRST_RETRY_S * 2**version.num_failures, LAST_RETRY_S)
        version.num_failures += 1
        version.retry_at = time.monotonic() + wait_s
        if reason != version.failure:
            _log.warning(
                "checkpoint %d: %s; will be tried again",
                version.version,
                reason,
                exc_info=None if is_expected else error,
            )
        version.failure = reason
        version.is_corrupt = isinstance(error, CorruptCheckpointError)

    def _drop_if_done(self, version: _Version) -> None:
        if version.is_wanted or version.num_pins or self._versions.get(version.version) is not version:
            return
        del self._versions[version.version]
        _log.info("checkpoint %d is unloaded", version.version)

    def _status(self, version: _Version) -> VersionStatus:
        reason = ""
        progress = 0.0
        if not version.is_wanted:
            state = State.UNLOADING
        elif version.loaded is not None:
            state = State.AVAILABLE
            progress = 1.0
            reason = f"its refresh failed: {version.failure}" if version.failure else ""
        elif version.build_progress is not None:
            state = State.BUILDING
            progress = version.build_progress
        elif version.failure and not version.is_loading:
            state = State.FAILED
            reason = version.failure
        elif self._catalogue_version is None and self._catalogue_problem:
            state = State.FAILED
            reason = self._catalogue_problem
        else:
            state = State.LOADING
        is_corrupt = state is State.FAILED and version.is_corrupt
        return VersionStatus(version.version, state, reason, is_corrupt, progress, version.loaded)


def _catalogue_of(version: _Version) -> str | None:
    return version.loaded.index.manifest.catalogue_version if version.loaded is not None else None
