"""One look at everything: the record, the published checkpoints, the replicas, and what the gates say of the standby.

Deliberately does not decide anything (`rollout.policy`) and writes nothing.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

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

    @property
    def deployment(self) -> Deployment:
        """The current record."""
        return self.history[-1] if self.history else NO_DEPLOYMENT


class Observer:
    """Looks, again and again; keeps what cannot change (records and manifests)."""

    def __init__(self, store: Store, collector: StatusCollector, thresholds: Thresholds) -> None:
        self._checkpoints = CheckpointStore(store)
        self._deployments = DeploymentStore(store)
        self._collector = collector
        self._thresholds = thresholds
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
        deployment = history[-1] if history else NO_DEPLOYMENT
        gates = await asyncio.to_thread(self._ask_gates, deployment, fleet)
        return Overview(history, published, fleet, gates)

    def _read_store(self) -> tuple[tuple[Deployment, ...], tuple[int, ...]]:
        known = self._history[-1] if self._history else NO_DEPLOYMENT
        newest = self._deployments.newer_than(known)
        if newest.revision > known.revision + 1 or not self._history:
            self._history = tuple(self._deployments.history())
        elif newest.revision > known.revision:
            self._history = (*self._history, newest)
        return self._history, tuple(self._checkpoints.versions())

    def _ask_gates(self, deployment: Deployment, fleet: Fleet) -> tuple[GateResult, ...]:
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
        return all_gates(version, live_version, fleet, metrics, live_metrics, self._thresholds)

    def _metrics_of(self, version: int) -> Mapping[str, float]:
        if version not in self._metrics:
            self._metrics[version] = self._checkpoints.manifest(version).metrics
        return self._metrics[version]
