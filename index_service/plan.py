"""Which FAISS index a shard has, and how it is searched for up to k items.

Deliberately does not know FAISS: a plan is what a build decides, stores and reports.
"""

from pydantic import BaseModel, ConfigDict, Field

EXACT = "Flat"
"""Index type of an exact index: the vectors themselves, with nothing beside them."""


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
