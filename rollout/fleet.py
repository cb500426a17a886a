"""What shards and query services say of the versions they load and answer with, as plain data.

Deliberately does not know how it was asked for (`rollout.statuses`) nor what follows from it (`rollout.gates`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from towers.deployment import Slot

Role = Literal["shard", "query service"]


class State(Enum):
    """Life of a version on a replica."""

    UNKNOWN = "unknown"
    BUILDING = "building"
    LOADING = "loading"
    AVAILABLE = "available"
    UNLOADING = "unloading"
    FAILED = "failed"


@dataclass(frozen=True)
class SearchSetting:
    """How an index is searched for up to k items, and what that was measured to give."""

    k: int
    parameters: str
    """FAISS search parameters; empty where there is nothing to set."""
    recall: float
    """Recall@k against exact search."""
    latency_s: float
    """Median of one search for one query where the index was built."""


@dataclass(frozen=True)
class LoadStatus:
    """One version on one replica."""

    version: int
    state: State
    reason: str = ""
    """Why it failed, in words."""
    is_corrupt: bool = False
    """Whether the checkpoint itself is at fault, so that trying again cannot heal it."""
    progress: float = 0.0
    """Share of the work done, from 0 to 1."""
    golden_difference: float = 0.0
    """Largest absolute difference to a golden embedding on that machine."""
    num_items: int = 0
    """Items in the index; shards only."""
    num_quarantined: int = 0
    """Items left out because their embedding was not finite; shards only."""
    index_type: str = ""
    """FAISS factory string; shards only, as is all that follows."""
    catalogue_version: str = ""
    """State of the catalogue that is searched, live updates included."""
    built_catalogue_version: str = ""
    """State of the catalogue that the index was built from."""
    num_delta_items: int = 0
    """Items that live updates added or changed since then."""
    num_tombstones: int = 0
    """Items of the built index that live updates replaced or deleted."""
    size_bytes: int = 0
    """Memory of the version."""
    is_from_store: bool = False
    """Whether it was loaded from the store rather than built by this replica."""
    search_settings: tuple[SearchSetting, ...] = ()
    """How the index is searched, by rising k."""
    target_recall: float = 0.0
    """Recall that the build was to reach."""
    target_k: int = 0
    """At this k."""
    measured_with: str = ""
    """What the recall was measured with."""
    item_similarity: float = 0.0
    """Mean cosine of pairs of different items."""
    score_mean: float = 0.0
    """Of the scores of sampled queries with sampled items."""
    score_deviation: float = 0.0
    """Standard deviation of those; 0 with the mean and the similarity: not reported."""


@dataclass(frozen=True)
class Shadow:
    """How the standby version answers a sample of the live queries, beside the live version."""

    version: int
    live_version: int
    num_queries: int
    """Queries that both answered."""
    num_errors: int
    """Queries that the standby version failed to answer."""
    mean_overlap: float
    """Mean share of the live answer's items that the standby version returned too."""
    live_p50_s: float
    live_p99_s: float
    standby_p50_s: float
    standby_p99_s: float


@dataclass(frozen=True)
class Traffic:
    """Requests that one version answered on one layout, or failed to, since the deployment record last changed."""

    version: int
    num_shards: int
    num_requests: int
    num_errors: int
    """Those that failed for a reason that is not the caller's."""
    p50_s: float
    p99_s: float

    @property
    def error_share(self) -> float:
        """Share of the requests that failed; 0 when there was none."""
        return self.num_errors / self.num_requests if self.num_requests else 0.0


