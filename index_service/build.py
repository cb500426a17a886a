"""Builds the index of one shard, in a process of its own: `python -m index_service.build …`.

Deliberately does not know who asked for it, nor what is served. Progress goes to stderr for people and to stdout, one
JSON object a line, for the process that started it.
"""

import argparse
import itertools
import logging
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from index_service.ann import AnnIndex, exact_index, in_order_of_lists
from index_service.artefact import (
    MOST_NAMED,
    ArtefactManifest,
    ArtefactStore,
    LoadedArtefact,
    checkpoint_fingerprint,
    new_build,
)
from index_service.embed import EmbeddedItems, embed_items
from index_service.order import BuildMessage, BuildOrder, CorruptCheckpointError
from index_service.plan import EXACT, IndexPlan, TuningGoal
from index_service.recall import QuerySample, query_sample
from index_service.tune import retuned, tuned
from towers.catalogue import Catalogue, partition
from towers.catalogue_columns import ITEM_ID
from towers.checkpoint import CheckpointStore, Manifest
from towers.errors import ConflictError, CorruptArtefactError, InvalidInputError, TwoTowerError
from towers.parent import end_with_parent, message_stream
from towers.placement import hashes_of
from towers.store import Store
from towers.tower import Tower

_EMBEDDING_SHARE = 0.6
"""Of the whole work; then comes the index, and at last the writing."""
_INDEX_SHARE = 0.95
_SIMILAR_SIZE = 1.5
"""Up to this ratio between the numbers of items an earlier choice of index holds."""
_SCORED_ITEMS = 1000

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreviousIndex:
    """An index that was built before, from the same checkpoint and for the same goal."""

    base: Any
    """FAISS's index."""
    plan: IndexPlan


@dataclass(frozen=True)
class EmbeddedShard:
    """What an index is made of."""

    checkpoint: Manifest
    catalogue_version: str
    items: EmbeddedItems
    validation_queries: NDArray[np.float32] | None
    """`[V, D]` those of the checkpoint; None where it has none."""
    golden_difference: float
    """Of the item tower on this machine."""


def build(order: BuildOrder, report: Callable[[float], None]) -> ArtefactManifest:
    """Embeds the shard's items, builds the index and publishes it.

    Args:
        order: What to build.
        report: Told the share of the work that is done.

    Returns:
        The manifest of this build.

    Raises:
        ConflictError: another build was published first; use that one.
        CorruptCheckpointError: the checkpoint's item tower is damaged or drifts.
        TwoTowerError: the checkpoint, the catalogue or the store does not allow it; the message says why.
    """
    store = Store(order.store)
    embedded = embed_shard(
        store,
        order.checkpoint_version,
        order.catalogue_version,
        order.shard,
        order.num_shards,
        lambda share: report(share * _EMBEDDING_SHARE),
    )
    artefacts = ArtefactStore(store, order.shard, order.num_shards)
    artefact = artefact_of(
        order,
        embedded.checkpoint,
        embedded.golden_difference,
        embedded.items,
        embedded.validation_queries,
        previous_index(artefacts, order, embedded.checkpoint, embedded.items.items.num_rows),
        lambda share: report(_EMBEDDING_SHARE + share * (_INDEX_SHARE - _EMBEDDING_SHARE)),
    )
    manifest = artefacts.put(artefact)
    report(1.0)
    return manifest


def embed_shard(
    store: Store,
    checkpoint_version: int,
    catalogue_version: str | None,
    shard: int,
    num_shards: int,
    report: Callable[[float], None],
) -> EmbeddedShard:
    """Reads a checkpoint and the catalogue, and embeds the items of a shard.

    Args:
        store: Where both are.
        checkpoint_version: Whose item tower embeds.
        catalogue_version: The state of the catalogue; the one now when left out.
        shard: Number of the shard.
        num_shards: How many there are.
        report: Told the share of the items that is done.

    Raises:
        CorruptCheckpointError: the checkpoint's item tower is damaged or drifts.
        TwoTowerError: the checkpoint, the catalogue or the store does not allow it; the message says why.
    """
    checkpoint, tower, validation_queries = _of_checkpoint(store, checkpoint_version)
    catalogue = Catalogue(store).read(catalogue_version)
    if catalogue.items.num_rows == 0:
        raise InvalidInputError("the catalogue has no items; load some: twotower catalog load items.parquet")
    items = embed_all(tower, partition(catalogue.items, shard, num_shards), report)
    return EmbeddedShard(checkpoint, catalogue.version, items, validation_queries, tower.golden_difference)


