"""Obtains the index of one checkpoint version: from the store, or from a build in a process of its own.

Deliberately does not know which versions are wanted, nor when to try again.

Any stored index of the checkpoint will do, of whatever state of the catalogue: it catches up through the change feed,
so a restart does not build. Of the replicas that find none, or one too far behind, one builds and the others wait for
what it stores.
"""

import asyncio
import functools
import logging
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass
from datetime import datetime
from typing import IO, TypeVar

import faiss
import numpy as np
from numpy.typing import NDArray

from index_service.artefact import (
    FIRST_REVISION,
    ArtefactManifest,
    ArtefactRef,
    ArtefactStore,
    checkpoint_fingerprint,
)
from index_service.claim import BuildClaim
from index_service.feed import ChangeFeed, Changes
from index_service.live import LiveIndex
from index_service.memory import build_bytes, load_bytes, memory_available, refuse_beyond, tower_bytes
from index_service.order import BuildMessage, BuildOrder, CorruptCheckpointError
from index_service.plan import TuningGoal
from index_service.saved_delta import SavedDelta, newest_delta, put_delta
from index_service.shard import ShardIndex
from towers.catalogue import Catalogue
from towers.checkpoint import TOWER_FILES, CheckpointStore, Manifest
from towers.errors import ConflictError, CorruptArtefactError, InvalidInputError, TwoTowerError
from towers.store import Store
from towers.tower import Tower

CLAIM_RENEWED_EVERY_S = 2.0
CLAIM_STALE_AFTER_S = 10.0
CLAIM_POLL_S = 0.5
_NICENESS = 19
"""Of builds: searches go first, from the first import of a build on."""
_LARGEST_TYPE = "HNSW32"
"""Of the indexes that a build may try where none is pinned."""
_NUM_WARM_UPS = 16
_NUM_VERIFIED = 4
"""Of the warm-ups, compared with exact search, which reads every vector."""
_WARM_UP_K = 100
_LEAST_SHARE_OF_RECALL = 0.5
"""Of the recall that was measured at the build. With less an index is broken, whatever its digests say."""
_MOST_REPLAYED = 100_000
"""Changes that are always applied rather than built, however small the index is."""
_MOST_REPLAYED_SHARE = 0.5

_Result = TypeVar("_Result")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedIndex:
    """An index that takes changes, and where it came from."""

    live: LiveIndex
    is_from_store: bool
    """Whether it was found in the store rather than built by this process."""

    @property
    def manifest(self) -> ArtefactManifest:
        """What was loaded, before it caught up."""
        return self.live.base.manifest