@dataclass(frozen=True)
class Replica:
    """One process, as it answered; or why it did not. Each worker of a query service is one."""

    role: Role
    address: str
    shard: int | None = None
    """Number of the shard, from 0; None for a query service."""
    num_shards: int | None = None
    """Number of shards of its layout; None for a query service."""
    deployment_revision: int = 0
    """Revision of the deployment record that it follows."""
    loads: Sequence[LoadStatus] = ()
    error: str = ""
    """Why there is no valid answer, in words; empty when there is one."""
    layouts: frozenset[int] = frozenset()
    """Layouts that it can ask, by their number of shards; query services only."""
    shadow: Shadow | None = None
    """Query services only; None when nothing stands by."""
    traffic: Sequence[Traffic] = ()
    """Query services only."""
    worker: int | None = None
    """Number among the processes of its address; None where it is the only one."""

    @property
    def title(self) -> str:
        """Role and number: `shard 0/2`, `worker 1 of the query service`."""
        if self.worker is not None:
            return f"worker {self.worker} of the {self.role}"
        return self.role if self.shard is None else f"{self.role} {self.shard}/{self.num_shards}"

    @property
    def name(self) -> str:
        """Role, number and address."""
        return f"{self.title} at {self.address}"

    def load_of(self, version: int) -> LoadStatus | None:
        """The status of a version; None when the replica does not mention it."""
        return next((load for load in self.loads if load.version == version), None)

    def serves(self, version: int) -> bool:
        """Whether a version is AVAILABLE."""
        load = self.load_of(version)
        return not self.error and load is not None and load.state is State.AVAILABLE


@dataclass(frozen=True)
class Fleet:
    """All replicas of all layouts."""

    shards: Sequence[Replica]
    """Those of the first layout first."""
    query_services: Sequence[Replica]

    @property
    def replicas(self) -> tuple[Replica, ...]:
        """Shards first."""
        return (*self.shards, *self.query_services)

    def on(self, num_shards: int | None) -> "Fleet":
        """What a version must be AVAILABLE on before it goes live: the shards of one layout, all query services.

        Args:
            num_shards: The layout, as a deployment record names it; None: the first.
        """
        size = self._size(num_shards)
        return Fleet(tuple(shard for shard in self.shards if shard.num_shards == size), self.query_services)

    def shadow_of(self, version: int, live_version: int) -> Shadow | None:
        """What all query services compared, taken together; None when none has the figures of this pair.

        Latencies of several replicas are averaged by their queries.
        """
        parts = [
            replica.shadow
            for replica in self.query_services
            if replica.shadow and (replica.shadow.version, replica.shadow.live_version) == (version, live_version)
        ]
        if not parts:
            return None
        weights = [part.num_queries for part in parts]
        return Shadow(
            version,
            live_version,
            num_queries=sum(weights),
            num_errors=sum(part.num_errors for part in parts),
            mean_overlap=_mean((part.mean_overlap for part in parts), weights),
            live_p50_s=_mean((part.live_p50_s for part in parts), weights),
            live_p99_s=_mean((part.live_p99_s for part in parts), weights),
            standby_p50_s=_mean((part.standby_p50_s for part in parts), weights),
            standby_p99_s=_mean((part.standby_p99_s for part in parts), weights),
        )

    def traffic_of(self, slot: Slot, revision: int) -> Traffic:
        """What a slot answered at all query services together, since a deployment record.

        A replica that does not follow this record yet is left out: its figures are of another time. Latencies of
        several replicas are averaged by their requests.
        """
        place = (slot.version or 0, self._size(slot.num_shards))
        parts = [
            part
            for replica in self.query_services
            if replica.deployment_revision == revision
            for part in replica.traffic
            if (part.version, part.num_shards) == place
        ]
        weights = [part.num_requests for part in parts]
        return Traffic(
            *place,
            num_requests=sum(weights),
            num_errors=sum(part.num_errors for part in parts),
            p50_s=_mean((part.p50_s for part in parts), weights),
            p99_s=_mean((part.p99_s for part in parts), weights),
        )

    def _size(self, num_shards: int | None) -> int:
        """What a deployment record means: None is the first layout."""
        first = self.shards[0].num_shards if self.shards else None
        return num_shards or first or 0


def _mean(values: Iterable[float], weights: Sequence[int]) -> float:
    """The weighted mean; 0 when nothing has weight."""
    total = sum(weights)
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / total if total else 0.0
