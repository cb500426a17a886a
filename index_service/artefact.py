"""Built indexes in the object store: a cache that any replica can fill, and that may be lost at any moment.

Deliberately does not know how an index is built or searched; it hands out indexes whose every byte was verified.

The layout, below `indexes/<checkpoint_version>/<shard>-of-<num_shards>/<catalogue_version>/`:

    manifest-<revision>.json    what the artefact is; written LAST, put-if-absent; the highest revision counts
    <build>/index.faiss         the FAISS index without its exact vectors; absent where they are the index
    <build>/vectors.f32         [N, D] little-endian float32, the exact vectors
    <build>/items.arrow         ids and attributes (Arrow IPC file), row i is vector i of the index
    <build>/item_hashes.u64     little-endian uint64, xxh3_64 of each item id, in the order of the rows
    <build>/delta-<catalogue_version>.arrow    what changed since, see `index_service.saved_delta`
    ../claim/<number>           held by the replica that builds, see `index_service.claim`

Every build writes into a folder of its own, so two builders never mix files; of two that finish together the manifest
picks one. Nothing is ever overwritten: a refused artefact is replaced by a manifest of the next revision. Artefacts of
older catalogues are pruned as the catalogue moves on, and those of checkpoints that no deployment record names, save
the newest.

Files are read in chunks, each verified before it is used and placed where it stays, so that a load never holds a
second copy in memory.
"""

import hashlib
import json
import re
import threading
import uuid
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal
from urllib.parse import quote, unquote

import faiss
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from index_service.ann import AnnIndex, exact_index_of_size, stored_part, vectors_of
from index_service.claim import BuildClaim
from index_service.plan import EXACT, IndexPlan, TuningGoal
from towers.catalogue_columns import ITEM_ID
from towers.checkpoint import Manifest
from towers.errors import CorruptArtefactError, NotFoundError, TwoTowerError
from towers.store import Store

FOLDER = "indexes"
INDEX = "index.faiss"
VECTORS = "vectors.f32"
ITEMS = "items.arrow"
ITEM_HASHES = "item_hashes.u64"
FIRST_REVISION = 1
CHUNK_BYTES = 8 * 2**20
NUM_UNNAMED_KEPT = 2
"""Checkpoints that no deployment record names any longer and whose indexes stay all the same."""
MOST_NAMED = 10_000
"""Items: their ids and reasons keep the manifest around a megabyte."""
_CLAIM = "claim"
"""Folder of the claim; a catalogue's folder begins with a "v"."""
_PIECE_BYTES = 2 * 2**20
"""Of a chunk, fetched at once: what a load holds beside the index itself, for each reader."""
_READERS = 2
"""Chunks that are fetched and verified at once: more would take the cores from the searches beside a load."""
_LONG_AGO = datetime.min.replace(tzinfo=UTC)
_MANIFEST = re.compile(r"manifest-(\d+)\.json")
_CATALOGUE_VERSION = re.compile(r"(\d+)\.(\d+)")


class StoredFile(BaseModel):
    """What a file must be."""

    model_config = ConfigDict(frozen=True)

    size_bytes: int = Field(ge=0)
    chunk_sha256: tuple[str, ...]
    """Of each `CHUNK_BYTES`; the last chunk is what is left."""


class ArtefactManifest(BaseModel):
    """What a stored index is."""

    model_config = ConfigDict(frozen=True)

    format: Literal[2] = 2
    revision: int = Field(ge=FIRST_REVISION)
    build: str = Field(pattern=r"^[0-9a-f]{32}$")
    """Name of the folder that holds the files."""
    created: datetime
    checkpoint_version: int
    checkpoint_fingerprint: str
    """Which checkpoint carried that number, see `checkpoint_fingerprint`."""
    catalogue_version: str
    shard: int
    num_shards: int
    dim: int = Field(ge=1)
    num_items: int = Field(ge=0)
    num_quarantined: int
    quarantined: Mapping[str, str] = {}
    """Items left out because they could not be embedded, each with the reason: the first `MOST_NAMED` of them."""
    plan: IndexPlan
    goal: TuningGoal
    """What the plan was to reach."""
    measured_with: Literal["validation queries", "item vectors"]
    """What the recall was measured with."""
    item_similarity: float
    """Mean cosine of pairs of different items; 0 where there are no pairs."""
    score_mean: float
    """Of sampled queries with sampled items; 0 where there are no items."""
    score_deviation: float
    golden_difference: float
    """Of the item tower on the machine that built the index."""
    files: Mapping[str, StoredFile] = {}
    """Empty until it is stored."""

    @property
    def index_type(self) -> str:
        """FAISS factory string."""
        return self.plan.index_type

    @property
    def size_bytes(self) -> int:
        """Of all stored files together."""
        return sum(file.size_bytes for file in self.files.values())


