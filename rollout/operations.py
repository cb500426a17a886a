"""What a person may do by hand: stage, begin and end a canary, promote, roll back.

Deliberately does not know the command line. Each writes one record, or nothing and says why.
"""

from collections.abc import Sequence

from rollout.gates import CANARY, GateResult, Outcome
from rollout.overview import Overview
from towers import deployment
from towers.checkpoint import CheckpointStore
from towers.deployment import Deployment, DeploymentStore, Slot
from towers.errors import GateRefusedError, InvalidInputError
from towers.store import Store


def stage(store: Store, version: int, num_shards: int | None = None) -> Deployment:
    """Puts a published version on standby; a hold of the standby version ends.

    Args:
        store: Where the record is written.
        version: The version; the live one too, on another layout.
        num_shards: Number of shards of the layout that is to serve it; None: the live one's layout.

    Raises:
        NotFoundError: the version is not published; the message names those that are.
        CorruptArtefactError: its manifest cannot be parsed.
        InvalidInputError: the version is live already, on this layout.
        ConflictError: another record was written meanwhile.
        StoreUnavailableError: the store cannot be read or written.
    """
    CheckpointStore(store).manifest(version)
    deployments = DeploymentStore(store)
    record = deployment.staged(deployments.current(), version, "staged by hand", num_shards)
    deployments.write(record)
    return record


def begin_canary(store: Store, overview: Overview, share: float, *, is_forced: bool) -> Deployment:
    """Lets the standby version answer a share of the requests.

    Args:
        store: Where the record is written.
        overview: What was seen a moment ago; when the record has changed since, this is a conflict.
        share: Above 0 and below 1.
        is_forced: Whether gates that wait or refuse are overridden; the record's reason names them.

    Raises:
        InvalidInputError: nothing stands by, nothing is live, or the share is out of range.
        GateRefusedError: a gate does not pass; the message names it and its figure.
        ConflictError: another record was written meanwhile.
        StoreUnavailableError: the store cannot be written.
    """
    # The gate of a canary that runs already must not stand in the way of another share.
    gates = [gate for gate in overview.gates if gate.name != CANARY]
    reason = _reason("a canary by hand", "gets no share of the requests", overview, gates, is_forced=is_forced)
    record = deployment.canaried(overview.deployment, share, reason)
    DeploymentStore(store).write(record)
    return record


def end_canary(store: Store) -> Deployment:
    """Lets the live version answer every request, and holds the standby version.

    Raises:
        InvalidInputError: no canary runs.
        ConflictError: another record was written meanwhile.
        StoreUnavailableError: the store cannot be read or written.
    """
    deployments = DeploymentStore(store)
    current = deployments.current()
    if not current.canary_share:
        raise InvalidInputError("no canary runs")
    record = deployment.held(current, f"canary ended by hand; {current.standby} is held")
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
    reason = _reason("promoted by hand", "is not promoted", overview, overview.gates, is_forced=is_forced)
    record = deployment.promoted(overview.deployment, reason)
    DeploymentStore(store).write(record)
    return record


def roll_back(store: Store) -> Deployment:
    """Swaps the slots back and holds the version that was live; ends the canary of a version that was not live yet.

    No gate is asked: it must work at the worst moment.

    Raises:
        InvalidInputError: the standby version was not live since it was staged, so it is not one to go back to.
        ConflictError: another record was written meanwhile.
        StoreUnavailableError: the store cannot be read or written.
    """
    deployments = DeploymentStore(store)
    history = deployments.history()
    current = history[-1] if history else deployment.NO_DEPLOYMENT
    was_live = _was_live_while_named(history, current.standby)
    if current.canary_share and not was_live:
        return end_canary(store)
    record = deployment.rolled_back(current, f"rolled back by hand; {current.live} is held")
    if not was_live:
        raise InvalidInputError(
            f"{current.standby} stands by but was not live since it was staged, so there is nothing to "
            f"roll back to; to leave {current.live}: twotower stage VERSION, then twotower promote"
        )
    deployments.write(record)
    return record


def _reason(act: str, refusal: str, overview: Overview, gates: Sequence[GateResult], *, is_forced: bool) -> str:
    """Why the record is written, once the gates have been asked."""
    failing = [gate for gate in gates if gate.outcome is not Outcome.PASS]
    if not failing:
        return act
    in_words = "; ".join(f"{gate.name} ({gate.outcome.value}): {gate.explanation}" for gate in failing)
    if not is_forced:
        raise GateRefusedError(
            f"version {overview.deployment.standby_version} {refusal}: {in_words}; "
            "wait or mend this, or override it with --force"
        )
    return f"{act}, by force although {in_words}"


def _was_live_while_named(history: Sequence[Deployment], slot: Slot) -> bool:
    """Whether a version was live in one of the latest records that name it without a gap: it is loaded still."""
    for record in reversed(history):
        if slot == record.live:
            return True
        if slot != record.standby:
            return False
    return False
