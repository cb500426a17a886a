"""Builds the index of one shard, in a process of its own: `python -m index_service.build …`.

Deliberately does not know who asked for it, nor what is served. Progress goes to stderr for people and to stdout, one
JSON object a line, for the process that started it.
"""

import argparse
import ctypes
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, TextIO

import faiss
import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from index_service.ann import AnnIndex, exact_index, in_order_of_lists
from index_service.artefact import (
    ITEM_VECTORS,
    ArtefactManifest,
    ArtefactStore,
    LoadedArtefact,
    checkpoint_fingerprint,
    new_build,
)
from index_service.embed import EmbeddedItems, embed_items
from index_service.order import BuildMessage, BuildOrder, CorruptCheckpointError
from index_service.plan import EXACT, IndexPlan, SearchSetting
from towers.catalogue import ITEM_ID, Catalogue, partition
from towers.checkpoint import CheckpointStore, Manifest
from towers.errors import ConflictError, CorruptArtefactError, InvalidInputError, TwoTowerError
from towers.store import Store
from towers.tower import Tower

TARGET_RECALL = 0.95
MEASURED_KS = (100, 1000)
"""Recall is measured at these k, so that a search for more items probes more lists."""
_NUM_SAMPLED = 256
_LISTS_PER_ROOT = 4
_TRAINING_VECTORS_PER_LIST = 39
_ENCODINGS = ("SQ8", "Flat")
_SCORE_TOLERANCE = 1e-6
_EMBEDDING_SHARE = 0.8
"""Of the whole work; the rest is clustering, measuring and writing."""
_NICENESS = 19
_PR_SET_PDEATHSIG = 1

_log = logging.getLogger(__name__)


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
    checkpoint, tower = _item_tower(store, order.checkpoint_version)
    catalogue = Catalogue(store).read(order.catalogue_version)
    if catalogue.items.num_rows == 0:
        raise InvalidInputError("the catalogue has no items; load some: twotower catalog load items.parquet")
    embedded = embed_all(
        tower,
        partition(catalogue.items, order.shard, order.num_shards),
        lambda share: report(share * _EMBEDDING_SHARE),
    )
    artefact = artefact_of(order, checkpoint, tower.golden_difference, embedded)
    manifest = ArtefactStore(store, order.shard, order.num_shards).put(artefact)
    report(1.0)
    return manifest


def artefact_of(
    order: BuildOrder, checkpoint: Manifest, golden_difference: float, embedded: EmbeddedItems
) -> LoadedArtefact:
    """Builds the index of embedded items, and all that belongs to it."""
    embedded, hashes = _in_order_of_hash(embedded)
    ann, rows = in_order_of_lists(build_index(embedded.embeddings, order.exact_below))
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
        plan=ann.plan,
        target_recall=TARGET_RECALL,
        measured_with=ITEM_VECTORS,
        item_similarity=0.0,
        score_mean=0.0,
        score_deviation=0.0,
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


