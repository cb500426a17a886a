"""Which FAISS index a shard has and how it is searched for up to k items; and what both are to reach.

Deliberately does not know FAISS: a plan is what a build decides, stores and reports.
"""

from pydantic import BaseModel, ConfigDict, Field

EXACT = "Flat"
"""Index type of an exact index: the vectors themselves, with nothing beside them."""


class TuningGoal(BaseModel):
    """What the index of a shard is to reach, and within which bounds."""

    model_config = ConfigDict(frozen=True)

    target_recall: float = Field(default=0.95, gt=0, le=1)
    """Recall@k against exact search."""
    target_k: int = Field(default=100, ge=1)
    """The k that the kind of index is chosen for; search parameters are tuned for other k too."""
    max_latency_ms: float | None = Field(default=None, gt=0)
    """Median time of one search for one query with one thread."""
    max_index_mb: float | None = Field(default=None, gt=0)
    """Memory of the index and its exact vectors, in units of 10^6 bytes."""
    index_type: str | None = Field(default=None, min_length=1)
    """Pins the kind of index: any FAISS factory string. Nothing is chosen then."""
    exact_below: int = Field(default=5000, ge=0)
    """Fewer items are searched exactly, unless the kind is pinned."""


class SearchSetting(BaseModel):
    """How an index is searched for up to k items, and what that was measured to give."""

    model_config = ConfigDict(frozen=True)

    k: int = Field(ge=1)
    """Applies to searches for up to this many items."""
    parameters: str
    """FAISS search parameters, for example "nprobe=8,k_factor_rf=4"; empty where there is nothing to set."""
    recall: float
    """Recall@k against exact search."""
    latency_s: float
    """Median seconds of one search for one query with one thread."""


class IndexPlan(BaseModel):
    """A kind of index and its search settings."""

    model_config = ConfigDict(frozen=True)

    index_type: str
    """FAISS factory string."""
    settings: tuple[SearchSetting, ...]
    """By rising k; none for an index without items."""