@dataclass(frozen=True)
class LoadedArtefact:
    """An index in memory, as it was built or as it was read.

    Raises:
        CorruptArtefactError: the parts do not fit together.
    """

    manifest: ArtefactManifest
    ann: AnnIndex
    items: pa.Table
    """Ids and attributes, row i is vector i of the index."""
    item_hashes: NDArray[np.uint64]
    """`[N]`, row by row."""

    def __post_init__(self) -> None:
        base = self.ann.base
        num_items, dim = self.manifest.num_items, self.manifest.dim
        in_base = (num_items, dim) if base is None else (base.ntotal, base.d)
        found = (self.ann.num_items, self.ann.dim, *in_base, self.items.num_rows, len(self.item_hashes))
        is_whole = found == (num_items, dim, num_items, dim, num_items, num_items)
        if not is_whole or ITEM_ID not in self.items.column_names:
            raise CorruptArtefactError(f"the stored index: its files do not fit together: {found}")
        if base is not None and base.metric_type != faiss.METRIC_INNER_PRODUCT:
            raise CorruptArtefactError("the stored index: its metric is not the inner product")


@dataclass(frozen=True)
class ArtefactRef:
    """Names one stored index."""

    checkpoint_version: int
    catalogue_version: str
    revision: int


@dataclass(frozen=True)
class StoredIndex:
    """What a store holds in one place."""

    path: str
    """Of its manifest."""
    manifest: ArtefactManifest | None
    problem: str
    """Why the manifest cannot be read; empty when it can."""


def stored_indexes(store: Store) -> list[StoredIndex]:
    """All stored indexes of all checkpoints, shards and layouts: of each state of the catalogue the one that counts.

    Their files are not read. Checkpoints rise; within a checkpoint so do layouts, shards and states of the catalogue.
    """
    newest: dict[str, str] = {}
    for path in store.files(FOLDER):
        revision, folder = _revision(path), path.rsplit("/", 1)[0]
        if revision is not None and revision > (_revision(newest.get(folder, "")) or 0):
            newest[folder] = path
    found = []
    for path in sorted(newest.values(), key=_in_order):
        try:
            found.append(StoredIndex(path, _unsealed(path, store.get(path)), ""))
        except (CorruptArtefactError, NotFoundError) as error:
            found.append(StoredIndex(path, None, str(error)))
    return found


def _in_order(path: str) -> list[int]:
    """The numbers in a path, in which the number of shards comes before the shard's own."""
    numbers = [int(number) for number in re.findall(r"\d+", path)]
    return [numbers[0], numbers[2], numbers[1], *numbers[3:]]


def checkpoint_fingerprint(manifest: Manifest) -> str:
    """sha256 over all files of a checkpoint: a number alone does not say which checkpoint bore it in a store."""
    digests = {path: digest.sha256 for path, digest in manifest.files.items()}
    return hashlib.sha256(_canonical(digests)).hexdigest()


def new_build() -> str:
    """A name that no other build has."""
    return uuid.uuid4().hex


