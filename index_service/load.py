"""Obtains the index of one checkpoint version: from the store, or from a build in a process of its own.

Deliberately does not know which versions are wanted, nor when to try again.
"""

import asyncio
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from typing import IO

import faiss
import numpy as np

from index_service.artefact import FIRST_REVISION, ArtefactRef, ArtefactStore, checkpoint_fingerprint
from index_service.order import BuildMessage, BuildOrder, CorruptCheckpointError
from index_service.plan import EXACT
from index_service.shard import ShardIndex
from towers.checkpoint import CheckpointStore, Manifest
from towers.errors import CorruptArtefactError, TwoTowerError
from towers.store import Store

_WARM_UP_SEARCHES = 3
_WARM_UP_K = 100

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedIndex:
    """An index and where it came from."""

    index: ShardIndex
    is_from_store: bool
    """Whether it was found in the store rather than built by this process."""


@dataclass(frozen=True)
class _Stored:
    """What the store has: an index, or none and the revision that a new one gets."""

    index: ShardIndex | None
    next_revision: int


class IndexLoader:
    """Loads indexes of one shard."""

    def __init__(self, store: Store, shard: int, num_shards: int, exact_below: int) -> None:
        self._store = store
        self._shard = shard
        self._num_shards = num_shards
        self._exact_below = exact_below
        self._checkpoints = CheckpointStore(store)
        self._artefacts = ArtefactStore(store, shard, num_shards)

    async def load(
        self, checkpoint_version: int, catalogue_version: str, report: Callable[[float], None]
    ) -> LoadedIndex:
        """Loads an index, and builds it first where the store has none that can be trusted.

        When cancelled, a build in progress is killed before this returns.

        Args:
            checkpoint_version: The checkpoint whose item tower makes the embeddings.
            catalogue_version: The state of the catalogue to be indexed.
            report: Told the share of a build that is done; not called when nothing is built.

        Raises:
            CorruptCheckpointError: the checkpoint itself is at fault.
            TwoTowerError: anything else; the message says why, in words.
        """
        stored = await asyncio.to_thread(self._stored, checkpoint_version, catalogue_version)
        if stored.index is not None:
            return LoadedIndex(stored.index, is_from_store=True)
        report(0.0)
        order = BuildOrder(
            store=self._store.url,
            shard=self._shard,
            num_shards=self._num_shards,
            checkpoint_version=checkpoint_version,
            catalogue_version=catalogue_version,
            revision=stored.next_revision,
            exact_below=self._exact_below,
        )
        build = await _run_builder(order, report)
        index = await asyncio.to_thread(self._built, checkpoint_version, catalogue_version, order.revision)
        return LoadedIndex(index, is_from_store=index.manifest.build != build)

    async def prune(self, checkpoint_version: int, created_before: datetime) -> None:
        """Deletes this checkpoint's stored indexes that are older than a moment."""
        await asyncio.to_thread(self._artefacts.prune, checkpoint_version, created_before)

    def _stored(self, checkpoint_version: int, catalogue_version: str) -> _Stored:
        # Without the checkpoint there is nothing to build either, so this fails before a process is started for it.
        checkpoint = self._checkpoint(checkpoint_version)
        revision = self._artefacts.newest_revision(checkpoint_version, catalogue_version)
        if revision is None:
            return _Stored(None, FIRST_REVISION)
        try:
            return _Stored(self._read(checkpoint, catalogue_version, revision), revision)
        except CorruptArtefactError as error:
            _log.warning("the stored index is refused and will be replaced: %s", error)
            return _Stored(None, revision + 1)

    def _built(self, checkpoint_version: int, catalogue_version: str, revision: int) -> ShardIndex:
        checkpoint = self._checkpoint(checkpoint_version)
        try:
            return self._read(checkpoint, catalogue_version, revision)
        except CorruptArtefactError as error:
            # Not the checkpoint's fault: the next attempt refuses it and builds again.
            raise TwoTowerError(f"the index that was just built is refused: {error}") from error

    def _checkpoint(self, version: int) -> Manifest:
        try:
            return self._checkpoints.manifest(version)
        except CorruptArtefactError as error:
            raise CorruptCheckpointError(str(error)) from error

    def _read(self, checkpoint: Manifest, catalogue_version: str, revision: int) -> ShardIndex:
        ref = ArtefactRef(checkpoint.version, catalogue_version, revision)
        manifest = self._artefacts.manifest(ref)
        if manifest.checkpoint_fingerprint != checkpoint_fingerprint(checkpoint) or manifest.dim != checkpoint.dim:
            raise CorruptArtefactError(f"it was built from another checkpoint that was number {checkpoint.version} too")
        is_exact = manifest.num_items == 0 or manifest.num_items < self._exact_below
        if is_exact != (manifest.index_type == EXACT):
            raise CorruptArtefactError(
                f"it is {manifest.index_type}, which {manifest.num_items} items are not to be "
                f"with exact_below = {self._exact_below}"
            )
        index = ShardIndex(self._artefacts.get(ref))
        _warm_up(index)
        return index


def _warm_up(index: ShardIndex) -> None:
    """Searches a few times, so that the first request does not pay for untouched pages."""
    faiss.omp_set_num_threads(1)
    query = np.zeros((1, index.manifest.dim), dtype=np.float32)  # [1, D]
    query[0, 0] = 1.0
    for _ in range(_WARM_UP_SEARCHES):
        index.search(query, _WARM_UP_K)


async def _run_builder(order: BuildOrder, report: Callable[[float], None]) -> str:
    """Runs a build to its end, and returns the name of the build; empty when another one was published first."""
    # Popen and not the event loop's own way: it starts by vfork, which neither copies the page tables of a process
    # that holds gigabytes nor runs gRPC's fork handlers. By this thread, because the child dies with its starter.
    process = subprocess.Popen(
        (sys.executable, "-m", "index_service.build", "--parent", str(os.getpid()), order.model_dump_json()),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    _log.info(
        "process %d builds checkpoint %d at catalogue %s",
        process.pid,
        order.checkpoint_version,
        order.catalogue_version,
    )
    try:
        last = await _last_message(process.stdout, report)
        status = await asyncio.to_thread(process.wait)
    finally:
        process.kill()
        process.wait()
    last.raise_failure()
    if status != 0:
        raise TwoTowerError(f"the build ended with status {status}; see its log")
    return last.build


async def _last_message(stdout: IO[bytes] | None, report: Callable[[float], None]) -> BuildMessage:
    """Reads messages until the process closes its stdout."""
    last = BuildMessage()
    lines = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    pipe, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), stdout)
    with closing(pipe):
        async for line in lines:
            last = BuildMessage.model_validate_json(line)
            report(last.progress)
    return last
