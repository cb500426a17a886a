"""The controller: looks, asks the policy, writes at most one record; then again.

Deliberately keeps no state that matters: it can be killed at any moment and started anywhere, in the middle of
a canary too, and two of them do no harm, for of two writes of one revision exactly one succeeds.
"""

import asyncio
import logging

from rollout.overview import Observer, Overview
from rollout.policy import Action, Canary, Hold, Promote, Stage, Wait, next_action, untried
from towers import deployment
from towers.deployment import Deployment, DeploymentStore
from towers.errors import ConflictError, TwoTowerError
from towers.store import Store

_log = logging.getLogger(__name__)


class Controller:
    """Carries out the policy."""

    def __init__(self, store: Store, observer: Observer) -> None:
        self._deployments = DeploymentStore(store)
        self._observer = observer
        self._last_said = ""

    async def step(self) -> Action:
        """One round: at most one record is written.

        Returns:
            What was done. `Wait` also when the store cannot be read, or when another writer was first.
        """
        try:
            overview = await self._observer.look()
            action = decide(overview)
            record = _record(overview.deployment, action)
            if record is not None:
                await asyncio.to_thread(self._deployments.write, record)
        except ConflictError as error:
            action = Wait(str(error))
        except TwoTowerError as error:
            action = Wait(f"nothing is changed until this is mended: {error}")
        self._say(action)
        return action

    def _say(self, action: Action) -> None:
        """Logs an action once, however often it is the answer."""
        said = in_words(action)
        if said != self._last_said:
            _log.info("%s", said)
            self._last_said = said


def decide(overview: Overview) -> Action:
    """Asks the policy about what was seen."""
    published = untried(overview.published, overview.history)
    return next_action(overview.deployment, published, overview.fleet, overview.gates, overview.canary_share)


def in_words(action: Action) -> str:
    """One line for a log or a screen."""
    match action:
        case Wait(reason):
            return f"waiting: {reason}"
        case Stage(version):
            return f"staged version {version}"
        case Canary(version, share):
            return f"version {version} answers {share:.1%} of the requests"
        case Promote(version):
            return f"promoted version {version}"
        case Hold(version, reason):
            return f"held version {version}: {reason}"


def in_prospect(action: Action) -> str:
    """What a controller would do next, in one line."""
    match action:
        case Wait(reason):
            return f"wait: {reason}"
        case Stage(version):
            return f"stage version {version}"
        case Canary(version, share):
            return f"let version {version} answer {share:.1%} of the requests"
        case Promote(version):
            return f"promote version {version}"
        case Hold(version, reason):
            return f"hold version {version}: {reason}"


def _record(current: Deployment, action: Action) -> Deployment | None:
    match action:
        case Wait():
            return None
        case Stage(version):
            return deployment.staged(current, version, "staged by the rollout controller: the newest published")
        case Canary(_, share):
            return deployment.canaried(current, share, "a canary of the rollout controller: all gates pass")
        case Promote():
            return deployment.promoted(current, "promoted by the rollout controller: all gates pass")
        case Hold(_, reason):
            return deployment.held(current, f"held by the rollout controller: {reason}")