def artefact_of(
    order: BuildOrder,
    checkpoint: Manifest,
    golden_difference: float,
    embedded: EmbeddedItems,
    validation_queries: NDArray[np.float32] | None = None,
    previous: PreviousIndex | None = None,
    report: Callable[[float], None] = lambda _: None,
) -> LoadedArtefact:
    """Builds the index of embedded items, and all that belongs to it.

    Args:
        order: What to build.
        checkpoint: Whose towers made the embeddings.
        golden_difference: Of the item tower on this machine.
        embedded: The items.
        validation_queries: `[V, D]` those of the checkpoint; None where it has none.
        previous: An earlier index whose choice may hold; it is used up.
        report: Told the share of the work that is done.

    Raises:
        InvalidInputError: nothing reaches the goal within its bounds.
    """
    embedded, hashes = _in_order_of_hash(embedded)
    queries = query_sample(embedded.embeddings, validation_queries)
    score_mean, score_deviation = score_spread(queries, embedded.embeddings)
    ann, rows = in_order_of_lists(built_ann(exact_index(embedded.embeddings), queries, order.goal, previous, report))
    manifest = ArtefactManifest(
        revision=order.revision,
        build=new_build(),
        created=datetime.now(UTC),
        checkpoint_version=order.checkpoint_version,
        checkpoint_fingerprint=checkpoint_fingerprint(checkpoint),
        catalogue_version=order.catalogue_version,
        shard=order.shard,
        num_shards=order.num_shards,
        dim=checkpoint.dim,
        num_items=embedded.items.num_rows,
        num_quarantined=len(embedded.quarantined),
        quarantined=dict(itertools.islice(embedded.quarantined.items(), MOST_NAMED)),
        plan=ann.plan,
        goal=order.goal,
        measured_with=queries.measured_with,
        item_similarity=item_similarity(embedded.embeddings),
        score_mean=score_mean,
        score_deviation=score_deviation,
        golden_difference=golden_difference,
    )
    return LoadedArtefact(manifest, ann, embedded.items.take(pa.array(rows)), hashes[rows])


def embed_all(tower: Tower, items: pa.Table, report: Callable[[float], None]) -> EmbeddedItems:
    """Embeds the items of a shard.

    Args:
        tower: The item tower.
        items: The shard's items, with at least the columns that the tower's features need.
        report: Told the share of the items that is done.

    Raises:
        InvalidInputError: a column is missing, or not one item could be embedded.
    """
    for feature in tower.encoder.features:
        if feature.column not in items.column_names:
            raise InvalidInputError(
                f"the catalogue has no column {feature.column!r}, which feature {feature.name!r} of checkpoint "
                f"{tower.version} needs; load items that have it: twotower catalog load items.parquet"
            )
    embedded = embed_items(tower, items, report)
    if embedded.quarantined and not embedded.items.num_rows:
        item_id, reason = next(iter(embedded.quarantined.items()))
        raise InvalidInputError(
            f"not one of {len(embedded.quarantined)} items could be embedded by checkpoint {tower.version}; "
            f"for example {item_id!r}: {reason}"
        )
    return embedded


def built_ann(
    exact: Any,
    queries: QuerySample,
    goal: TuningGoal,
    previous: PreviousIndex | None,
    report: Callable[[float], None],
) -> AnnIndex:
    """The index of these vectors: of the kind of the earlier one where that still reaches the goal, else newly chosen.

    Args:
        exact: `IndexFlatIP` of the N items.
        queries: What to measure with.
        goal: What to reach.
        previous: The index of the same checkpoint for an earlier state of the catalogue; it is used up.
        report: Told the share of the work that is done.

    Raises:
        InvalidInputError: nothing reaches the goal within its bounds.
    """
    if previous is not None:
        ann = retuned(previous.base, exact, queries, previous.plan, goal)
        if ann is not None:
            return ann
        _log.info("%s does not reach the goal any more; the kind of index is chosen anew", previous.plan.index_type)
    choice = tuned(exact, queries, goal, report)
    for candidate in choice.candidates:
        _log.info("%s: %s", candidate.index_type, candidate.verdict)
    return choice.ann


