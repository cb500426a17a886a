"""Fixtures of the index service's tests: a world with a catalogue and toy checkpoints, and real shard processes."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import faiss
import pyarrow as pa
import pytest
from shard_process import ShardProcess
from toy_checkpoint import ToyModel, toy_items, toy_model

from index_service.artefact import ArtefactManifest
from index_service.build import build
from index_service.order import BuildOrder
from index_service.plan import TuningGoal
from towers.catalogue import Catalogue
from towers.checkpoint import CheckpointStore
from towers.deployment import DeploymentStore, promoted, rolled_back, staged
from towers.store import Store


@dataclass
class World:
    """A store with what operators put into it."""

    url: str

    @property
    def store(self) -> Store:
        return Store(self.url)

    def publish(self, model: ToyModel | None = None, **how: Any) -> int:
        return CheckpointStore(self.store).publish((model or toy_model(**how)).draft()).version

    def load_items(self, items: pa.Table | None = None) -> str:
        return Catalogue(self.store).upsert(toy_items() if items is None else items).catalogue_version

    def build(self, version: int, catalogue_version: str, shard: int = 0, num_shards: int = 1) -> ArtefactManifest:
        """Builds an index in this process: the same code, without the wait for another process."""
        order = BuildOrder(
            store=self.url,
            shard=shard,
            num_shards=num_shards,
            checkpoint_version=version,
            catalogue_version=catalogue_version,
            revision=1,
            goal=TuningGoal(),
        )
        return build(order, lambda _: None)

    def stage(self, version: int) -> None:
        records = DeploymentStore(self.store)
        records.write(staged(records.current(), version, "test"))

    def promote(self) -> None:
        records = DeploymentStore(self.store)
        records.write(promoted(records.current(), "test"))

    def roll_back(self) -> None:
        records = DeploymentStore(self.store)
        records.write(rolled_back(records.current(), "test"))

    def go_live(self, version: int) -> None:
        self.stage(version)
        self.promote()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """More threads than free cores only wait for each other."""
    faiss.omp_set_num_threads(1)


@pytest.fixture
def world(folder_url: str) -> World:
    return World(folder_url)


@pytest.fixture
def s3_world(s3_url: str) -> World:
    return World(s3_url)


@pytest.fixture
def start_shard() -> Iterator[Callable[..., ShardProcess]]:
    """Starts shard replicas; those that still run at the end are killed."""
    with ExitStack() as running:
        yield lambda url, **how: running.enter_context(ShardProcess(url, **how))
