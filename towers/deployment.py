"""The deployment record: which checkpoint version is live, which stands by.

Deliberately does not know who follows it. Records are immutable files; the highest revision wins; a new one is put
only if absent, so of two writers that race one gets a conflict.
"""

import re
from datetime import UTC, datetime

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from towers.errors import ConflictError, CorruptArtefactError, InvalidInputError, NotFoundError
from towers.store import Store

FOLDER = "deployments"


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

    @property
    def versions(self) -> tuple[int, ...]:
        """The versions named, live first."""
        return tuple(version for version in (self.live_version, self.standby_version) if version is not None)


NO_DEPLOYMENT = Deployment(
    revision=0, live_version=None, standby_version=None, held=False, reason="", created=datetime.fromtimestamp(0, UTC)
)
"""Before the first record."""


def staged(current: Deployment, version: int, reason: str) -> Deployment:
    """Puts a version on standby.

    Raises:
        InvalidInputError: the version is live.
    """
    if version == current.live_version:
        raise InvalidInputError(f"version {version} is live already")
    return _next(current, current.live_version, version, held=False, reason=reason)


def promoted(current: Deployment, reason: str) -> Deployment:
    """Swaps the slots: the standby version goes live.

    Raises:
        InvalidInputError: nothing stands by.
    """
    if current.standby_version is None:
        raise InvalidInputError("no version stands by; stage one first: twotower stage VERSION")
    return _next(current, current.standby_version, current.live_version, held=False, reason=reason)


def rolled_back(current: Deployment, reason: str) -> Deployment:
    """Swaps the slots back and holds the version that was live.

    Raises:
        InvalidInputError: nothing stands by to roll back to.
    """
    if current.live_version is None or current.standby_version is None:
        raise InvalidInputError("no other version is loaded to roll back to")
    return _next(current, current.standby_version, current.live_version, held=True, reason=reason)


def held(current: Deployment, reason: str) -> Deployment:
    """Keeps the slots and holds the standby version."""
    return _next(current, current.live_version, current.standby_version, held=True, reason=reason)


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


def _next(current: Deployment, live: int | None, standby: int | None, *, held: bool, reason: str) -> Deployment:
    return Deployment(
        revision=current.revision + 1,
        live_version=live,
        standby_version=standby,
        held=held,
        reason=reason,
        created=datetime.now(UTC),
    )


def _path(revision: int) -> str:
    return f"{FOLDER}/{revision}.json"
