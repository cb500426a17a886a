"""Checkpoints: immutable, versioned folders that hold both towers and all they need.

Deliberately does not know how a tower is trained or run; it hands out verified bytes.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from towers.errors import ConflictError, CorruptArtefactError, InvalidSchemaError, NotFoundError, TwoTowerError
from towers.schema import FeatureSchema, Owner, schema_from_json
from towers.store import Store

FOLDER = "checkpoints"
MANIFEST = "manifest.json"
SCHEMA = "schema.json"
GOLDEN = "golden.json"
VALIDATION_QUERIES = "validation_queries.f32"
"""`[Q, D]` little-endian float32: embeddings of queries that training did not see. A checkpoint may lack it."""
MAX_VALIDATION_QUERIES = 2000
_LARGEST_NORM_ERROR = 1e-3
TOWER_FILES: Mapping[Owner, str] = {"query": "query_tower.onnx", "item": "item_tower.onnx"}


class FileDigest(BaseModel):
    """What a file must be."""

    model_config = ConfigDict(frozen=True)

    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class EpochFigures:
    """What one epoch of training came to."""

    loss: float
    """Mean over its steps."""
    masked: float
    """Share of the negatives that were left out because the user is known to like the item."""
    left: float
    """Share that was not, although validation shows that the user likes the item."""
    temperature: float
    """That scores were divided by at its end."""
    metric: float | None
    """Of `[evaluation] metric`, on validation after it; None where nothing is held out."""


class Forced(BaseModel):
    """Who published a checkpoint although gates refused it, and why."""

    model_config = ConfigDict(frozen=True)

    by: str
    reason: str
    refusals: Sequence[str]


class Manifest(BaseModel):
    """What a checkpoint is. Written last: no manifest, no checkpoint."""

    model_config = ConfigDict(frozen=True)

    version: int = Field(ge=1)
    created: datetime
    dim: int = Field(ge=1)
    metric: Literal["inner_product"] = "inner_product"
    schema_fingerprint: str
    files: Mapping[str, FileDigest]
    metrics: Mapping[str, float]
    """Offline figures, for example `test.recall_at_10`."""
    config: Mapping[str, Any]
    """The training configuration."""
    data_window: tuple[datetime, datetime] | None
    """First and last interaction trained on."""
    code_revision: str
    parent_version: int | None
    forced: Forced | None = None
    """None where no gate was overridden."""
    reranker_features: tuple[str, ...] = ()
    """Declared features that need both sides and are in no tower, by name."""
    epochs: tuple[EpochFigures, ...] = ()
    """Of the training, in order; none in checkpoints of releases that did not keep them."""


class GoldenExamples(BaseModel):
    """Raw features of one tower and the embeddings that they must give."""

    model_config = ConfigDict(frozen=True)

    features: Sequence[Mapping[str, Any]]
    embeddings: Sequence[Sequence[float]]


@dataclass(frozen=True)
class CheckpointDraft:
    """All of a checkpoint but its number."""

    dim: int
    schema: FeatureSchema
    vocabularies: Mapping[str, Sequence[str]]
    towers: Mapping[Owner, bytes]
    golden: Mapping[Owner, GoldenExamples]
    metrics: Mapping[str, float]
    config: Mapping[str, Any]
    data_window: tuple[datetime, datetime] | None
    code_revision: str
    parent_version: int | None
    validation_queries: NDArray[np.float32] | None = None
    """`[Q, D]` unit embeddings of held-out queries by the exported query tower; indexes are tuned with them."""
    forced: Forced | None = None
    tokenizers: Mapping[str, str] = field(default_factory=dict)
    """Content of the tokenizer files of pretrained text encoders, by feature."""
    reranker_features: tuple[str, ...] = ()
    """Declared features that need both sides and are in no tower, by name."""
    epochs: tuple[EpochFigures, ...] = ()
    """Of the training, in order."""


@dataclass(frozen=True)
class TowerFiles:
    """One tower of a checkpoint, every file verified against the manifest."""

    owner: Owner
    manifest: Manifest
    schema: FeatureSchema
    vocabularies: Mapping[str, Sequence[str]]
    golden: GoldenExamples
    onnx: bytes
    tokenizers: Mapping[str, str] = field(default_factory=dict)
    """Content of its encoders' tokenizer files, by feature."""


