"""The typed client of the query service: `RetrievalClient`, and `AsyncRetrievalClient` for asyncio.

`retrieval_client.fake` is a service for tests. Needs only grpcio and the stubs. Deliberately knows nothing of towers,
shards or caches.
"""

from retrieval_client.answers import (
    AttributeValue,
    CacheStatus,
    Embeddings,
    Explanation,
    Finding,
    QueryFeature,
    Retrieval,
    RetrievedItem,
    ServiceStatus,
    ShadowStatus,
    ShardConnection,
    TowerStatus,
    VersionTraffic,
    WorkerStatus,
)
from retrieval_client.channel import Priority
from retrieval_client.client import RetrievalClient
from retrieval_client.client_asyncio import AsyncRetrievalClient
from retrieval_client.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    OverloadedError,
    RetrievalError,
    UnavailableError,
)
from retrieval_client.filters import Attribute, Filter, FilterValue, all_of, any_of, attribute
from retrieval_client.questions import Features, FeatureValue, StreamedQuery

__all__ = [
    "AsyncRetrievalClient",
    "Attribute",
    "AttributeValue",
    "CacheStatus",
    "DeadlineExceededError",
    "Embeddings",
    "Explanation",
    "FeatureValue",
    "Features",
    "Filter",
    "FilterValue",
    "Finding",
    "InvalidRequestError",
    "OverloadedError",
    "Priority",
    "QueryFeature",
    "Retrieval",
    "RetrievalClient",
    "RetrievalError",
    "RetrievedItem",
    "ServiceStatus",
    "ShadowStatus",
    "ShardConnection",
    "StreamedQuery",
    "TowerStatus",
    "UnavailableError",
    "VersionTraffic",
    "WorkerStatus",
    "all_of",
    "any_of",
    "attribute",
]
