"""Built indexes in the object store: a cache that any replica can fill, and that may be lost at any moment.

Deliberately does not know how an index is built or searched; it hands out verified bytes.

The layout, below `indexes/<checkpoint_version>/<shard>-of-<num_shards>/<catalogue_version>/`:

    manifest-<revision>.json    what the artefact is; written LAST, put-if-absent; the highest revision counts
    <build>/index.faiss         the serialised FAISS index
    <build>/items.arrow         ids and attributes (Arrow IPC file), row i is vector i of the index
    <build>/item_hashes.u64     little-endian uint64, xxh3_64 of each item id, rising: the rows are in this order

Every build writes into a folder of its own, so two builders never mix files; of two that finish together the manifest
picks one. Nothing is ever overwritten: a refused artefact is replaced by a manifest of the next revision. Artefacts of
older catalogues are pruned as the catalogue moves on; those of checkpoints that no deployment record names stay.
"""

import hashlib
import json
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from towers.checkpoint import FileDigest, Manifest
from towers.errors import CorruptArtefactError, NotFoundError
from towers.store import Store

FOLDER = "indexes"
INDEX = "index.faiss"
ITEMS = "items.arrow"
ITEM_HASHES = "item_hashes.u64"
FIRST_REVISION = 1
EXACT = "Flat"
"""Index type of an exact index."""
_LONG_AGO = datetime.min.replace(tzinfo=UTC)
_MANIFEST = re.compile(r"manifest-(\d+)\.json")


class SearchEffort(BaseModel):
    """How many lists of an IVF index are probed, and what that was measured to give."""

    model_config = ConfigDict(frozen=True)

    k: int = Field(ge=1)
    """Applies to searches for up to this many items."""
    nprobe: int = Field(ge=1)
    recall: float
    """Recall@k against exact search on a sample of the items."""


class ArtefactManifest(BaseModel):
    """What a stored index is."""

    model_config = ConfigDict(frozen=True)

    format: Literal[1] = 1
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
    dim: int
    num_items: int
    num_quarantined: int
    index_type: str
    search_efforts: tuple[SearchEffort, ...]
    """By rising k; none for an exact index."""
    golden_difference: float
    """Of the item tower on the machine that built the index."""
    files: Mapping[str, FileDigest]


@dataclass(frozen=True)
class Artefact:
    """A stored index: its manifest and the bytes of its files, verified."""

    manifest: ArtefactManifest
    files: Mapping[str, bytes]


def checkpoint_fingerprint(manifest: Manifest) -> str:
    """sha256 over all files of a checkpoint: a number alone does not say which checkpoint bore it in a store."""
    digests = {path: digest.sha256 for path, digest in manifest.files.items()}
    return hashlib.sha256(_canonical(digests)).hexdigest()


def digest_of(content: bytes) -> FileDigest:
    """What a file's manifest entry says."""
    return FileDigest(sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content))


def new_build() -> str:
    """A name that no other build has."""
    return uuid.uuid4().hex


class ArtefactStore:
    """The stored indexes of one shard. All methods block and raise `StoreUnavailableError`."""

    def __init__(self, store: Store, shard: int, num_shards: int) -> None:
        self._store = store
        self._shard = shard
        self._num_shards = num_shards

    def newest_revision(self, checkpoint_version: int, catalogue_version: str) -> int | None:
        """The revision that counts; None when nothing is stored."""
        folder = self._folder(checkpoint_version, catalogue_version)
        revisions = (_revision(path) for path in self._store.files(folder))
        return max((revision for revision in revisions if revision is not None), default=None)

    def get(self, checkpoint_version: int, catalogue_version: str, revision: int) -> Artefact:
        """Reads an artefact. Nothing is parsed before its size and sha256 are right.

        Raises:
            CorruptArtefactError: a file is missing, differs from its digest, or belongs elsewhere.
        """
        folder = self._folder(checkpoint_version, catalogue_version)
        name = f"{folder}/manifest-{revision}.json"
        manifest = _unsealed(name, self._read(name))
        place = (manifest.checkpoint_version, manifest.catalogue_version, manifest.shard, manifest.num_shards)
        if place != (checkpoint_version, catalogue_version, self._shard, self._num_shards):
            raise CorruptArtefactError(f"{name}: it describes another index: {place}")
        files: dict[str, bytes] = {}
        for file in (INDEX, ITEMS, ITEM_HASHES):
            path = f"{folder}/{manifest.build}/{file}"
            files[file] = self._read(path)
            if digest_of(files[file]) != manifest.files.get(file):
                raise CorruptArtefactError(f"{path}: it differs from its manifest (size or sha256)")
        return Artefact(manifest, files)

    def put(self, artefact: Artefact) -> None:
        """Publishes an artefact: visible at once and whole, or not at all.

        Raises:
            ConflictError: another build published this revision first; use theirs.
        """
        manifest = artefact.manifest
        folder = self._folder(manifest.checkpoint_version, manifest.catalogue_version)
        for file, content in artefact.files.items():
            self._store.put_new(f"{folder}/{manifest.build}/{file}", content)
        self._store.put_new(f"{folder}/manifest-{manifest.revision}.json", _sealed(manifest))

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

    def _created(self, manifest_path: str) -> datetime:
        try:
            return _unsealed(manifest_path, self._read(manifest_path)).created
        except CorruptArtefactError:
            return _LONG_AGO

    def _read(self, path: str) -> bytes:
        try:
            return self._store.get(path)
        except NotFoundError as error:
            raise CorruptArtefactError(f"{path} is missing") from error

    def _parent(self, checkpoint_version: int) -> str:
        return f"{FOLDER}/{checkpoint_version}/{self._shard}-of-{self._num_shards}"

    def _folder(self, checkpoint_version: int, catalogue_version: str) -> str:
        return f"{self._parent(checkpoint_version)}/{_quoted(catalogue_version)}"


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