def previous_index(
    artefacts: ArtefactStore, order: BuildOrder, checkpoint: Manifest, num_items: int
) -> PreviousIndex | None:
    """The newest stored index whose choice holds for these items too; None where there is none that can be read."""
    fingerprint = checkpoint_fingerprint(checkpoint)
    for ref in artefacts.refs(order.checkpoint_version):
        try:
            manifest = artefacts.manifest(ref)
            is_similar = (
                num_items <= _SIMILAR_SIZE * manifest.num_items and manifest.num_items <= _SIMILAR_SIZE * num_items
            )
            is_same = (manifest.checkpoint_fingerprint, manifest.goal) == (fingerprint, order.goal)
            if is_same and is_similar and manifest.index_type != EXACT:
                return PreviousIndex(artefacts.base(ref), manifest.plan)
        except CorruptArtefactError as error:
            _log.warning("an earlier index is not used: %s", error)
    return None


def item_similarity(vectors: NDArray[np.float32]) -> float:
    """Mean cosine of all pairs of different items, `[N, D]` unit vectors; 0 where there are no pairs."""
    num_items = len(vectors)
    if num_items < 2:
        return 0.0
    total = vectors.sum(axis=0, dtype=np.float64)  # [D]
    # The squared norm of the sum holds every pair twice and each item with itself.
    return float((total @ total - np.square(vectors, dtype=np.float64).sum()) / (num_items * (num_items - 1)))


def score_spread(queries: QuerySample, vectors: NDArray[np.float32]) -> tuple[float, float]:
    """Mean and standard deviation of the scores of the queries with sampled items; zeros where there are no items."""
    rows = np.linspace(0, len(vectors) - 1, min(_SCORED_ITEMS, len(vectors))).astype(np.int64)
    scores = queries.embeddings @ vectors[rows].T  # [Q, S]
    is_other = np.ones(scores.shape, dtype=bool)
    if queries.own_rows is not None:
        is_other = queries.own_rows[:, None] != rows
    others = scores[is_other]
    return (float(others.mean()), float(others.std())) if len(others) else (0.0, 0.0)


def _of_checkpoint(store: Store, version: int) -> tuple[Manifest, Tower, NDArray[np.float32] | None]:
    """The manifest, the item tower and the validation queries."""
    checkpoints = CheckpointStore(store)
    try:
        files = checkpoints.load(version, "item")
        return files.manifest, Tower(files), checkpoints.validation_queries(files.manifest)
    except (CorruptArtefactError, InvalidInputError) as error:
        raise CorruptCheckpointError(str(error)) from error


def _in_order_of_hash(embedded: EmbeddedItems) -> tuple[EmbeddedItems, NDArray[np.uint64]]:
    hashes = hashes_of(embedded.items.column(ITEM_ID).to_pylist())
    order = np.argsort(hashes, kind="stable")
    in_order = EmbeddedItems(embedded.items.take(pa.array(order)), embedded.embeddings[order], embedded.quarantined)
    return in_order, hashes[order]


def main(arguments: list[str]) -> int:
    """Entry point of the process; 0 when an index is published, by this build or by another one before it."""
    parser = argparse.ArgumentParser(prog="python -m index_service.build", description=__doc__)
    parser.add_argument("--parent", type=int, required=True, help="process that waits; the build ends with it")
    parser.add_argument("order", help="the build order, JSON")
    parsed = parser.parse_args(arguments)
    end_with_parent(parsed.parent)
    # Ctrl-C reaches every process of the terminal; when to end is the parent's decision.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    order = BuildOrder.model_validate_json(parsed.order)
    with message_stream() as messages, _progress(order, messages) as report:
        build_name = ""
        try:
            build_name = build(order, report).build
        except ConflictError as error:
            _log.info("another build was first: %s", error)
        except TwoTowerError as error:
            _say(messages, BuildMessage.of_failure(error))
            return 1
        _say(messages, BuildMessage(progress=1.0, build=build_name))
    return 0


@contextmanager
def _progress(order: BuildOrder, messages: TextIO) -> Iterator[Callable[[float], None]]:
    """A bar on stderr, and a message for each percent."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    percent = -1
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(
            f"shard {order.shard}/{order.num_shards}: indexing checkpoint {order.checkpoint_version}", total=1.0
        )

        def report(share: float) -> None:
            nonlocal percent
            if int(share * 100) > percent:
                percent = int(share * 100)
                bar.update(task, completed=share)
                _say(messages, BuildMessage(progress=share))

        yield report


def _say(messages: TextIO, message: BuildMessage) -> None:
    messages.write(message.model_dump_json() + "\n")
    messages.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