def build_index(embeddings: NDArray[np.float32], exact_below: int) -> AnnIndex:
    """Builds an exact index of fewer than `exact_below` vectors, an IVF index of more.

    An IVF index stores 8 bits a component; where that cannot reach the target recall, it stores the floats.

    Args:
        embeddings: `[N, D]` unit vectors.
        exact_below: Number of vectors from which the index is approximate.
    """
    num_items, dim = embeddings.shape
    exact = exact_index(embeddings)
    if num_items == 0 or num_items < exact_below:
        return AnnIndex(IndexPlan(index_type=EXACT, settings=()), None, exact)
    num_lists = max(1, min(int(_LISTS_PER_ROOT * math.sqrt(num_items)), num_items // _TRAINING_VECTORS_PER_LIST))
    for encoding in _ENCODINGS:
        index_type = f"IVF{num_lists},{encoding}"
        index = faiss.index_factory(dim, index_type, faiss.METRIC_INNER_PRODUCT)
        index.train(embeddings)
        index.add(embeddings)
        settings = measured_settings(index, embeddings)
        if all(setting.recall >= TARGET_RECALL for setting in settings):
            break
        _log.warning("%s does not reach a recall of %s even when all lists are probed", index_type, TARGET_RECALL)
    return AnnIndex(IndexPlan(index_type=index_type, settings=settings), index, exact)


def measured_settings(index: Any, embeddings: NDArray[np.float32]) -> tuple[SearchSetting, ...]:
    """The smallest powers of two of lists to probe that reach the target recall, all lists where none does.

    Queries are a sample of the items, each without itself; a hit counts when its exact score is among the k best, so
    that equal scores may come in any order.

    Args:
        index: An IVF index of the embeddings.
        embeddings: `[N, D]`
    """
    num_items = len(embeddings)
    random = np.random.default_rng(0)
    sample = random.choice(num_items, size=min(_NUM_SAMPLED, num_items), replace=False)
    queries = np.ascontiguousarray(embeddings[sample])  # [B, D]
    settings: list[SearchSetting] = []
    nprobe = 1
    for wanted in MEASURED_KS:
        k = min(wanted, num_items - 1)
        if k < 1:
            return (SearchSetting(k=wanted, parameters=f"nprobe={index.nlist}", recall=1.0, latency_s=0.0),)
        exact_scores, exact_rows = faiss.knn(queries, embeddings, k + 1, metric=faiss.METRIC_INNER_PRODUCT)
        exact_scores = np.where(exact_rows == sample[:, None], -np.inf, exact_scores)  # [B, K + 1]
        kth_scores = -np.partition(-exact_scores, k - 1, axis=1)[:, k - 1]  # [B]
        while True:
            nprobe = min(nprobe, index.nlist)
            parameters = faiss.SearchParametersIVF(nprobe=nprobe)
            start = time.perf_counter()
            _, rows = index.search(queries, k + 1, params=parameters)  # [B, K + 1]
            latency_s = (time.perf_counter() - start) / len(queries)
            recall = _recall(queries, embeddings, rows, sample, kth_scores, k)
            if recall >= TARGET_RECALL or nprobe == index.nlist:
                break
            nprobe *= 2
        settings.append(SearchSetting(k=wanted, parameters=f"nprobe={nprobe}", recall=recall, latency_s=latency_s))
    return tuple(settings)


def _recall(
    queries: NDArray[np.float32],
    embeddings: NDArray[np.float32],
    rows: NDArray[np.int64],
    sample: NDArray[np.int64],
    kth_scores: NDArray[np.float32],
    k: int,
) -> float:
    num_right = 0
    for query, found, own_row, kth_score in zip(queries, rows, sample, kth_scores, strict=True):
        others = found[(found >= 0) & (found != own_row)][:k]
        num_right += int((embeddings[others] @ query >= kth_score - _SCORE_TOLERANCE).sum())
    return num_right / (len(queries) * k)


def _item_tower(store: Store, version: int) -> tuple[Manifest, Tower]:
    try:
        files = CheckpointStore(store).load(version, "item")
        return files.manifest, Tower(files)
    except (CorruptArtefactError, InvalidInputError) as error:
        raise CorruptCheckpointError(str(error)) from error


def _in_order_of_hash(embedded: EmbeddedItems) -> tuple[EmbeddedItems, NDArray[np.uint64]]:
    ids = embedded.items.column(ITEM_ID).to_pylist()
    hashes = np.fromiter((xxhash.xxh3_64_intdigest(item_id.encode()) for item_id in ids), np.uint64, count=len(ids))
    order = np.argsort(hashes, kind="stable")
    in_order = EmbeddedItems(embedded.items.take(pa.array(order)), embedded.embeddings[order], embedded.quarantined)
    return in_order, hashes[order]


def main(arguments: list[str]) -> int:
    """Entry point of the process; 0 when an index is published, by this build or by another one before it."""
    parser = argparse.ArgumentParser(prog="python -m index_service.build", description=__doc__)
    parser.add_argument("--parent", type=int, required=True, help="process that waits; the build ends with it")
    parser.add_argument("order", help="the build order, JSON")
    parsed = parser.parse_args(arguments)
    _die_with(parsed.parent)
    os.nice(_NICENESS)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    order = BuildOrder.model_validate_json(parsed.order)
    with _message_stream() as messages, _progress(order, messages) as report:
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


def _die_with(parent: int) -> None:
    """Ends this process with its parent, even when the parent is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)
    # Ctrl-C reaches every process of the terminal; when to end is the parent's decision.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def _message_stream() -> Iterator[TextIO]:
    """The real stdout. Whatever a library prints there goes to stderr instead."""
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as messages:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        yield messages


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
