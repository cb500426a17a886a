"""One look at everything: the record, the published checkpoints, the replicas, and what the gates say of the standby.

Deliberately does not decide anything (`rollout.policy`) and writes nothing.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

from rollout.fleet import Fleet
from rollout.gates import GateResult, Outcome, Thresholds, all_gates
from rollout.statuses import StatusCollector
from towers.checkpoint import CheckpointStore
from towers.deployment import NO_DEPLOYMENT, Deployment, DeploymentStore
from towers.errors import CorruptArtefactError, NotFoundError
from towers.store import Store


@dataclass(frozen=True)
class Overview:
    """What was seen, all of it against one deployment record."""

    history: tuple[Deployment, ...]
    """All records, oldest first."""
    published: tuple[int, ...]
    """Published versions, rising."""
    fleet: Fleet
    gates: tuple[GateResult, ...]
    """Answers for the standby version; empty when nothing stands by."""
    canary_share: float
    """Share of the requests that a new version is to answer before it goes live, as the settings say."""

    @property
    def deployment(self) -> Deployment:
        """The current record."""
        return self.history[-1] if self.history else NO_DEPLOYMENT


class Observer:
    """Looks, again and again; keeps what cannot change (records and manifests)."""

    def __init__(
        self,
        store: Store,
        collector: StatusCollector,
        thresholds: Thresholds,
        clock: Callable[[], datetime] = partial(datetime.now, UTC),
    ) -> None:
        """Nothing is read before `look`.

        Args:
            store: Where records and checkpoints are.
            collector: Asks the replicas.
            thresholds: Where the gates draw the line.
            clock: The time now; records carry the time of day, so it is that and not a monotonic one.
        """
        self._checkpoints = CheckpointStore(store)
        self._deployments = DeploymentStore(store)
        self._collector = collector
        self._thresholds = thresholds
        self._clock = clock
        self._history: tuple[Deployment, ...] = ()
        self._metrics: dict[int, Mapping[str, float]] = {}

    async def look(self) -> Overview:
        """Looks once.

        Raises:
            StoreUnavailableError: the store cannot be read.
            CorruptArtefactError: a deployment record cannot be parsed.
        """
        fleet, (history, published) = await asyncio.gather(
            self._collector.collect(), asyncio.to_thread(self._read_store)
        )
        gates = await asyncio.to_thread(self._ask_gates, history, fleet)
        return Overview(history, published, fleet, gates, self._thresholds.canary_share)

    def _read_store(self) -> tuple[tuple[Deployment, ...], tuple[int, ...]]:
        known = self._history[-1] if self._history else NO_DEPLOYMENT
        newest = self._deployments.newer_than(known)
        if newest.revision > known.revision + 1 or not self._history:
            self._history = tuple(self._deployments.history())
        elif newest.revision > known.revision:
            self._history = (*self._history, newest)
        return self._history, tuple(self._checkpoints.versions())

    def _ask_gates(self, history: Sequence[Deployment], fleet: Fleet) -> tuple[GateResult, ...]:
        deployment = history[-1] if history else NO_DEPLOYMENT
        version, live_version = deployment.standby_version, deployment.live_version
        if version is None:
            return ()
        try:
            metrics = self._metrics_of(version)
        except (NotFoundError, CorruptArtefactError) as error:
            return (GateResult("manifest", Outcome.REFUSE, str(error)),)
        live_metrics: Mapping[str, float] = {}
        if live_version is not None:
            try:
                live_metrics = self._metrics_of(live_version)
            except (NotFoundError, CorruptArtefactError):
                # The live checkpoint was deleted or damaged: it goes on serving, but must not block its successor.
                live_metrics = {}
        now = self._clock()
        staged_s = (now - _stands_by_since(history)).total_seconds()
        recorded_s = (now - deployment.created).total_seconds()
        return all_gates(deployment, fleet, metrics, live_metrics, staged_s, recorded_s, self._thresholds)

    def _metrics_of(self, version: int) -> Mapping[str, float]:
        if version not in self._metrics:
            self._metrics[version] = self._checkpoints.manifest(version).metrics
        return self._metrics[version]


def _stands_by_since(history: Sequence[Deployment]) -> datetime:
    """When the standby slot got what it holds; the records since then may have changed other things."""
    newest = history[-1]
    since = newest.created
    for record in reversed(history):
        if record.standby != newest.standby:
            break
        since = record.created
    return since
