"""What every kind of index would give and cost, on the catalogue and a checkpoint of a store.

Deliberately stores nothing, and does not know how the figures are shown.
"""

from collections.abc import Callable
from dataclasses import dataclass

from index_service.ann import AnnIndex, exact_index
from index_service.build import embed_shard
from index_service.effort import sweep
from index_service.plan import SearchSetting, TuningGoal
from index_service.recall import Truth, query_sample
from index_service.tune import Candidate, tuned
from towers.checkpoint import CheckpointStore
from towers.deployment import DeploymentStore
from towers.errors import NotFoundError
from towers.store import Store

_EMBEDDING_SHARE = 0.4


@dataclass(frozen=True)
class Curve:
    """Recall and latency of one kind of index over its search parameters, at the goal's k."""

    index_type: str
    size_bytes: int
    """Memory with the exact vectors."""
    points: tuple[SearchSetting, ...]

    def fastest(self, recall: float) -> SearchSetting | None:
        """The fastest point that reaches a recall; None where none does."""
        reached = [point for point in self.points if point.recall >= recall]
        return min(reached, key=lambda point: point.latency_s, default=None)


@dataclass(frozen=True)
class Frontier:
    """All that was measured."""

    checkpoint_version: int
    catalogue_version: str
    num_items: int
    dim: int
    measured_with: str
    """"validation queries" or "item vectors"."""
    goal: TuningGoal
    candidates: tuple[Candidate, ...]
    """Every kind with its verdict for this goal; one is "chosen"."""
    curves: tuple[Curve, ...]
    """Of every kind that was built."""


def measured_frontier(
    store_url: str,
    version: int | None,
    shard: int,
    num_shards: int,
    goal: TuningGoal,
    report: Callable[[float], None],
) -> Frontier:
    """Measures every kind of index for one shard.

    Args:
        store_url: Where the checkpoint and the catalogue are.
        version: The checkpoint; the live one when left out, the newest where none is live.
        shard: Number of the shard.
        num_shards: How many there are.
        goal: What to reach. Few items are no reason to leave kinds out here.
        report: Told the share of the work that is done.

    Raises:
        InvalidInputError: nothing reaches the goal within its bounds; the message says what each kind would take.
        TwoTowerError: the checkpoint or the catalogue cannot be read or do not fit together.
    """
    store = Store(store_url)
    version = version if version is not None else _version_of_interest(store)
    embedded = embed_shard(store, version, None, shard, num_shards, lambda share: report(share * _EMBEDDING_SHARE))
    vectors = embedded.items.embeddings
    exact, queries = exact_index(vectors), query_sample(vectors, embedded.validation_queries)
    truth = Truth(exact, queries, goal.target_k)
    curves: list[Curve] = []

    def measure(ann: AnnIndex) -> None:
        curves.append(Curve(ann.plan.index_type, ann.size_bytes, tuple(sweep(ann, truth, goal.target_k))))

    choice = tuned(
        exact,
        queries,
        goal.model_copy(update={"exact_below": 0}),
        lambda share: report(_EMBEDDING_SHARE + share * (1 - _EMBEDDING_SHARE)),
        measure,
    )
    report(1.0)
    return Frontier(
        checkpoint_version=version,
        catalogue_version=embedded.catalogue_version,
        num_items=exact.ntotal,
        dim=exact.d,
        measured_with=queries.measured_with,
        goal=goal,
        candidates=choice.candidates,
        curves=tuple(curves),
    )


def _version_of_interest(store: Store) -> int:
    live = DeploymentStore(store).current().live_version
    if live is not None:
        return live
    published = CheckpointStore(store).versions()
    if not published:
        raise NotFoundError(f"no checkpoint is published in {store.url}; train one: twotower train CONFIG.toml")
    return published[-1]
