"""The query towers in memory: one per version that the deployment record names, and which of them answers.

Deliberately does not know requests; a request takes a `Pin` and keeps it until its answer is made.
"""

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple, TypeGuard

from query_service.deadline import Deadline
from towers.checkpoint import TOWER_FILES, CheckpointStore
from towers.deployment import NO_DEPLOYMENT, Deployment, DeploymentStore
from towers.errors import CorruptArtefactError, InvalidInputError, NotReadyError, TwoTowerError
from towers.store import Store
from towers.tower import Tower

_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 30.0

_log = logging.getLogger(__name__)


class Place(NamedTuple):
    """A version on a layout: the same version may answer from two while a catalogue is re-sharded."""

    version: int
    num_shards: int


@dataclass(frozen=True)
class Pin:
    """One version, for encode, cache key and fan-out of one request.

    The tower lives for as long as anything refers to it: a version that the record names no longer goes when the last
    request that holds it ends.
    """

    version: int
    tower: Tower
    fingerprint: bytes
    """sha256 of the tower's file: two checkpoints with the same number, of two stores, differ."""
    num_shards: int
    """The layout whose shards answer."""
    tolerated_features: frozenset[str]
    """Features that this version does not know and another loaded one does."""

    @property
    def place(self) -> Place:
        """The version on its layout."""
        return Place(self.version, self.num_shards)


class TowerState(Enum):
    """Life of a tower."""

    LOADING = auto()
    AVAILABLE = auto()
    FAILED = auto()


@dataclass(frozen=True)
class TowerStatus:
    """State of one tower."""

    version: int
    state: TowerState
    reason: str
    """Why it failed; empty otherwise."""
    is_corrupt: bool
    """Whether it failed because the checkpoint itself is at fault: trying again cannot heal that."""
    golden_difference: float


@dataclass(frozen=True)
class _Loaded:
    tower: Tower
    fingerprint: bytes


@dataclass
class _Slot:
    version: int
    loaded: _Loaded | None = None
    failure: str = ""
    is_corrupt: bool = False
    loading: asyncio.Task[None] | None = field(default=None, repr=False)