class IndexLoader:
    """Loads indexes of one shard."""

    def __init__(
        self, store: Store, shard: int, num_shards: int, goal: TuningGoal, filterable: Collection[str] = ()
    ) -> None:
        self._store = store
        self._shard = shard
        self._num_shards = num_shards
        self._goal = goal
        self._filterable = filterable
        self._checkpoints = CheckpointStore(store)
        self._artefacts = ArtefactStore(store, shard, num_shards)
        self._catalogue = Catalogue(store)
        self._feed = ChangeFeed(self._catalogue, shard, num_shards)

    async def load(
        self,
        checkpoint_version: int,
        catalogue_version: str,
        replaced: LoadedIndex | None,
        report: Callable[[float], None],
    ) -> LoadedIndex:
        """Loads an index that has caught up with the catalogue, and builds it first where the store has none.

        When cancelled, a build in progress is killed, and what was being read is let go, before this returns.

        Args:
            checkpoint_version: The checkpoint whose item tower makes the embeddings.
            catalogue_version: The state of the catalogue that a build indexes.
            replaced: The index of this checkpoint that is to be replaced; only a newer one will do then.
            report: Told the share of a build that is done; not called when nothing is built here.

        Raises:
            CorruptCheckpointError: the checkpoint itself is at fault.
            TooLittleMemoryError: it would not fit; nothing was allocated.
            TwoTowerError: anything else; the message says why, in words.
        """
        refused: set[ArtefactRef] = set()

        def stored(stopped: threading.Event) -> LiveIndex | None:
            return self._stored(checkpoint_version, replaced, refused, stopped)

        claim = self._artefacts.claim(checkpoint_version, CLAIM_STALE_AFTER_S)
        try:
            while (live := await _in_thread(stored)) is None:
                if not await _in_thread(lambda _: claim.try_take()):
                    await asyncio.sleep(CLAIM_POLL_S)
                    continue
                async with _renewing(claim):
                    # Whoever held the claim until now may have stored one.
                    if (live := await _in_thread(stored)) is None:
                        return await self._build(checkpoint_version, catalogue_version, replaced, report)
            return LoadedIndex(live, is_from_store=True)
        finally:
            with suppress(TwoTowerError):  # It grows stale by itself.
                await asyncio.to_thread(claim.release)

    async def catch_up(self, loaded: LoadedIndex) -> bool:
        """Applies what has changed in the catalogue; false when an index cannot catch up and is to be replaced.

        Raises:
            TwoTowerError: try again; the index is as it was.
        """

        def apply(stopped: threading.Event) -> bool:
            changes = self._feed.since(loaded.live.catalogue_version)
            if stopped.is_set():
                return True
            if changes is None or _is_too_much(changes, loaded.manifest):
                return False
            if changes.catalogue_version != loaded.live.catalogue_version:
                loaded.live.apply(changes)
            return True

        return await _in_thread(apply)

    async def save_delta(self, loaded: LoadedIndex) -> None:
        """Keeps what changed since an index was built beside it, for restarts and for other replicas.

        Raises:
            TwoTowerError: it is not kept.
        """
        folder = self._artefacts.folder(loaded.manifest)
        await asyncio.to_thread(lambda: put_delta(self._store, folder, loaded.live.to_save()))

    async def prune(self, checkpoint_version: int, created_before: datetime) -> None:
        """Deletes this checkpoint's stored indexes that are older than a moment."""
        await asyncio.to_thread(self._artefacts.prune, checkpoint_version, created_before)

    async def prune_others(self, checkpoint_versions: Collection[int]) -> None:
        """Deletes stored indexes of old checkpoints that are none of these."""
        await asyncio.to_thread(self._artefacts.prune_others, checkpoint_versions)

    def _stored(
        self,
        checkpoint_version: int,
        replaced: LoadedIndex | None,
        refused: set[ArtefactRef],
        stopped: threading.Event,
    ) -> LiveIndex | None:
        """The newest stored index that can be used; those that cannot are added to `refused` and not read again."""
        # Without the checkpoint there is nothing to build either, so this fails before a process is started for it.
        checkpoint = self._checkpoint(checkpoint_version)
        for ref in self._artefacts.refs(checkpoint_version):
            if ref in refused:
                continue
            try:
                manifest = self._artefacts.manifest(ref)
                if replaced is not None and manifest.created <= replaced.manifest.created:
                    continue
                self._check_fits(checkpoint, manifest)
                delta = newest_delta(self._store, self._artefacts.folder(manifest))
                changes = self._feed.since(ref.catalogue_version if delta is None else delta.catalogue_version)
                if changes is None or _is_too_much(changes, manifest):
                    continue
                return self._loaded(checkpoint, ref, delta, changes, replaced, stopped)
            except CorruptArtefactError as error:
                if isinstance(error, CorruptCheckpointError):
                    raise
                refused.add(ref)
                _log.warning("the stored index is refused and will be replaced: %s", error)
        return None

    async def _build(
        self,
        checkpoint_version: int,
        catalogue_version: str,
        replaced: LoadedIndex | None,
        report: Callable[[float], None],
    ) -> LoadedIndex:
        report(0.0)
        revision = await asyncio.to_thread(self._next_revision, checkpoint_version, catalogue_version)
        order = BuildOrder(
            store=self._store.url,
            shard=self._shard,
            num_shards=self._num_shards,
            checkpoint_version=checkpoint_version,
            catalogue_version=catalogue_version,
            revision=revision,
            goal=self._goal,
        )
        build = await _run_builder(order, report)
        live = await _in_thread(lambda stopped: self._built(order, replaced, stopped))
        return LoadedIndex(live, is_from_store=live.base.manifest.build != build)

    def _next_revision(self, checkpoint_version: int, catalogue_version: str) -> int:
        checkpoint = self._checkpoint(checkpoint_version)
        size = self._catalogue.size(catalogue_version)
        needed = build_bytes(
            size.num_rows,
            checkpoint.dim,
            self._goal.index_type or _LARGEST_TYPE,
            size.stored_bytes,
            self._num_shards,
            _tower_bytes(checkpoint),
        )
        refuse_beyond(needed, memory_available(), f"building the index of checkpoint {checkpoint_version}")
        newest = self._artefacts.newest_revision(checkpoint_version, catalogue_version)
        return FIRST_REVISION if newest is None else newest + 1

    def _built(self, order: BuildOrder, replaced: LoadedIndex | None, stopped: threading.Event) -> LiveIndex:
        checkpoint = self._checkpoint(order.checkpoint_version)
        try:
            # However much changed meanwhile is applied: another build would end no better.
            changes = self._feed.since(order.catalogue_version)
            if changes is None:
                raise ConflictError("the catalogue's items were rewritten while the index was built")
            ref = ArtefactRef(order.checkpoint_version, order.catalogue_version, order.revision)
            return self._loaded(checkpoint, ref, None, changes, replaced, stopped)
        except CorruptArtefactError as error:
            if isinstance(error, CorruptCheckpointError):
                raise
            # Not the checkpoint's fault: the next attempt refuses it and builds again.
            raise TwoTowerError(f"the index that was just built is refused: {error}") from error

    def _loaded(
        self,
        checkpoint: Manifest,
        ref: ArtefactRef,
        delta: SavedDelta | None,
        changes: Changes,
        replaced: LoadedIndex | None,
        stopped: threading.Event,
    ) -> LiveIndex:
        manifest = self._artefacts.manifest(ref)
        stored_bytes = manifest.size_bytes + (0 if delta is None else delta.size_bytes)
        refuse_beyond(
            load_bytes(stored_bytes, _tower_bytes(checkpoint)),
            memory_available(),
            f"loading the index of checkpoint {checkpoint.version}",
        )
        index = ShardIndex(self._artefacts.get(ref, stopped), self._filterable)
        _warm_up(index, self._recorded_queries(checkpoint, index))
        if replaced is not None and replaced.manifest.checkpoint_fingerprint == manifest.checkpoint_fingerprint:
            # To read vocabularies and a graph once more would hold the interpreter from the searches.
            tower = replaced.live.tower
        else:
            # The builder has replayed the tower's golden examples; it is loaded here once an item is to be embedded.
            tower = functools.cache(lambda: self._item_tower(checkpoint.version))
        live = LiveIndex(index, tower, delta)
        if changes.catalogue_version != live.catalogue_version:
            live.apply(changes)
        return live

    def _checkpoint(self, version: int) -> Manifest:
        try:
            return self._checkpoints.manifest(version)
        except CorruptArtefactError as error:
            raise CorruptCheckpointError(str(error)) from error

    def _item_tower(self, version: int) -> Tower:
        try:
            return Tower(self._checkpoints.load(version, "item"))
        except (CorruptArtefactError, InvalidInputError) as error:
            raise CorruptCheckpointError(str(error)) from error

    def _recorded_queries(self, checkpoint: Manifest, index: ShardIndex) -> NDArray[np.float32]:
        """`[Q, D]` some queries of the checkpoint's validation split; some items where it has none."""
        try:
            recorded = self._checkpoints.validation_queries(checkpoint)
        except CorruptArtefactError as error:
            raise CorruptCheckpointError(str(error)) from error
        candidates = index.ann.vectors if recorded is None else recorded
        return candidates[np.linspace(0, len(candidates) - 1, min(_NUM_WARM_UPS, len(candidates))).astype(np.int64)]

    def _check_fits(self, checkpoint: Manifest, manifest: ArtefactManifest) -> None:
        if manifest.checkpoint_fingerprint != checkpoint_fingerprint(checkpoint) or manifest.dim != checkpoint.dim:
            raise CorruptArtefactError(f"it was built from another checkpoint that was number {checkpoint.version} too")
        if manifest.goal != self._goal:
            raise CorruptArtefactError(f"it was built with other settings: {manifest.goal}, not {self._goal}")


