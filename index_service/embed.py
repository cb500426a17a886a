"""Items to embeddings, through the item tower of one checkpoint: the same for a build and for live updates.

Deliberately does not know which items, nor where their embeddings go.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from towers.catalogue_columns import ITEM_ID
from towers.errors import InvalidFeatureError
from towers.features import Arrays, RawValue
from towers.tower import Tower

_BATCH_SIZE = 512
_NUM_NAMED = 50
"""Quarantined items that are logged one by one."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EmbeddedItems:
    """The items that have an embedding, and those that have none."""

    items: pa.Table
    embeddings: NDArray[np.float32]
    """`[N, D]`, row i belongs to row i of `items`."""
    quarantined: Mapping[str, str]
    """Item id to the reason: its features do not encode, or its embedding is not finite."""


def embed_items(tower: Tower, items: pa.Table, report: Callable[[float], None]) -> EmbeddedItems:
    """Embeds items. Those whose features do not encode, or whose embedding is not finite, are quarantined.

    Args:
        tower: The item tower.
        items: `item_id` and attributes; a column that the tower reads and the table lacks is missing in every row.
        report: Told the share of the items that is done.
    """
    columns = {f.name: f.column for f in tower.encoder.features if f.column in items.column_names}
    embeddings = np.empty((items.num_rows, tower.dim), dtype=np.float32)
    reasons: dict[int, str] = {}
    for start in range(0, items.num_rows, _BATCH_SIZE):
        batch = items.slice(start, _BATCH_SIZE)
        values = {name: batch.column(column).to_pylist() for name, column in columns.items()}
        arrays, kept, refused = _encode(tower, values, batch.num_rows)
        if len(kept):
            embeddings[start + kept] = tower.embed(arrays)
        reasons |= {start + row: reason for row, reason in refused.items()}
        report((start + batch.num_rows) / items.num_rows)
    is_kept = np.ones(items.num_rows, dtype=bool)
    is_kept[list(reasons)] = False
    for row in np.flatnonzero(is_kept & ~np.isfinite(embeddings).all(axis=1)).tolist():
        reasons[row] = "its embedding is not finite"
        is_kept[row] = False
    ids = items.column(ITEM_ID)
    quarantined = {ids[row].as_py(): reason for row, reason in sorted(reasons.items())}
    for item_id, reason in list(quarantined.items())[:_NUM_NAMED]:
        _log.warning("checkpoint %d: item %r is quarantined: %s", tower.version, item_id, reason)
    if len(quarantined) > _NUM_NAMED:
        _log.warning("checkpoint %d: %d more items are quarantined", tower.version, len(quarantined) - _NUM_NAMED)
    return EmbeddedItems(items.filter(pa.array(is_kept)), embeddings[is_kept], quarantined)


def _encode(
    tower: Tower, values: dict[str, list[RawValue]], num_rows: int
) -> tuple[Arrays, NDArray[np.int64], dict[int, str]]:
    """Encodes a batch: arrays of the rows that encode, their numbers, and why each of the others does not."""
    try:
        return tower.encoder.encode(values, num_rows), np.arange(num_rows), {}
    except InvalidFeatureError:
        pass
    refused: dict[int, str] = {}
    for row in range(num_rows):
        try:
            tower.encoder.encode({name: [column[row]] for name, column in values.items()}, 1)
        except InvalidFeatureError as error:
            refused[row] = error.reason
    kept = np.array([row for row in range(num_rows) if row not in refused], dtype=np.int64)
    arrays = tower.encoder.encode({name: [column[row] for row in kept] for name, column in values.items()}, len(kept))
    return arrays, kept, refused