class Versions:
    """Follows the deployment record.

    1. A pin is of the newest record's live version, on its layout, if its tower is loaded and its layout is known, else
       of what was adopted before.
    2. Versions that the record names are loaded, and tried again with growing pauses when they fail.
    3. Other versions are unloaded, save the adopted one.
    4. A store or record that cannot be read changes nothing.
    """

    def __init__(self, store: Store, poll_interval_s: float, layouts: Sequence[int]) -> None:
        """Nothing is read before `follow`.

        Args:
            store: Where records and checkpoints are.
            poll_interval_s: Pause between two looks at the record.
            layouts: The number of shards of each layout; a record that names none means the first.
        """
        self._deployments = DeploymentStore(store)
        self._checkpoints = CheckpointStore(store)
        self._poll_interval_s = poll_interval_s
        self._layouts = tuple(layouts)
        self._slots: dict[int, _Slot] = {}
        self._adopted: Pin | None = None
        self._problem = ""
        self._is_asked = asyncio.Event()
        self._askers: list[asyncio.Future[None]] = []
        self.deployment = NO_DEPLOYMENT
        """The newest record seen."""
        self.standby: Place | None = None
        """The record's other version, loaded or not; None when there is none beside the one that answers."""
        self.standby_pin: Pin | None = None
        """The same, where it can answer here: its tower is loaded and this service knows its layout."""
        self.canary_share = 0.0
        """Share of the requests that the standby version is to answer; 0 when there is none."""
        self.ready = asyncio.Event()
        """Set once a version answers."""

    @property
    def live(self) -> Pin | None:
        """The version that answers; None before the first."""
        return self._adopted

    @property
    def live_version(self) -> int | None:
        """Its number."""
        return self._adopted.version if self._adopted else None

    def pin(self) -> Pin:
        """The version that answers a request that arrives now.

        Raises:
            NotReadyError: no version is loaded yet.
        """
        if self._adopted is None:
            raise NotReadyError(f"no checkpoint version is loaded yet: {self._why_not_ready()}")
        return self._adopted

    async def refresh(self, deadline: Deadline) -> None:
        """Waits until the record has been read once more, beginning after this call, or until the deadline."""
        asked = asyncio.get_running_loop().create_future()
        self._askers.append(asked)
        self._is_asked.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(deadline.remaining_s()):
                await asked

    def statuses(self) -> list[TowerStatus]:
        """All towers, by version."""
        return [self._status(slot) for _, slot in sorted(self._slots.items())]

    async def follow(self) -> None:
        """Reads the record, again and again, until cancelled. The only reader, however many requests ask."""
        try:
            while True:
                self._is_asked.clear()
                askers, self._askers = self._askers, []
                try:
                    await self._read_record()
                finally:
                    for asker in askers:
                        if not asker.done():
                            asker.set_result(None)
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._poll_interval_s):
                        await self._is_asked.wait()
        finally:
            loading = [slot.loading for slot in self._slots.values() if slot.loading]
            for waiter in (*loading, *self._askers):
                waiter.cancel()
            await asyncio.gather(*loading, return_exceptions=True)

    async def _read_record(self) -> None:
        try:
            deployment = await asyncio.to_thread(self._newest_record)
        except Exception as error:  # Nothing that a store's client may raise is worth the towers in memory.
            if not self._problem:
                is_bug = not isinstance(error, TwoTowerError)
                _log.warning("the deployment record cannot be read, what is loaded stays: %s", error, exc_info=is_bug)
            self._problem = f"the deployment record cannot be read: {error}"
            return
        if self._problem:
            _log.info("the deployment record can be read again")
        self._problem = ""
        self.deployment = deployment
        self._settle()

    def _newest_record(self) -> Deployment:
        if self.deployment is NO_DEPLOYMENT:
            return self._deployments.current()
        return self._deployments.newer_than(self.deployment)

    def _settle(self) -> None:
        """Adopts, loads and unloads as the record says."""
        record = self.deployment
        live, standby = self._places()
        answering = self._adopted.place if self._adopted else None
        if live != answering and self._can_answer(live):
            _log.info("version %d answers from %d shards (deployment revision %d)", *live, record.revision)
            answering = live
        wanted = {*record.versions, answering.version if answering else None}
        for version in [version for version in self._slots if version not in wanted]:
            slot = self._slots.pop(version)
            if slot.loading:
                slot.loading.cancel()
            _log.info("version %d is unloaded", version)
        for version in record.versions:
            if version not in self._slots:
                slot = self._slots[version] = _Slot(version)
                slot.loading = asyncio.create_task(self._load_until_available(slot))
        self.standby = standby if standby != answering else None
        self.standby_pin = self._pin_at(self.standby) if self._can_answer(self.standby) else None
        self.canary_share = record.canary_share if self.standby else 0.0
        if answering:
            self._adopted = self._pin_at(answering)
            self.ready.set()

    def _places(self) -> list[Place | None]:
        """Where the record's live and standby versions are to answer."""
        return [
            Place(version, num_shards or self._layouts[0]) if version is not None else None
            for version, num_shards in (self.deployment.live, self.deployment.standby)
        ]

    def _can_answer(self, place: Place | None) -> TypeGuard[Place]:
        """Whether the version is loaded and this service knows the layout."""
        slot = self._slots.get(place.version) if place else None
        return place is not None and slot is not None and slot.loaded is not None and place.num_shards in self._layouts

    def _pin_at(self, place: Place) -> Pin:
        all_loaded = {version: slot.loaded for version, slot in self._slots.items() if slot.loaded}
        known = {
            version: {feature.name for feature in loaded.tower.encoder.features}
            for version, loaded in all_loaded.items()
        }
        return Pin(
            version=place.version,
            tower=all_loaded[place.version].tower,
            fingerprint=all_loaded[place.version].fingerprint,
            num_shards=place.num_shards,
            tolerated_features=frozenset().union(*known.values()) - known[place.version],
        )

    async def _load_until_available(self, slot: _Slot) -> None:
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                slot.loaded = await asyncio.to_thread(self._load, slot.version)
            except TwoTowerError as error:
                if str(error) != slot.failure:
                    _log.warning("version %d is refused, and tried again: %s", slot.version, error)
                slot.failure, slot.is_corrupt = str(error), isinstance(error, CorruptArtefactError | InvalidInputError)
            except Exception:
                _log.exception("version %d does not load, and is tried again", slot.version)
                slot.failure, slot.is_corrupt = "internal error; see the log", False
            else:
                _log.info("version %d is loaded", slot.version)
                slot.loading = None
                self._settle()
                return
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _load(self, version: int) -> _Loaded:
        files = self._checkpoints.load(version, "query")
        return _Loaded(Tower(files), bytes.fromhex(files.manifest.files[TOWER_FILES["query"]].sha256))

    def _why_not_ready(self) -> str:
        if self._problem:
            return self._problem
        live, _ = self._places()
        if live is None:
            return "no version is live; see twotower status"
        status = self._status(self._slots[live.version])
        return f"version {live.version}: {status.reason}" if status.reason else f"version {live.version} is loading"

    def _status(self, slot: _Slot) -> TowerStatus:
        if slot.loaded is None:
            state = TowerState.FAILED if slot.failure else TowerState.LOADING
            return TowerStatus(slot.version, state, slot.failure, slot.is_corrupt, 0.0)
        golden_difference = slot.loaded.tower.golden_difference
        for place in self._places():
            if place and place.version == slot.version and not self._can_answer(place):
                reason = f"there is no layout of {place.num_shards} shards here; add it to TWOTOWER_SHARDS"
                return TowerStatus(slot.version, TowerState.FAILED, reason, False, golden_difference)
        return TowerStatus(slot.version, TowerState.AVAILABLE, "", False, golden_difference)