class ArtefactStore:
    """The stored indexes of one shard. All methods block and raise `StoreUnavailableError`."""

    def __init__(self, store: Store, shard: int, num_shards: int) -> None:
        self._store = store
        self._shard = shard
        self._num_shards = num_shards

    def refs(self, checkpoint_version: int) -> list[ArtefactRef]:
        """All that is stored of a checkpoint: of each catalogue state the revision that counts, newest state first."""
        parent = self._parent(checkpoint_version)
        revisions: dict[str, int] = {}
        for path in self._store.files(parent):
            folder, _, _ = path.removeprefix(f"{parent}/").partition("/")
            revision = _revision(path)
            if revision is not None:
                revisions[folder] = max(revision, revisions.get(folder, 0))
        found = [ArtefactRef(checkpoint_version, _unquoted(folder), revision) for folder, revision in revisions.items()]
        return sorted(found, key=lambda ref: _age(ref.catalogue_version), reverse=True)

    def newest(self, checkpoint_version: int) -> ArtefactRef | None:
        """The stored index of the newest catalogue state; None when nothing is stored."""
        return next(iter(self.refs(checkpoint_version)), None)

    def newest_revision(self, checkpoint_version: int, catalogue_version: str) -> int | None:
        """The revision that counts; None when nothing is stored."""
        folder = self._folder(checkpoint_version, catalogue_version)
        revisions = (_revision(path) for path in self._store.files(folder))
        return max((revision for revision in revisions if revision is not None), default=None)

    def manifest(self, ref: ArtefactRef) -> ArtefactManifest:
        """Reads what a stored index is.

        Raises:
            CorruptArtefactError: the manifest is missing or damaged, or describes another index.
        """
        name = f"{self._folder(ref.checkpoint_version, ref.catalogue_version)}/manifest-{ref.revision}.json"
        try:
            manifest = _unsealed(name, self._store.get(name))
        except NotFoundError as error:
            raise CorruptArtefactError(f"{name} is missing") from error
        place = (manifest.checkpoint_version, manifest.catalogue_version, manifest.shard, manifest.num_shards)
        if place != (ref.checkpoint_version, ref.catalogue_version, self._shard, self._num_shards):
            raise CorruptArtefactError(f"{name}: it describes another index: {place}")
        return manifest

    def get(self, ref: ArtefactRef, stopped: threading.Event | None = None) -> LoadedArtefact:
        """Reads a stored index. Nothing is parsed before its size and sha256 are right.

        Args:
            ref: Which one.
            stopped: Ends the reading when it is set; whoever sets it wants no result.

        Raises:
            CorruptArtefactError: a file is missing, differs from its digests, or belongs elsewhere.
        """
        manifest = self.manifest(ref)
        folder = self.folder(manifest)
        sizes = self._store.files(folder)
        for file, stored in manifest.files.items():
            path = f"{folder}/{file}"
            if path not in sizes:
                raise CorruptArtefactError(f"{path} is missing")
            if sizes[path] != stored.size_bytes:
                raise CorruptArtefactError(f"{path}: it differs from its manifest (size or sha256)")
        try:
            return self._read(manifest, folder, stopped or threading.Event())
        except (RuntimeError, ValueError, KeyError, pa.ArrowException) as error:
            raise CorruptArtefactError(f"{folder}: the stored index does not load: {error}") from error

    def base(self, ref: ArtefactRef) -> Any:
        """Reads the FAISS index of a stored index that is not exact, without its vectors and items.

        Raises:
            CorruptArtefactError: it is missing, differs from its digests, or does not load.
        """
        manifest = self.manifest(ref)
        folder = self.folder(manifest)
        try:
            return _ChunkReader(self._store, folder, manifest.files, threading.Event()).read_index(INDEX)
        except (RuntimeError, KeyError) as error:
            raise CorruptArtefactError(f"{folder}: the stored index does not load: {error}") from error

    def put(self, artefact: LoadedArtefact) -> ArtefactManifest:
        """Publishes an index: visible at once and whole, or not at all.

        Returns:
            The manifest as it is stored.

        Raises:
            ConflictError: another build published this revision first; use theirs.
        """
        folder = self._folder(artefact.manifest.checkpoint_version, artefact.manifest.catalogue_version)
        files: dict[str, StoredFile] = {}
        try:
            for file, content in _contents(artefact):
                files[file] = stored_file(content)
                self._store.put_new(f"{folder}/{artefact.manifest.build}/{file}", content)
            manifest = artefact.manifest.model_copy(update={"files": files})
            self._store.put_new(f"{folder}/manifest-{manifest.revision}.json", _sealed(manifest))
        except TwoTowerError:
            # A full disk, for example: what nobody will ever read must not keep it full.
            for file in files:
                with suppress(TwoTowerError):
                    self._store.delete(f"{folder}/{artefact.manifest.build}/{file}")
            raise
        return manifest

    def claim(self, checkpoint_version: int, stale_after_s: float) -> BuildClaim:
        """The claim to build for a checkpoint, whatever the catalogue's state; not taken yet."""
        return BuildClaim(self._store, f"{self._parent(checkpoint_version)}/{_CLAIM}", stale_after_s)

    def prune(self, checkpoint_version: int, created_before: datetime) -> None:
        """Deletes a checkpoint's artefacts that are older than a moment, each manifest before its files.

        Never what another replica, a catalogue version ahead, has just built; nor what is still without a manifest.
        """
        parent = self._parent(checkpoint_version)
        for name in self._store.folders(parent):
            paths = sorted(self._store.files(f"{parent}/{name}"), key=lambda path: _revision(path) is None)
            created = [self._created(path) for path in paths if _revision(path) is not None]
            if created and max(created) < created_before:
                for path in paths:
                    self._store.delete(path)

    def prune_others(self, checkpoint_versions: Collection[int]) -> None:
        """Deletes the artefacts of old checkpoints, of all shards and layouts, each manifest before its files.

        Args:
            checkpoint_versions: Those that the deployment record names. They stay, and so do the newest others, for a
                replica that has not seen the newest record and for an operator who stages the last version again.
        """
        stored = {int(name) for name in self._store.folders(FOLDER) if name.isdigit()}
        for version in sorted(stored.difference(checkpoint_versions))[:-NUM_UNNAMED_KEPT]:
            for path in sorted(self._store.files(f"{FOLDER}/{version}"), key=lambda path: _revision(path) is None):
                self._store.delete(path)

    def _created(self, manifest_path: str) -> datetime:
        try:
            return _unsealed(manifest_path, self._store.get(manifest_path)).created
        except (CorruptArtefactError, NotFoundError):
            return _LONG_AGO

    def _read(self, manifest: ArtefactManifest, folder: str, stopped: threading.Event) -> LoadedArtefact:
        files, num_items = manifest.files, manifest.num_items
        chunks = _ChunkReader(self._store, folder, files, stopped)
        exact = exact_index_of_size(num_items, manifest.dim)
        hashes = np.empty(num_items, dtype="<u8")
        items = np.empty(files[ITEMS].size_bytes, dtype=np.uint8)
        chunks.read_into(VECTORS, vectors_of(exact).reshape(-1).view(np.uint8))
        chunks.read_into(ITEM_HASHES, hashes.view(np.uint8))
        chunks.read_into(ITEMS, items)
        base = None if manifest.index_type == EXACT else chunks.read_index(INDEX)
        table = pa.ipc.open_file(pa.py_buffer(items)).read_all()
        return LoadedArtefact(manifest, AnnIndex(manifest.plan, base, exact), table, hashes)

    def folder(self, manifest: ArtefactManifest) -> str:
        """Where the files of a stored index are."""
        return f"{self._folder(manifest.checkpoint_version, manifest.catalogue_version)}/{manifest.build}"

    def _parent(self, checkpoint_version: int) -> str:
        return f"{FOLDER}/{checkpoint_version}/{self._shard}-of-{self._num_shards}"

    def _folder(self, checkpoint_version: int, catalogue_version: str) -> str:
        return f"{self._parent(checkpoint_version)}/{_quoted(catalogue_version)}"


