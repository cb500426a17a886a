"""The deployment record: which checkpoint version is live on which layout of shards, which stands by.

Deliberately does not know who follows it. Records are immutable files; the highest revision wins; a new one is put
only if absent, so of two writers that race one gets a conflict.
"""

import re
from datetime import UTC, datetime
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from towers.errors import ConflictError, CorruptArtefactError, InvalidInputError, NotFoundError
from towers.store import Store

FOLDER = "deployments"


class Slot(NamedTuple):
    """Blue or green: a version on a layout."""

    version: int | None
    num_shards: int | None

    def __str__(self) -> str:
        return f"version {self.version}" + ("" if self.num_shards is None else f" on {self.num_shards} shards")


class Deployment(BaseModel):
    """One record. Services load exactly the versions it names."""

    model_config = ConfigDict(frozen=True)

    revision: int = Field(ge=0)
    live_version: int | None
    standby_version: int | None
    held: bool
    """Whether automation must leave the standby version alone."""
    reason: str
    created: datetime
    live_num_shards: int | None = Field(default=None, ge=1)
    """Number of shards that answer for the live version; None: the first layout that a service is configured with."""
    standby_num_shards: int | None = Field(default=None, ge=1)
    """The same of the standby version; with another number than the live one's, promoting re-shards."""
    canary_share: float = Field(default=0.0, ge=0, le=1)
    """Share of the requests that the standby version answers."""

    @property
    def live(self) -> Slot:
        """What answers."""
        return Slot(self.live_version, self.live_num_shards)

    @property
    def standby(self) -> Slot:
        """What stands by."""
        return Slot(self.standby_version, self.standby_num_shards)

    @property
    def versions(self) -> tuple[int, ...]:
        """The versions named, live first, each once."""
        named = (self.live.version, self.standby.version)
        return tuple(dict.fromkeys(version for version in named if version is not None))

    def versions_on(self, num_shards: int) -> tuple[int, ...]:
        """The versions that a shard of a layout with this many shards loads, live first, each once."""
        named = (slot.version for slot in (self.live, self.standby) if slot.num_shards in (None, num_shards))
        return tuple(dict.fromkeys(version for version in named if version is not None))


NO_DEPLOYMENT = Deployment(
    revision=0, live_version=None, standby_version=None, held=False, reason="", created=datetime.fromtimestamp(0, UTC)
)
"""Before the first record."""


def staged(current: Deployment, version: int, reason: str, num_shards: int | None = None) -> Deployment:
    """Puts a version on standby.

    Args:
        current: The record now.
        version: The version.
        reason: In words.
        num_shards: The layout that it is to be served by; the live one's when left out. The live version itself may
            stand by on another layout: that is how a catalogue is re-sharded.

    Raises:
        InvalidInputError: the version is live, on this layout.
    """
    slot = Slot(version, num_shards if num_shards is not None else current.live_num_shards)
    if slot == current.live:
        raise InvalidInputError(f"version {version} is live already")
    return _next(current, reason, standby_version=slot.version, standby_num_shards=slot.num_shards, held=False)


def canaried(current: Deployment, share: float, reason: str) -> Deployment:
    """Lets the standby version answer a share of the requests; `held` ends it.

    Raises:
        InvalidInputError: the share is not between 0 and 1, or one of the slots is empty.
    """
    if not 0 < share < 1:
        raise InvalidInputError(f"share = {share}: give a number above 0 and below 1, for example 0.05")
    if current.standby_version is None:
        raise InvalidInputError("no version stands by; stage one first: twotower stage VERSION")
    if current.live_version is None:
        raise InvalidInputError("nothing is live to share the requests with; twotower promote")
    return _next(current, reason, canary_share=share)


def promoted(current: Deployment, reason: str) -> Deployment:
    """Swaps the slots: the standby version goes live.

    When it is the same version on another layout, the former layout is held: automation must not swap it back.

    Raises:
        InvalidInputError: nothing stands by.
    """
    if current.standby_version is None:
        raise InvalidInputError("no version stands by; stage one first: twotower stage VERSION")
    return _swapped(current, reason, held=current.standby_version == current.live_version)


def rolled_back(current: Deployment, reason: str) -> Deployment:
    """Swaps the slots back and holds the version that was live.

    Raises:
        InvalidInputError: nothing stands by to roll back to.
    """
    if current.live_version is None or current.standby_version is None:
        raise InvalidInputError("no other version is loaded to roll back to")
    return _swapped(current, reason, held=True)


def held(current: Deployment, reason: str) -> Deployment:
    """Keeps the slots and holds the standby version; it answers no request any more."""
    return _next(current, reason, held=True)


class DeploymentStore:
    """The records of one object store. All methods block and raise `StoreUnavailableError`."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def current(self) -> Deployment:
        """The highest revision; `NO_DEPLOYMENT` before the first."""
        revisions = self._revisions()
        return self._read(revisions[-1]) if revisions else NO_DEPLOYMENT

    def newer_than(self, known: Deployment) -> Deployment:
        """The highest revision, given one seen before: a single small read when nothing changed."""
        newest = known
        while True:
            try:
                newest = self._read(newest.revision + 1)
            except NotFoundError:
                return newest

    def write(self, deployment: Deployment) -> None:
        """Writes the next revision.

        Raises:
            ConflictError: somebody else wrote this revision first.
        """
        try:
            self._store.put_new(_path(deployment.revision), deployment.model_dump_json(indent=1).encode())
        except ConflictError as error:
            raise ConflictError(
                f"deployment revision {deployment.revision} was written by somebody else; "
                "look at twotower status and try again"
            ) from error

    def history(self) -> list[Deployment]:
        """All records, oldest first."""
        return [self._read(revision) for revision in self._revisions()]

    def _revisions(self) -> list[int]:
        matches = (re.fullmatch(rf"{FOLDER}/(\d+)\.json", path) for path in self._store.files(FOLDER))
        return sorted(int(match.group(1)) for match in matches if match)

    def _read(self, revision: int) -> Deployment:
        try:
            deployment = Deployment.model_validate_json(self._store.get(_path(revision)))
        except ValidationError as error:
            raise CorruptArtefactError(f"deployment revision {revision} is not valid: {error}") from error
        if deployment.revision != revision:
            raise CorruptArtefactError(f"deployment revision {revision}: the record says {deployment.revision}")
        return deployment


def _swapped(current: Deployment, reason: str, *, held: bool) -> Deployment:
    return _next(
        current,
        reason,
        live_version=current.standby_version,
        live_num_shards=current.standby_num_shards,
        standby_version=current.live_version,
        standby_num_shards=current.live_num_shards,
        held=held,
    )


def _next(current: Deployment, reason: str, **changes: Any) -> Deployment:
    """The next record: what does not change stays, save that a canary ends with the record that began it."""
    return current.model_copy(
        update={
            "canary_share": 0.0,
            **changes,
            "revision": current.revision + 1,
            "reason": reason,
            "created": datetime.now(UTC),
        }
    )


def _path(revision: int) -> str:
    return f"{FOLDER}/{revision}.json"
