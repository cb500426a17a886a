"""Which indexes are in memory: exactly those of the versions that the deployment record names for this layout.

Deliberately does not know how an index is obtained or changed, nor who searches it.

What it guarantees:

1. A version that the record omits takes no new request at once; its index goes when the last request that holds it
   ends, and nothing is loaded before that, so that two versions at most are resident.
2. One version is loaded at a time: the live one before the standby, and both before an index that is only replaced.
   A load that the newest record does not name is cancelled, so of many versions staged in a row the last is loaded.
3. A request holds one view from beginning to end. Changes, and a new index, are swapped in between requests, and the
   catalogue that is searched never goes back in time.
4. A failure keeps what there is: the version goes on answering at the catalogue it has.
5. A failure is tried again, later each time, and at once when the record changes.
"""

import asyncio
import enum
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from index_service.live import LiveView
from index_service.load import LoadedIndex
from index_service.memory import trim
from index_service.order import CorruptCheckpointError
from towers.deployment import NO_DEPLOYMENT, Deployment
from towers.errors import ConflictError, TwoTowerError, VersionNotLoadedError

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
    """Why it failed; of an available version, why it does not follow the catalogue."""
    is_corrupt: bool
    """Whether it failed because the checkpoint itself is at fault."""
    progress: float
    """Share of the work done, from 0 to 1."""
    loaded: LoadedIndex | None


class Loader(Protocol):
    """Where indexes come from."""

    async def load(
        self,
        checkpoint_version: int,
        catalogue_version: str,
        replaced: LoadedIndex | None,
        report: Callable[[float], None],
    ) -> LoadedIndex:
        """Obtains an index, newer than the one to be replaced; `report` is told the progress of a build."""

    async def catch_up(self, loaded: LoadedIndex) -> bool:
        """Applies what has changed in the catalogue; false when the index is to be replaced instead."""

    async def save_delta(self, loaded: LoadedIndex) -> None:
        """Keeps what changed since an index was built, for the next load."""

    async def prune(self, checkpoint_version: int, created_before: datetime) -> None:
        """Deletes a checkpoint's stored indexes that are older than a moment."""

    async def prune_others(self, checkpoint_versions: Collection[int]) -> None:
        """Deletes stored indexes of old checkpoints that are none of these."""


class _Resident:
    """An index in memory, and how many requests hold it."""

    def __init__(self, loaded: LoadedIndex) -> None:
        self.loaded: LoadedIndex | None = loaded
        self.num_pins = 0


class _Attempts:
    """How it went to do one thing for one version, and when it may be tried again."""

    def __init__(self) -> None:
        self.failure = ""
        self.is_corrupt = False
        self.retry_at_s = 0.0
        self._num_failures = 0

    def try_soon(self) -> None:
        self._num_failures = 0
        self.retry_at_s = 0.0

    def succeed(self) -> None:
        self.failure = ""
        self.is_corrupt = False
        self.try_soon()

    def fail(self, version: int, error: Exception) -> None:
        is_expected = isinstance(error, TwoTowerError)
        reason = str(error) if is_expected else "internal error; see the shard's log"
        self.retry_at_s = time.monotonic() + min(FIRST_RETRY_S * 2**self._num_failures, LAST_RETRY_S)
        self._num_failures += 1
        if reason != self.failure:
            _log.warning(
                "checkpoint %d: %s; will be tried again", version, reason, exc_info=None if is_expected else error
            )
        self.failure = reason
        self.is_corrupt = isinstance(error, CorruptCheckpointError)