class _ChunkReader:
    """Reads the files of one stored index chunk by chunk, each verified before it is used."""

    def __init__(self, store: Store, folder: str, files: Mapping[str, StoredFile], stopped: threading.Event) -> None:
        self._store = store
        self._folder = folder
        self._files = files
        self._stopped = stopped

    def read_into(self, file: str, target: NDArray[np.uint8]) -> None:
        """Reads a file to where it stays, several chunks at once."""
        stored = self._files[file]
        if len(target) != stored.size_bytes:
            raise CorruptArtefactError(
                f"{self._folder}/{file}: its files do not fit together: it has {stored.size_bytes} bytes, "
                f"expected {len(target)}"
            )

        def read(number: int) -> None:
            self._fill(target[number * CHUNK_BYTES : (number + 1) * CHUNK_BYTES], file, number)

        with ThreadPoolExecutor(_READERS, "fetch") as readers:
            for _ in readers.map(read, range(len(stored.chunk_sha256))):
                pass

    def read_index(self, file: str) -> Any:
        """Parses a FAISS index while it is read, a verified chunk at a time."""
        source = _ChunkSource(self._chunk(file, number) for number in range(len(self._files[file].chunk_sha256)))
        reader = faiss.PyCallbackIOReader(source.read, CHUNK_BYTES)
        return faiss.read_index(faiss.BufferedIOReader(reader, CHUNK_BYTES))

    def _chunk(self, file: str, number: int) -> memoryview:
        chunk = np.empty(min(CHUNK_BYTES, self._files[file].size_bytes - number * CHUNK_BYTES), dtype=np.uint8)
        self._fill(chunk, file, number)
        return chunk.data

    def _fill(self, target: NDArray[np.uint8], file: str, number: int) -> None:
        """Reads a chunk to where it stays, a piece at a time, and verifies it."""
        path, sha256 = f"{self._folder}/{file}", hashlib.sha256()
        for start in range(0, len(target), _PIECE_BYTES):
            if self._stopped.is_set():
                raise CorruptArtefactError(f"{self._folder}: the rest is not wanted any more")
            place = target[start : start + _PIECE_BYTES]
            try:
                piece = self._store.get_range(path, number * CHUNK_BYTES + start, len(place))
            except NotFoundError as error:
                raise CorruptArtefactError(f"{path} is missing") from error
            if len(piece) != len(place):
                raise CorruptArtefactError(f"{path}: it differs from its manifest (size or sha256)")
            sha256.update(piece)
            place[:] = np.frombuffer(piece, dtype=np.uint8)
        if sha256.hexdigest() != self._files[file].chunk_sha256[number]:
            raise CorruptArtefactError(f"{path}: it differs from its manifest (size or sha256)")


