"""The rollout's brain: what to do next, as a pure function of what is.

Deliberately does not know how an action is carried out, nor what time it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rollout.fleet import Fleet
from rollout.gates import CANARY, GateResult, Outcome, replicas_available
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
class Canary:
    """Let the standby version answer a share of the requests."""

    version: int
    share: float


@dataclass(frozen=True)
class Promote:
    """Make the standby version live."""

    version: int


@dataclass(frozen=True)
class Hold:
    """End a canary, and leave the standby version alone until a newer one is published or somebody decides."""

    version: int
    reason: str


Action = Wait | Stage | Canary | Promote | Hold


def next_action(
    deployment: Deployment,
    published: Sequence[int],
    statuses: Fleet,
    gates: Sequence[GateResult],
    canary_share: float,
) -> Action:
    """Decides.

    1. The newest published version goes on standby when it is newer than both slots; those between are skipped.
    2. A canary, whoever began it, ends when its gate refuses.
    3. A standby version that is older than the live one is kept for a rollback, nothing more.
    4. A held standby version is left alone, as is the layout that the live version moved from.
    5. One gate that refuses is enough to hold it.
    6. When every replica of its layout has it available and every gate passes, it answers a share of the requests
       first, if that is asked for and something is live; then it goes live.

    Args:
        deployment: The current record.
        published: Versions that may be staged, as `untried` gives them.
        statuses: All replicas.
        gates: Answers of the gates for the standby version.
        canary_share: Share of the requests that a new version answers first; 0: it goes live at once.
    """
    live, standby = deployment.live_version or 0, deployment.standby_version or 0
    newest = max(published, default=0)
    if newest > max(live, standby):
        return Stage(newest)
    if not live and not standby:
        return Wait("no checkpoint is published")
    refusals = [gate for gate in gates if gate.outcome is Outcome.REFUSE]
    ended = [gate for gate in refusals if gate.name == CANARY and deployment.canary_share]
    if ended:
        return Hold(standby, str(ended[0]))
    if standby < live:
        kept = f", version {standby} is kept for a rollback" if standby else ""
        return Wait(f"version {live} is live{kept}; no newer one is published")
    if deployment.held and standby == live:
        return Wait(f"version {live} is live, its other layout is left alone: {deployment.reason}")
    if deployment.held:
        return Wait(f"version {standby} is held until a newer one is published: {deployment.reason}")
    if refusals:
        return Hold(standby, "; ".join(map(str, refusals)))
    # Asked here whatever the caller's list of gates holds: nothing goes live that a replica does not have.
    availability = replicas_available(standby, statuses.on(deployment.standby_num_shards))
    undecided = [gate for gate in (availability, *gates) if gate.outcome is not Outcome.PASS]
    if undecided:
        return Wait(f"version {standby} stands by; {undecided[0]}")
    if canary_share and not deployment.canary_share and live:
        return Canary(standby, canary_share)
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
