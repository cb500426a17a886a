"""The rollout's brain: what to do next, as a pure function of what is.

Deliberately does not know how an action is carried out, nor what time it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rollout.fleet import Fleet
from rollout.gates import GateResult, Outcome, replicas_available
from towers.deployment import Deployment


@dataclass(frozen=True)
class Wait:
    """Leave the record as it is."""

    reason: str


@dataclass(frozen=True)
class Stage:
    """Put a version on standby."""

    version: int


@dataclass(frozen=True)
class Promote:
    """Make the standby version live."""

    version: int


@dataclass(frozen=True)
class Hold:
    """Leave the standby version alone until a newer one is published or somebody decides."""

    version: int
    reason: str


Action = Wait | Stage | Promote | Hold


def next_action(
    deployment: Deployment, published: Sequence[int], statuses: Fleet, gates: Sequence[GateResult]
) -> Action:
    """Decides.

    1. The newest published version goes on standby when it is newer than both slots; those between are skipped.
    2. A standby version that is older than the live one is kept for a rollback, nothing more.
    3. A held standby version is left alone.
    4. One gate that refuses is enough to hold it.
    5. It goes live when every replica has it available and every gate passes.

    Args:
        deployment: The current record.
        published: Versions that may be staged, as `untried` gives them.
        statuses: All replicas.
        gates: Answers of the gates for the standby version.
    """
    live, standby = deployment.live_version or 0, deployment.standby_version or 0
    newest = max(published, default=0)
    if newest > max(live, standby):
        return Stage(newest)
    if not live and not standby:
        return Wait("no checkpoint is published")
    if standby <= live:
        kept = f", version {standby} is kept for a rollback" if standby else ""
        return Wait(f"version {live} is live{kept}; no newer one is published")
    if deployment.held:
        return Wait(f"version {standby} is held until a newer one is published: {deployment.reason}")
    refusals = [gate for gate in gates if gate.outcome is Outcome.REFUSE]
    if refusals:
        return Hold(standby, "; ".join(str(gate) for gate in refusals))
    # Asked here whatever the caller's list of gates holds: nothing goes live that a replica does not have.
    availability = replicas_available(standby, statuses)
    undecided = [gate for gate in (availability, *gates) if gate.outcome is not Outcome.PASS]
    if undecided:
        return Wait(f"version {standby} stands by; {undecided[0]}")
    return Promote(standby)


def untried(published: Sequence[int], history: Sequence[Deployment]) -> tuple[int, ...]:
    """Published versions that are newer than any that a record ever named.

    Automation stages only these: a version that was rolled back, refused, or replaced by hand does not come back by
    itself, and a version that somebody staged by hand is not replaced by one that was there before.

    Args:
        published: Published versions.
        history: All deployment records.
    """
    newest_tried = max((version for record in history for version in record.versions), default=0)
    return tuple(version for version in published if version > newest_tried)
