"""The query towers in memory: one per version that the deployment record names, and which of them answers.

Deliberately does not know requests; a request takes a `Pin` and keeps it until its answer is made.
"""

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import Enum, auto

from query_service.deadline import Deadline
from towers.checkpoint import TOWER_FILES, CheckpointStore
from towers.deployment import NO_DEPLOYMENT, Deployment, DeploymentStore
from towers.errors import CorruptArtefactError, InvalidInputError, NotReadyError, TwoTowerError
from towers.schema import Feature
from towers.store import Store
from towers.tower import Tower

_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 30.0

_log = logging.getLogger(__name__)


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
    tolerated_features: frozenset[str] = frozenset()
    """Features that this version does not know and another loaded one does."""


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


@dataclass
class _Slot:
    version: int
    pin: Pin | None = None
    failure: str = ""
    is_corrupt: bool = False
    loading: asyncio.Task[None] | None = field(default=None, repr=False)


class Versions:
    """Follows the deployment record.

    1. A pin is of the newest record's live version if its tower is loaded, else of the version adopted before.
    2. Versions that the record names are loaded, and tried again with growing pauses when they fail.
    3. Other versions are unloaded, save the adopted one.
    4. A store or record that cannot be read changes nothing.
    """

    def __init__(self, store: Store, poll_interval_s: float) -> None:
        """Nothing is read before `follow`.

        Args:
            store: Where records and checkpoints are.
            poll_interval_s: Pause between two looks at the record.
        """
        self._deployments = DeploymentStore(store)
        self._checkpoints = CheckpointStore(store)
        self._poll_interval_s = poll_interval_s
        self._slots: dict[int, _Slot] = {}
        self._adopted: Pin | None = None
        self._problem = ""
        self._is_asked = asyncio.Event()
        self._askers: list[asyncio.Future[None]] = []
        self.deployment = NO_DEPLOYMENT
        """The newest record seen."""
        self.ready = asyncio.Event()
        """Set once a version answers."""

    @property
    def live_version(self) -> int | None:
        """The version that answers; None before the first."""
        return self._adopted.version if self._adopted else None

    @property
    def live_features(self) -> Sequence[Feature]:
        """Query features of the version that answers."""
        return self._adopted.tower.encoder.features if self._adopted else ()

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
        return [_status(slot) for _, slot in sorted(self._slots.items())]

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
        live = self._slots.get(self.deployment.live_version or 0)
        if live and live.pin and self.live_version != live.version:
            self._adopted = live.pin
            self.ready.set()
            _log.info("version %d answers (deployment revision %d)", live.version, self.deployment.revision)
        wanted = {*self.deployment.versions, self.live_version}
        for version in [version for version in self._slots if version not in wanted]:
            slot = self._slots.pop(version)
            if slot.loading:
                slot.loading.cancel()
            _log.info("version %d is unloaded", version)
        for version in self.deployment.versions:
            if version not in self._slots:
                slot = self._slots[version] = _Slot(version)
                slot.loading = asyncio.create_task(self._load_until_available(slot))
        if self._adopted:
            known = {feature.name for feature in self._adopted.tower.encoder.features}
            others = (slot.pin.tower.encoder.features for slot in self._slots.values() if slot.pin)
            tolerated = frozenset(feature.name for features in others for feature in features) - known
            self._adopted = replace(self._adopted, tolerated_features=tolerated)

    async def _load_until_available(self, slot: _Slot) -> None:
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                slot.pin = await asyncio.to_thread(self._load, slot.version)
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

    def _load(self, version: int) -> Pin:
        files = self._checkpoints.load(version, "query")
        fingerprint = bytes.fromhex(files.manifest.files[TOWER_FILES["query"]].sha256)
        return Pin(version, Tower(files), fingerprint)

    def _why_not_ready(self) -> str:
        if self._problem:
            return self._problem
        if self.deployment.live_version is None:
            return "no version is live; see twotower status"
        slot = self._slots[self.deployment.live_version]
        return f"version {slot.version}: {slot.failure}" if slot.failure else f"version {slot.version} is loading"


def _status(slot: _Slot) -> TowerStatus:
    if slot.pin:
        return TowerStatus(slot.version, TowerState.AVAILABLE, "", False, slot.pin.tower.golden_difference)
    state = TowerState.FAILED if slot.failure else TowerState.LOADING
    return TowerStatus(slot.version, state, slot.failure, slot.is_corrupt, 0.0)