class _ChunkSource:
    """A byte stream for FAISS, made of chunks."""

    def __init__(self, chunks: Iterator[memoryview]) -> None:
        self._chunks = chunks
        self._left = memoryview(b"")

    def read(self, size: int) -> bytes:
        """The next bytes, at most `size`; empty at the end."""
        if not self._left:
            self._left = next(self._chunks, self._left)
        taken, self._left = self._left[:size], self._left[size:]
        return bytes(taken)


def stored_file(content: bytes | memoryview) -> StoredFile:
    """What a file's manifest entry says."""
    view = memoryview(content)
    starts = range(0, len(view), CHUNK_BYTES)
    digests = tuple(hashlib.sha256(view[start : start + CHUNK_BYTES]).hexdigest() for start in starts)
    return StoredFile(size_bytes=len(view), chunk_sha256=digests)


def _contents(artefact: LoadedArtefact) -> Iterator[tuple[str, bytes | memoryview]]:
    """The files of an artefact, one after another, so that one serialised form at a time is in memory."""
    yield VECTORS, _bytes_of(artefact.ann.vectors)
    yield ITEM_HASHES, _bytes_of(artefact.item_hashes)
    yield ITEMS, _arrow_file(artefact.items)
    if artefact.ann.base is not None:
        yield INDEX, stored_part(artefact.ann.base)


def _bytes_of(array: NDArray[Any]) -> memoryview:
    little_endian = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return little_endian.reshape(-1).view(np.uint8).data


def _arrow_file(items: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, items.schema) as writer:
        writer.write_table(items.combine_chunks())
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


def _revision(path: str) -> int | None:
    """The revision of a manifest; None for any other file."""
    match = _MANIFEST.fullmatch(path.rsplit("/", 1)[-1])
    return int(match.group(1)) if match else None


def _sealed(manifest: ArtefactManifest) -> bytes:
    """The manifest with its own sha256, so that a flipped bit in it is seen too."""
    content = manifest.model_dump(mode="json")
    return json.dumps({"sha256": hashlib.sha256(_canonical(content)).hexdigest(), "manifest": content}).encode()


def _unsealed(name: str, content: bytes) -> ArtefactManifest:
    try:
        sealed = json.loads(content)
        if hashlib.sha256(_canonical(sealed["manifest"])).hexdigest() != sealed["sha256"]:
            raise CorruptArtefactError(f"{name}: it differs from its own sha256")
        return ArtefactManifest.model_validate(sealed["manifest"])
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise CorruptArtefactError(f"{name}: it is not a manifest: {error}") from error


def _canonical(content: object) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def _quoted(catalogue_version: str) -> str:
    """A folder name, whatever the version's characters; stores treat `%` in their own ways."""
    return "v" + quote(catalogue_version, safe="").replace("%", "=")


def _unquoted(folder: str) -> str:
    return unquote(folder.removeprefix("v").replace("=", "%"))


def _age(catalogue_version: str) -> tuple[int, int]:
    """Rises as the catalogue changes: both numbers of a version only ever grow."""
    match = _CATALOGUE_VERSION.fullmatch(catalogue_version)
    return (int(match.group(1)), int(match.group(2))) if match else (-1, -1)