class CheckpointStore:
    """The checkpoints of one object store. All methods block and raise `StoreUnavailableError`."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def versions(self) -> list[int]:
        """Published versions, rising."""
        paths = self._store.files(FOLDER)
        published = (re.fullmatch(rf"{FOLDER}/(\d+)/{re.escape(MANIFEST)}", path) for path in paths)
        return sorted(int(match.group(1)) for match in published if match)

    def manifest(self, version: int) -> Manifest:
        """Reads a manifest.

        Raises:
            NotFoundError: the version is not published.
            CorruptArtefactError: the manifest cannot be parsed.
        """
        try:
            content = self._store.get(_path(version, MANIFEST))
        except NotFoundError as error:
            raise NotFoundError(f"checkpoint {version} is not published; published: {self.versions()}") from error
        try:
            manifest = Manifest.model_validate_json(content)
        except ValidationError as error:
            raise CorruptArtefactError(f"checkpoint {version}: its manifest is not valid: {error}") from error
        if manifest.version != version:
            raise CorruptArtefactError(f"checkpoint {version}: its manifest says version {manifest.version}")
        return manifest

    def load(self, version: int, owner: Owner) -> TowerFiles:
        """Reads and verifies one tower. Nothing is parsed before its size and sha256 are right.

        Raises:
            NotFoundError: the version is not published.
            CorruptArtefactError: a file is missing, differs from the manifest or cannot be parsed.
        """
        manifest = self.manifest(version)
        try:
            schema = schema_from_json(self._verified(manifest, SCHEMA))
        except InvalidSchemaError as error:
            raise CorruptArtefactError(f"checkpoint {version}: {SCHEMA} is not a schema: {error}") from error
        if schema.fingerprint != manifest.schema_fingerprint:
            raise CorruptArtefactError(f"checkpoint {version}: {SCHEMA} is not the schema that the manifest names")
        vocabularies: dict[str, list[str]] = {}
        for name in schema.vocabulary_names(owner):
            path = _vocabulary(name)
            tokens = _parsed(version, path, self._verified(manifest, path))
            if not isinstance(tokens, list) or set(map(type, tokens)) - {str}:
                raise CorruptArtefactError(f"checkpoint {version}: {path} is not a list of strings")
            vocabularies[name] = tokens
        golden = _parsed(version, GOLDEN, self._verified(manifest, GOLDEN))
        try:
            examples = GoldenExamples.model_validate(golden[owner])
        except (ValidationError, KeyError, TypeError) as error:
            raise CorruptArtefactError(f"checkpoint {version}: {GOLDEN} has no valid {owner} examples") from error
        onnx = self._verified(manifest, TOWER_FILES[owner])
        tokenizers = {
            name: self._verified(manifest, _tokenizer(name)).decode(errors="replace")
            for name in schema.tokenizer_names(owner)
        }
        return TowerFiles(owner, manifest, schema, vocabularies, examples, onnx, tokenizers)

    def validation_queries(self, manifest: Manifest) -> NDArray[np.float32] | None:
        """Reads the held-out query embeddings `[Q, D]` of a checkpoint, without its towers; None where it has none.

        Raises:
            CorruptArtefactError: the file is missing, differs from the manifest or does not hold unit vectors.
        """
        if VALIDATION_QUERIES not in manifest.files:
            return None
        numbers = self._verified(manifest, VALIDATION_QUERIES)
        if len(numbers) % (4 * manifest.dim):
            raise CorruptArtefactError(
                f"checkpoint {manifest.version}: {VALIDATION_QUERIES} has {len(numbers)} bytes, which are no rows of "
                f"{manifest.dim} numbers"
            )
        embeddings = np.frombuffer(numbers, dtype="<f4").reshape(-1, manifest.dim)  # [Q, D]
        norms = np.linalg.norm(embeddings, axis=1)  # [Q]
        if not (np.abs(norms - 1.0) <= _LARGEST_NORM_ERROR).all():
            raise CorruptArtefactError(
                f"checkpoint {manifest.version}: {VALIDATION_QUERIES} does not hold unit vectors"
            )
        return embeddings

    def publish(self, draft: CheckpointDraft) -> Manifest:
        """Publishes a checkpoint under the next free number; visible at once and whole, or not at all.

        Every file is put only if absent, so the first one claims the number: of two publishers that race, one wins.

        Raises:
            ConflictError: another publisher took the number; nothing of this one is visible. Publish again.
        """
        claimed = [int(name) for name in self._store.folders(FOLDER) if name.isdigit()]
        version = max(claimed, default=0) + 1
        files = _file_contents(draft)
        manifest = Manifest(
            version=version,
            created=datetime.now(UTC),
            dim=draft.dim,
            schema_fingerprint=draft.schema.fingerprint,
            files={
                path: FileDigest(sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content))
                for path, content in files.items()
            },
            metrics=draft.metrics,
            config=draft.config,
            data_window=draft.data_window,
            code_revision=draft.code_revision,
            parent_version=draft.parent_version,
            forced=draft.forced,
            reranker_features=draft.reranker_features,
            epochs=draft.epochs,
        )
        files[MANIFEST] = manifest.model_dump_json(indent=1).encode()
        is_claimed = False
        try:
            for path, content in files.items():
                self._store.put_new(_path(version, path), content)
                is_claimed = True
        except TwoTowerError as error:
            if self._holds_manifest(version, files[MANIFEST]):
                return manifest  # Only the answer was lost.
            if is_claimed:
                # The claim goes last, so that nobody takes the number while files of ours are left.
                for path in reversed(files):
                    self._store.delete(_path(version, path))
            if isinstance(error, ConflictError):
                raise ConflictError(f"another publisher took checkpoint {version}; publish again") from error
            raise
        return manifest

    def _holds_manifest(self, version: int, content: bytes) -> bool:
        try:
            return self._store.get(_path(version, MANIFEST)) == content
        except NotFoundError:
            return False

    def _verified(self, manifest: Manifest, path: str) -> bytes:
        digest = manifest.files.get(path)
        if digest is None:
            raise CorruptArtefactError(f"checkpoint {manifest.version}: the manifest does not name {path}")
        try:
            content = self._store.get(_path(manifest.version, path))
        except NotFoundError as error:
            raise CorruptArtefactError(f"checkpoint {manifest.version}: {path} is missing") from error
        if len(content) != digest.size_bytes or hashlib.sha256(content).hexdigest() != digest.sha256:
            raise CorruptArtefactError(
                f"checkpoint {manifest.version}: {path} differs from the manifest (size or sha256)"
            )
        return content


def _path(version: int, file: str) -> str:
    return f"{FOLDER}/{version}/{file}"


def _vocabulary(name: str) -> str:
    return f"vocabulary/{name}.json"


def _tokenizer(name: str) -> str:
    return f"tokenizer/{name}.json"


def _parsed(version: int, path: str, content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError as error:
        raise CorruptArtefactError(f"checkpoint {version}: {path} is not JSON: {error}") from error


def _file_contents(draft: CheckpointDraft) -> dict[str, bytes]:
    golden = {owner: examples.model_dump(mode="json") for owner, examples in draft.golden.items()}
    files = {SCHEMA: draft.schema.to_json(), GOLDEN: json.dumps(golden).encode()}
    for name, tokens in draft.vocabularies.items():
        files[_vocabulary(name)] = json.dumps(list(tokens)).encode()
    for name, tokenizer in draft.tokenizers.items():
        files[_tokenizer(name)] = tokenizer.encode()
    for owner, file in TOWER_FILES.items():
        files[file] = draft.towers[owner]
    if draft.validation_queries is not None:
        files[VALIDATION_QUERIES] = draft.validation_queries.astype("<f4").tobytes()
    return files