class _Version:
    """One version that the record names, or that requests still hold."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.is_wanted = True
        self.resident: _Resident | None = None
        self.is_loading = False
        self.build_progress: float | None = None
        self.loads = _Attempts()
        self.updates = _Attempts()
        self.must_be_replaced = False
        """Whether its index cannot catch up with the catalogue."""
        self.caught_up_with: str | None = None
        """The newest state of the catalogue that was known when its index last caught up."""
        self.changing = asyncio.Lock()
        """Held while changes are applied, and while one index takes the place of another."""

    @property
    def loaded(self) -> LoadedIndex | None:
        return self.resident.loaded if self.resident is not None else None

    def try_soon(self) -> None:
        self.loads.try_soon()
        self.updates.try_soon()


class Versions:
    """The indexes in memory. Belongs to one event loop; its methods are called from there."""

    def __init__(
        self, loader: Loader, num_shards: int, rebuild_share: float, on_change: Callable[[], Awaitable[None]]
    ) -> None:
        """Starts with nothing.

        Args:
            loader: Where indexes come from.
            num_shards: The layout that this shard is part of; versions that are served on another are not loaded.
            rebuild_share: Share of an index that live updates may change before it is built anew.
            on_change: Awaited after each change of what is available.
        """
        self.deployment: Deployment = NO_DEPLOYMENT
        self._loader = loader
        self._num_shards = num_shards
        self._rebuild_share = rebuild_share
        self._on_change = on_change
        self._versions: dict[int, _Version] = {}
        self._replaced: list[_Resident] = []
        """Indexes that gave way to newer ones and that requests still hold."""
        self._being_freed: set[asyncio.Task[None]] = set()
        self._catalogue_version: str | None = None
        self._catalogue_problem = ""
        self._load: tuple[_Version, asyncio.Task[None]] | None = None
        self._changed = asyncio.Event()
        self._catalogue_changed = asyncio.Event()
        self._updated = asyncio.Event()

    @property
    def _wanted(self) -> tuple[int, ...]:
        """Versions that the record names for this layout, live first."""
        return self.deployment.versions_on(self._num_shards)

    def follow(self, deployment: Deployment) -> None:
        """Takes a deployment record as the truth."""
        self.deployment = deployment
        for version in list(self._versions.values()):
            version.is_wanted = version.version in self._wanted
            version.try_soon()
            self._unload_if_done(version)
        for number in self._wanted:
            self._versions.setdefault(number, _Version(number))
        if self._load is not None:
            version, task = self._load
            is_missing = any(self._versions[number].resident is None for number in self._wanted)
            # What is only replaced goes on answering, so it makes way for what cannot answer yet.
            if not version.is_wanted or (version.resident is not None and is_missing):
                task.cancel()
        self._changed.set()

    def follow_catalogue(self, catalogue_version: str) -> None:
        """Takes a state of the catalogue as the newest."""
        self._catalogue_problem = ""
        if catalogue_version != self._catalogue_version:
            self._catalogue_version = catalogue_version
            for version in self._versions.values():
                version.updates.try_soon()
            self._changed.set()
            self._catalogue_changed.set()

    def report_catalogue_problem(self, problem: str) -> None:
        """Says why the catalogue's state is not known; the last known one stays."""
        self._catalogue_problem = problem

    @contextmanager
    def pin(self, version: int) -> Iterator[LiveView]:
        """Holds the index of a version, at the state of the catalogue that it has now.

        Raises:
            VersionNotLoadedError: the version is not available here.
        """
        held = self._versions.get(version)
        if held is None or held.resident is None or held.loaded is None or not held.is_wanted:
            available = sorted(other.version for other in self._versions.values() if other.loaded and other.is_wanted)
            raise VersionNotLoadedError(f"checkpoint_version {version} is not loaded; loaded: {available}")
        with self._holding(held, held.resident):
            yield held.loaded.live.view

    @property
    def is_ready(self) -> bool:
        """Whether the first version that concerns this layout, the live one if it does, can be searched."""
        first = self._versions.get(next(iter(self._wanted), 0))
        return first is not None and first.loaded is not None

    def statuses(self) -> list[VersionStatus]:
        """All versions in memory or on their way there, oldest first."""
        return [self._status(self._versions[number]) for number in sorted(self._versions)]

    async def run(self) -> None:
        """Loads what is wanted and follows the catalogue, until cancelled; a load in progress is then cancelled too."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._keep_loading())
                group.create_task(self._keep_up())
                group.create_task(self._keep_saving())
        finally:
            if self._load is not None:
                self._load[1].cancel()
                await asyncio.wait((self._load[1],))

    @contextmanager
    def _holding(self, version: _Version, resident: _Resident) -> Iterator[None]:
        resident.num_pins += 1
        try:
            yield
        finally:
            resident.num_pins -= 1
            self._unload_if_done(version)
            if resident in self._replaced and not resident.num_pins:
                self._replaced.remove(resident)
                self._free(resident)

    async def _keep_loading(self) -> None:
        while True:
            self._changed.clear()
            wait_s = self._start_next(time.monotonic())
            await self._on_change()
            await _wait(self._changed, wait_s)

    def _start_next(self, now_s: float) -> float | None:
        """Starts the load that is due, unless one must wait; else the seconds until one is due, if ever."""
        is_memory_given_back = not self._being_freed and not self._replaced
        is_waiting = not is_memory_given_back or any(not version.is_wanted for version in self._versions.values())
        if is_waiting or self._catalogue_version is None or (self._load is not None and not self._load[1].done()):
            return None
        wanted = [self._versions[number] for number in self._wanted]
        missing = [version for version in wanted if version.resident is None]
        outdated = [version for version in wanted if version.resident is not None and self._is_outdated(version)]
        waits_s = []
        for version in (*missing, *outdated):
            if version.loads.retry_at_s <= now_s:
                task = asyncio.create_task(self._load_one(version, self._catalogue_version))
                task.add_done_callback(lambda _: self._changed.set())
                self._load = (version, task)
                return None
            waits_s.append(version.loads.retry_at_s - now_s)
        return min(waits_s, default=None)

    def _is_outdated(self, version: _Version) -> bool:
        loaded = version.loaded
        return version.must_be_replaced or (loaded is not None and loaded.live.needs_rebuild(self._rebuild_share))

    async def _load_one(self, version: _Version, catalogue_version: str) -> None:
        replaced = version.loaded.manifest.created if version.loaded is not None else None
        version.is_loading = True
        try:
            await self._obtain(version, catalogue_version)
        except Exception as error:
            version.loads.fail(version.version, error)
            return
        finally:
            version.is_loading = False
            version.build_progress = None
        await self._prune(version.version, replaced)

    async def _obtain(self, version: _Version, catalogue_version: str) -> None:
        def report(progress: float) -> None:
            version.build_progress = progress

        loaded = await self._loader.load(version.version, catalogue_version, version.loaded, report)
        # It takes its place once it has all that the one before it has.
        async with version.changing:
            known = self._catalogue_version
            if not await self._loader.catch_up(loaded):
                raise ConflictError("the catalogue was rewritten while the index was loaded")
            replaced, version.resident = version.resident, _Resident(loaded)
            version.caught_up_with = known
        version.must_be_replaced = False
        version.loads.succeed()
        version.updates.succeed()
        if replaced is not None and replaced.num_pins:
            self._replaced.append(replaced)
        elif replaced is not None:
            self._free(replaced)
        self._catalogue_changed.set()  # It may have moved on since.
        manifest = loaded.manifest
        _log.info(
            "%s is available: %d items, %d quarantined, %s, %s",
            loaded.live.base,
            manifest.num_items,
            manifest.num_quarantined,
            manifest.index_type,
            "from the store" if loaded.is_from_store else "built here",
        )

    async def _prune(self, version: int, replaced: datetime | None) -> None:
        """The index just replaced, by the moment of its build, stays in the store for replicas that are behind."""
        try:
            if replaced is not None:
                await self._loader.prune(version, replaced)
            await self._loader.prune_others(self.deployment.versions)
        except TwoTowerError as error:
            _log.warning("old indexes stay in the store: %s", error)

    async def _keep_up(self) -> None:
        while True:
            self._catalogue_changed.clear()
            now_s = time.monotonic()
            behind = [version for version in self._versions.values() if self._is_behind(version)]
            for version in behind:
                if version.updates.retry_at_s <= now_s:
                    await self._update(version)
            waits_s = [version.updates.retry_at_s - now_s for version in behind if self._is_behind(version)]
            await _wait(self._catalogue_changed, min(waits_s, default=None))

    def _is_behind(self, version: _Version) -> bool:
        loaded = version.loaded
        is_following = loaded is not None and version.is_wanted and not version.must_be_replaced
        return is_following and version.caught_up_with != self._catalogue_version

    async def _update(self, version: _Version) -> None:
        async with version.changing:
            resident, known = version.resident, self._catalogue_version
            if resident is None or resident.loaded is None:
                return
            with self._holding(version, resident):
                try:
                    version.must_be_replaced = not await self._loader.catch_up(resident.loaded)
                except Exception as error:
                    version.updates.fail(version.version, error)
                    return
        version.caught_up_with = known
        version.updates.succeed()
        self._updated.set()
        if self._is_outdated(version):
            self._changed.set()

    async def _keep_saving(self) -> None:
        while True:
            await self._updated.wait()
            self._updated.clear()
            for version in list(self._versions.values()):
                resident = version.resident
                if resident is None or resident.loaded is None or not resident.loaded.live.is_worth_saving():
                    continue
                with self._holding(version, resident):
                    try:
                        await self._loader.save_delta(resident.loaded)
                    except Exception as error:  # It is worth no answer.
                        exc_info = None if isinstance(error, TwoTowerError) else error
                        _log.warning(
                            "checkpoint %d: a restart will take longer: %s", version.version, error, exc_info=exc_info
                        )

    def _unload_if_done(self, version: _Version) -> None:
        resident = version.resident
        is_held = resident is not None and resident.num_pins
        if version.is_wanted or is_held or self._versions.get(version.version) is not version:
            return
        del self._versions[version.version]
        _log.info("checkpoint %d is unloaded", version.version)
        if resident is not None:
            self._free(resident)
        self._changed.set()

    def _free(self, resident: _Resident) -> None:
        """Gives an index's memory back, off the event loop; nothing is loaded before that is done."""

        async def free() -> None:
            # The request that held it last ends in this turn of the loop, and with it the last of its references.
            await asyncio.sleep(0)
            await asyncio.to_thread(_give_back, resident)

        task = asyncio.create_task(free())
        self._being_freed.add(task)
        task.add_done_callback(self._freed)

    def _freed(self, task: asyncio.Task[None]) -> None:
        self._being_freed.discard(task)
        self._changed.set()

    def _status(self, version: _Version) -> VersionStatus:
        reason = ""
        progress = 0.0
        if not version.is_wanted:
            state = State.UNLOADING
        elif version.loaded is not None:
            state = State.AVAILABLE
            progress = 1.0
            failure = version.updates.failure or version.loads.failure
            reason = f"its refresh failed: {failure}" if failure else ""
        elif version.build_progress is not None:
            state = State.BUILDING
            progress = version.build_progress
        elif version.loads.failure and not version.is_loading:
            state = State.FAILED
            reason = version.loads.failure
        elif self._catalogue_version is None and self._catalogue_problem:
            state = State.FAILED
            reason = self._catalogue_problem
        else:
            state = State.LOADING
        is_corrupt = state is State.FAILED and version.loads.is_corrupt
        return VersionStatus(version.version, state, reason, is_corrupt, progress, version.loaded)


async def _wait(event: asyncio.Event, wait_s: float | None) -> None:
    """Waits until something happens, or for so many seconds."""
    with suppress(TimeoutError):
        async with asyncio.timeout(wait_s):
            await event.wait()


def _give_back(resident: _Resident) -> None:
    """Drops an index, and what the allocator would keep of it."""
    resident.loaded = None
    trim()
