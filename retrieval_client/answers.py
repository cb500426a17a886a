"""What the service answers, as plain Python.

Deliberately does not know how a call is made.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from retrieval.feature.v1 import feature_pb2
from retrieval.query.v1 import query_service_pb2

from retrieval_client.errors import RetrievalError, error_of_query

AttributeValue = str | float | tuple[str, ...] | tuple[float, ...] | None
"""A catalogue value; None where the item has none."""

_STATES: Mapping[int, Literal["loading", "available", "failed"]] = {
    query_service_pb2.TOWER_STATE_LOADING: "loading",
    query_service_pb2.TOWER_STATE_AVAILABLE: "available",
    query_service_pb2.TOWER_STATE_FAILED: "failed",
}


_FINDINGS: "Mapping[int, Finding]" = {
    query_service_pb2.FINDING_RETURNED: "returned",
    query_service_pb2.FINDING_BELOW_K: "below_k",
    query_service_pb2.FINDING_MISSED_BY_INDEX: "missed_by_index",
    query_service_pb2.FINDING_FILTERED_OUT: "filtered_out",
    query_service_pb2.FINDING_EXCLUDED: "excluded",
    query_service_pb2.FINDING_QUARANTINED: "quarantined",
    query_service_pb2.FINDING_UNKNOWN_ITEM: "unknown_item",
}


@dataclass(frozen=True)
class RetrievedItem:
    """One item of an answer."""

    item_id: str
    score: float
    """Inner product of the unit embeddings of query and item."""
    attributes: Mapping[str, AttributeValue]
    """The attributes asked for."""


@dataclass(frozen=True)
class Retrieval:
    """The best items of one query."""

    items: tuple[RetrievedItem, ...]
    """Best first."""
    checkpoint_version: int
    """The one checkpoint that made the embeddings of query and items."""
    shards_answered: int
    shards_total: int
    degraded_reasons: tuple[str, ...]
    """Why fewer shards answered than there are; empty for a full answer."""
    embedding_cached: bool


@dataclass(frozen=True)
class Embeddings:
    """Unit embeddings of queries."""

    vectors: tuple[tuple[float, ...], ...]
    """`[B, D]`, in the order of the queries."""
    checkpoint_version: int


Finding = Literal[
    "returned", "below_k", "missed_by_index", "filtered_out", "excluded", "quarantined", "unknown_item", "unspecified"
]
"""What became of an item."""


@dataclass(frozen=True)
class Explanation:
    """Where an item stands for a query. Figures are None where the item has no embedding."""

    finding: Finding
    reason: str
    """The same in words."""
    score: float | None
    exact_rank: int | None
    """By exact scores among the items that may be returned, from 1."""
    num_items: int | None
    """Items that may be returned."""
    found_by_index: bool | None
    """Whether the index finds it when asked for as many as its rank; None where that cannot be asked."""
    last_score: float | None
    """Of the last item that is returned; None where nothing is."""
    shard: int
    """The one that holds the item, or would."""
    num_shards: int
    checkpoint_version: int
    catalogue_version: str
    """The state of the catalogue that the shard searches."""
    contributions: Mapping[str, float | None]
    """For each feature of the query the score minus the score without it; they do not add up to the score."""


@dataclass(frozen=True)
class TowerStatus:
    """One query tower of a replica."""

    checkpoint_version: int
    state: Literal["loading", "available", "failed", "unknown"]
    reason: str
    """Why it failed; empty otherwise."""
    is_corrupt: bool
    """Whether it failed because the checkpoint itself is at fault: trying again cannot heal that."""
    golden_difference: float
    """Largest absolute difference to the golden embeddings of the checkpoint."""


@dataclass(frozen=True)
class ShardConnection:
    """One replica of a shard as the query service sees it."""

    shard: int
    address: str
    reachable: bool
    """Whether its last call was answered; True before the first."""
    num_shards: int
    """Number of shards of the layout that it belongs to."""


@dataclass(frozen=True)
class CacheStatus:
    """The embedding cache as a replica sees it; counts are of embeddings since its start."""

    enabled: bool
    reachable: bool
    hits: int
    misses: int
    errors: int


@dataclass(frozen=True)
class QueryFeature:
    """A feature that a query may have."""

    name: str
    kind: str


@dataclass(frozen=True)
class ShadowStatus:
    """How the standby version answers a sample of the live queries, beside the live version."""

    checkpoint_version: int
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
class VersionTraffic:
    """Requests of one version on one layout since the deployment record last changed."""

    checkpoint_version: int
    num_shards: int
    """Number of shards of the layout."""
    num_requests: int
    num_errors: int
    """Those that failed for a reason that is not the caller's."""
    p50_s: float
    p99_s: float


@dataclass(frozen=True)
class ServiceStatus:
    """What one replica of the query service serves."""

    deployment_revision: int
    live_version: int | None
    """The version that answers; None before the first is loaded."""
    standby_version: int | None
    towers: tuple[TowerStatus, ...]
    shards: tuple[ShardConnection, ...]
    """Every replica of every shard of every layout."""
    cache: CacheStatus
    features: tuple[QueryFeature, ...]
    """Of the version that answers."""
    shadow: ShadowStatus | None
    """None when no version stands by."""
    traffic: tuple[VersionTraffic, ...]
    workers: tuple["WorkerStatus", ...]
    """Every process that shares the address, this one included; empty where there is one."""