def _is_too_much(changes: Changes, manifest: ArtefactManifest) -> bool:
    """Whether a build is cheaper than to embed all this in a process that serves."""
    num_changes = changes.upserts.num_rows + len(changes.deleted_ids)
    return bool(num_changes > max(_MOST_REPLAYED, _MOST_REPLAYED_SHARE * manifest.num_items))


def _tower_bytes(checkpoint: Manifest) -> int:
    """What the item tower will take in memory."""
    sizes = {path: digest.size_bytes for path, digest in checkpoint.files.items()}
    onnx_bytes = sizes.pop(TOWER_FILES["item"], 0)
    sizes.pop(TOWER_FILES["query"], None)
    return tower_bytes(onnx_bytes, sum(sizes.values()))


def _warm_up(index: ShardIndex, queries: NDArray[np.float32]) -> None:
    """Searches as requests will, so that the first one does not pay for cold pages, and checks what comes back.

    Args:
        index: The index.
        queries: `[Q, D]` unit embeddings.

    Raises:
        CorruptArtefactError: far less is found of what exact search finds than was measured when it was built.
    """
    faiss.omp_set_num_threads(1)
    k = min(_WARM_UP_K, index.num_items)
    if k == 0:
        return
    searches = [index.search(query[None], k) for query in queries]
    for hits in searches:
        index.packed_ids(hits.rows)
    _, exact_rows = index.ann.search_exactly(np.ascontiguousarray(queries[:_NUM_VERIFIED]), k)
    found = [len(np.intersect1d(hits.rows, exact)) for hits, exact in zip(searches, exact_rows, strict=False)]
    recall = sum(found) / (k * len(found))
    measured = min((setting.recall for setting in index.manifest.plan.settings), default=1.0)
    if recall < _LEAST_SHARE_OF_RECALL * measured:
        raise CorruptArtefactError(f"its recall is {recall:.2f}, and was {measured:.2f} when it was built")


async def _in_thread(work: Callable[[threading.Event], _Result]) -> _Result:
    """Runs blocking work; when cancelled, tells it to stop and waits until it has let go of everything."""
    stopped = threading.Event()
    task = asyncio.create_task(asyncio.to_thread(work, stopped))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        stopped.set()
        with suppress(Exception):
            await task
        raise


@asynccontextmanager
async def _renewing(claim: BuildClaim) -> AsyncIterator[None]:
    """Keeps a claim that is ours until the block ends; whether somebody takes it over meanwhile changes nothing."""

    async def keep() -> None:
        while True:
            await asyncio.sleep(CLAIM_RENEWED_EVERY_S)
            with suppress(TwoTowerError):
                await asyncio.to_thread(claim.renew)

    task = asyncio.create_task(keep())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait((task,))


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
    os.setpriority(os.PRIO_PROCESS, process.pid, _NICENESS)
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
