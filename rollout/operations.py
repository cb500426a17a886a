"""What a person may do by hand: stage, promote, roll back.

Deliberately does not know the command line. Each writes one record, or nothing and says why.
"""

from collections.abc import Sequence

from rollout.gates import Outcome
from rollout.overview import Overview
from towers import deployment
from towers.checkpoint import CheckpointStore
from towers.deployment import Deployment, DeploymentStore
from towers.errors import GateRefusedError, InvalidInputError
from towers.store import Store


def stage(store: Store, version: int) -> Deployment:
    """Puts a published version on standby; a hold of the standby version ends.

    Raises:
        NotFoundError: the version is not published; the message names those that are.
        CorruptArtefactError: its manifest cannot be parsed.
        InvalidInputError: the version is live already.
        ConflictError: another record was written meanwhile.
        StoreUnavailableError: the store cannot be read or written.
    """
    CheckpointStore(store).manifest(version)
    deployments = DeploymentStore(store)
    record = deployment.staged(deployments.current(), version, "staged by hand")
    deployments.write(record)
    return record


def promote(store: Store, overview: Overview, *, is_forced: bool) -> Deployment:
    """Makes the standby version live.

    Args:
        store: Where the record is written.
        overview: What was seen a moment ago; when the record has changed since, this is a conflict.
        is_forced: Whether gates that wait or refuse are overridden; the record's reason names them.

    Raises:
        InvalidInputError: nothing stands by.
        GateRefusedError: a gate does not pass; the message names it and its figure.
        ConflictError: another record was written meanwhile.
        StoreUnavailableError: the store cannot be written.
    """
    failing = [gate for gate in overview.gates if gate.outcome is not Outcome.PASS]
    reason = "promoted by hand"
    if failing:
        in_words = "; ".join(f"{gate.name} ({gate.outcome.value}): {gate.explanation}" for gate in failing)
        if not is_forced:
            raise GateRefusedError(
                f"version {overview.deployment.standby_version} is not promoted: {in_words}; "
                "wait or mend this, or override it with --force"
            )
        reason += f", by force although {in_words}"
    record = deployment.promoted(overview.deployment, reason)
    DeploymentStore(store).write(record)
    return record


def roll_back(store: Store) -> Deployment:
    """Swaps the slots back and holds the version that was live. No gate is asked: it must work at the worst moment.

    Raises:
        InvalidInputError: the standby version was not live since it was staged, so it is not one to go back to.
        ConflictError: another record was written meanwhile.
        StoreUnavailableError: the store cannot be read or written.
    """
    deployments = DeploymentStore(store)
    history = deployments.history()
    current = history[-1] if history else deployment.NO_DEPLOYMENT
    record = deployment.rolled_back(current, f"rolled back by hand; version {current.live_version} is held")
    if not _was_live_while_named(history, record.live_version):
        raise InvalidInputError(
            f"version {record.live_version} stands by but was not live since it was staged, so there is nothing to "
            f"roll back to; to leave version {current.live_version}: twotower stage VERSION, then twotower promote"
        )
    deployments.write(record)
    return record


def _was_live_while_named(history: Sequence[Deployment], version: int | None) -> bool:
    """Whether a version was live in one of the latest records that name it without a gap: it is loaded still."""
    for record in reversed(history):
        if version == record.live_version:
            return True
        if version != record.standby_version:
            return False
    return False