@dataclass(frozen=True)
class WorkerStatus:
    """One of several processes that share an address."""

    worker: int
    """Its number, from 0."""
    status: ServiceStatus | None
    """What it says of itself; None where it does not answer in time."""
    error: str
    """Why it does not, in words."""


def retrieval_of(response: query_service_pb2.RetrieveResponse) -> Retrieval:
    """Reads the answer to one query: columns become items."""
    names = [column.name for column in response.attributes]
    columns = [[attribute_value(value) for value in column.values] for column in response.attributes]
    rows: Sequence[tuple[AttributeValue, ...]] = (
        list(zip(*columns, strict=True)) if columns else [()] * len(response.item_ids)
    )
    return Retrieval(
        items=tuple(
            RetrievedItem(item_id, score, dict(zip(names, row, strict=True)))
            for item_id, score, row in zip(response.item_ids, response.scores, rows, strict=True)
        ),
        checkpoint_version=response.checkpoint_version,
        shards_answered=response.shards_answered,
        shards_total=response.shards_total,
        degraded_reasons=tuple(response.degraded_reasons),
        embedding_cached=response.embedding_cached,
    )


def outcome_of(response: query_service_pb2.StreamRetrieveResponse) -> Retrieval | RetrievalError:
    """Reads the answer to one query of a stream."""
    if response.WhichOneof("outcome") == "retrieved":
        return retrieval_of(response.retrieved)
    return error_of_query(response.error.code, response.error.message)


def retrievals_of(response: query_service_pb2.BatchRetrieveResponse) -> tuple[Retrieval, ...]:
    """Reads the answers to many queries."""
    return tuple(retrieval_of(result) for result in response.results)


def explanation_of(response: query_service_pb2.ExplainResponse) -> Explanation:
    """Reads where an item stands."""
    return Explanation(
        finding=_FINDINGS.get(response.finding, "unspecified"),
        reason=response.reason,
        score=response.score if response.HasField("score") else None,
        exact_rank=response.exact_rank if response.HasField("exact_rank") else None,
        num_items=response.num_items if response.HasField("num_items") else None,
        found_by_index=response.found_by_index if response.HasField("found_by_index") else None,
        last_score=response.last_score if response.HasField("last_score") else None,
        shard=response.shard,
        num_shards=response.num_shards,
        checkpoint_version=response.checkpoint_version,
        catalogue_version=response.catalogue_version,
        contributions={
            part.feature: part.contribution if part.HasField("contribution") else None
            for part in response.contributions
        },
    )


def embeddings_of(response: query_service_pb2.EmbedResponse) -> Embeddings:
    """Reads embeddings."""
    row = struct.Struct(f"<{response.dim}f")
    return Embeddings(tuple(row.iter_unpack(response.embeddings)), response.checkpoint_version)


def status_of(response: query_service_pb2.GetStatusResponse) -> ServiceStatus:
    """Reads a status."""
    cache = response.cache
    return ServiceStatus(
        deployment_revision=response.deployment_revision,
        live_version=response.live_version or None,
        standby_version=response.standby_version or None,
        towers=tuple(
            TowerStatus(
                tower.checkpoint_version,
                _STATES.get(tower.state, "unknown"),
                tower.reason,
                tower.is_corrupt,
                tower.golden_difference,
            )
            for tower in response.towers
        ),
        shards=tuple(
            ShardConnection(shard.shard, shard.address, shard.reachable, shard.num_shards) for shard in response.shards
        ),
        cache=CacheStatus(cache.enabled, cache.reachable, cache.hits, cache.misses, cache.errors),
        features=tuple(QueryFeature(feature.name, feature.kind) for feature in response.features),
        shadow=_shadow(response.shadow) if response.HasField("shadow") else None,
        traffic=tuple(
            VersionTraffic(
                part.checkpoint_version, part.num_shards, part.num_requests, part.num_errors, part.p50_s, part.p99_s
            )
            for part in response.traffic
        ),
        workers=tuple(
            WorkerStatus(worker.worker, status_of(worker.status) if worker.HasField("status") else None, worker.error)
            for worker in response.workers
        ),
    )


def _shadow(message: query_service_pb2.ShadowStatus) -> ShadowStatus:
    return ShadowStatus(
        message.checkpoint_version,
        message.live_version,
        message.num_queries,
        message.num_errors,
        message.mean_overlap,
        message.live_p50_s,
        message.live_p99_s,
        message.standby_p50_s,
        message.standby_p99_s,
    )


def attribute_value(value: feature_pb2.FeatureValue) -> AttributeValue:
    """Reads a value."""
    match value.WhichOneof("value"):
        case "string_value":
            return value.string_value
        case "number_value":
            return value.number_value
        case "string_list":
            return tuple(value.string_list.values)
        case "number_list":
            return tuple(value.number_list.values)
        case None:
            return None
