"""A delta at rest: what live updates put beside one stored index, in one object, for a restart to go on from.

Deliberately does not know how a delta is searched, nor when it is worth saving.

It says nothing that the stored index and the change log do not say: without it a restart reads more of the log, and
embeds again what it reads.
"""

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from index_service.row_set import RowSet
from towers.errors import ConflictError, CorruptArtefactError, NotFoundError
from towers.store import Store

_NUM_KEPT = 2
"""Of one index: whoever has listed the last one may still read it."""
_FORMAT = 1
_EMBEDDING = "_embedding"
_ROW = "_row"
"""Columns beside the attributes, whose names never begin with an underscore."""
_FACTS = b"facts"
_ALIVE = b"alive"
_DIGEST_BYTES = hashlib.sha256().digest_size
_NAME = re.compile(r"delta-(\d+)\.(\d+)\.arrow")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SavedDelta:
    """A state of the catalogue, told as what differs from a built index of R rows."""

    catalogue_version: str
    alive: RowSet
    """Which of the R rows were neither replaced nor deleted."""
    patched_rows: NDArray[np.int64]
    """`[P]` rows that have new attributes."""
    patched_items: pa.Table
    """`[P]` `item_id` and attributes."""
    items: pa.Table
    """`[N]` `item_id` and attributes of the items that have an embedding of their own."""
    embeddings: NDArray[np.float32]
    """`[N, D]` of unit length."""
    quarantined: Mapping[str, str]
    """Items that could not be embedded, each with the reason."""

    @property
    def size_bytes(self) -> int:
        """In memory."""
        return int(self.items.nbytes + self.patched_items.nbytes + self.patched_rows.nbytes + self.embeddings.nbytes)


def put_delta(store: Store, folder: str, delta: SavedDelta) -> None:
    """Keeps a delta in the folder of its index, and deletes older ones.

    Raises:
        StoreUnavailableError: it is not kept.
    """
    try:
        store.put_new(f"{folder}/delta-{delta.catalogue_version}.arrow", _packed(delta))
    except ConflictError:
        return  # Another replica has kept the same state.
    for path in _paths(store, folder)[_NUM_KEPT:]:
        store.delete(path)


def newest_delta(store: Store, folder: str) -> SavedDelta | None:
    """The newest delta of an index that can be read; None where there is none."""
    for path in _paths(store, folder):
        try:
            return _unpacked(path, store.get(path))
        except NotFoundError:
            continue
        except CorruptArtefactError as error:
            _log.warning("more of the change log is read: %s", error)
    return None


def _paths(store: Store, folder: str) -> list[str]:
    """Of the deltas in a folder, the newest state first."""
    found = {path: _NAME.fullmatch(path.rsplit("/", 1)[-1]) for path in store.files(folder)}
    ages = {path: (int(match[1]), int(match[2])) for path, match in found.items() if match}
    return sorted(ages, key=lambda path: ages[path], reverse=True)


def _packed(delta: SavedDelta) -> memoryview:
    """sha256, then two Arrow streams: the items with their embeddings, and those that only have new attributes."""
    facts = {
        "format": _FORMAT,
        "catalogue_version": delta.catalogue_version,
        "num_rows": delta.alive.num_rows,
        "quarantined": dict(delta.quarantined),
    }
    metadata = {_FACTS: json.dumps(facts).encode(), _ALIVE: delta.alive.words.astype("<u8").tobytes()}
    dim = delta.embeddings.shape[1]
    embeddings = pa.FixedSizeListArray.from_arrays(pa.array(delta.embeddings.reshape(-1), pa.float32()), dim)
    body = pa.BufferOutputStream()
    for table in (
        delta.items.append_column(_EMBEDDING, embeddings).replace_schema_metadata(metadata),
        delta.patched_items.append_column(_ROW, pa.array(delta.patched_rows, pa.int64())),
    ):
        with pa.ipc.new_stream(body, table.schema) as writer:
            writer.write_table(table)
    content = body.getvalue()
    sealed = pa.BufferOutputStream()
    sealed.write(hashlib.sha256(content).digest())
    sealed.write(content)
    return memoryview(sealed.getvalue()).cast("B")


def _unpacked(path: str, content: bytes) -> SavedDelta:
    """Nothing is parsed before its sha256 is right."""
    body = memoryview(content)[_DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != content[:_DIGEST_BYTES]:
        raise CorruptArtefactError(f"{path}: it differs from its own sha256")
    source = pa.BufferReader(pa.py_buffer(body))
    items, patched = pa.ipc.open_stream(source).read_all(), pa.ipc.open_stream(source).read_all()
    metadata = items.schema.metadata
    facts: dict[str, Any] = json.loads(metadata[_FACTS])
    if facts["format"] != _FORMAT:
        raise CorruptArtefactError(f"{path}: it has format {facts['format']}, expected {_FORMAT}")
    embeddings = items[_EMBEDDING].combine_chunks()
    return SavedDelta(
        catalogue_version=facts["catalogue_version"],
        alive=RowSet.of_words(np.frombuffer(metadata[_ALIVE], "<u8"), facts["num_rows"]),
        patched_rows=patched[_ROW].to_numpy(),
        patched_items=patched.drop_columns([_ROW]),
        items=items.drop_columns([_EMBEDDING]).replace_schema_metadata(None),
        embeddings=embeddings.flatten().to_numpy().reshape(len(items), embeddings.type.list_size),
        quarantined=facts["quarantined"],
    )
