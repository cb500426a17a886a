"""Settings of the rollout controller, read once from the environment (prefix `TWOTOWER_`).

Deliberately does not know any fact about a model; those come from its checkpoint.
"""

from dataclasses import fields
from typing import Any

from pydantic import Field, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from rollout.gates import Thresholds
from towers.settings import PREFIX, Addresses, Layouts, invalid_settings


class RolloutSettings(BaseSettings):
    """Where the services are and where the gates draw the line. Keyword arguments come before the environment."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True)

    store: str = Field(min_length=1)
    """A folder, or `s3://…`, `gs://…`, `az://…`."""
    shards: Layouts = ((("127.0.0.1:50061",), ("127.0.0.1:50062",)),)
    """`host:port|host:port,host:port;…`: `|` between replicas, `,` between shards, `;` between layouts."""
    query_services: Addresses = ("127.0.0.1:50051",)
    """`host:port,host:port`: every replica."""
    poll_interval_s: float = Field(default=1.0, gt=0, le=3600)
    recall_metric: str = Field(default="test.recall_at_10", min_length=1)
    """Name of the offline metric in the manifests."""
    max_recall_drop: float = Field(default=0.1, ge=0, le=1)
    """Largest drop of `recall_metric` below the live version's, as a share of it."""
    min_item_ratio: float = Field(default=0.8, ge=0, le=1)
    """Smallest number of items, as a share of the live version's."""
    max_recall_shortfall: float = Field(default=0.01, ge=0, le=1)
    """How far the measured recall of a built index may be below its target."""
    max_item_similarity: float = Field(default=0.98, ge=-1, le=1)
    """Largest mean cosine of pairs of items: near 1 the item tower has collapsed."""
    min_score_deviation: float = Field(default=0.001, ge=0, le=1)
    """Smallest standard deviation of scores: near 0 every item scores alike."""
    max_score_shift: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Largest distance of the mean score from the live version's, in the live version's deviations; None: any."""
    min_shadow_queries: int = Field(default=0, ge=0)
    """Live queries that both versions must have answered before a promotion; 0: none, and no limit applies."""
    max_shadow_wait_s: float = Field(default=3600.0, gt=0, allow_inf_nan=False)
    """Seconds after staging when the shadow stage is judged by the queries there were, be it none."""
    max_shadow_error_share: float = Field(default=0.01, ge=0, le=1)
    """Share of those queries that the standby version may fail to answer."""
    min_shadow_overlap: float | None = Field(default=None, ge=0, le=1)
    """Smallest mean share of the live answer's items that the standby version returns too; None: any."""
    max_shadow_latency_ratio: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Largest p50 as a multiple of the live version's; None: any."""
    canary_share: float = Field(default=0.0, ge=0, lt=1)
    """Share of the requests that a new version answers before it goes live; 0: it goes live at once."""
    canary_min_requests: int = Field(default=1000, ge=1)
    """Requests that it must have answered."""
    canary_max_s: float = Field(default=3600.0, gt=0, allow_inf_nan=False)
    """Seconds after which a canary is judged by the requests there were, be it none."""
    max_canary_error_share: float = Field(default=0.01, ge=0, le=1)
    """How far the share of failed requests may be above the live version's."""
    max_canary_latency_ratio: float = Field(default=2.0, gt=0, allow_inf_nan=False)
    """Largest p99 as a multiple of the live version's."""

    def __init__(self, **overrides: Any) -> None:
        """Reads the environment.

        Raises:
            InvalidInputError: one or more settings are missing or wrong; the message names them all.
        """
        try:
            super().__init__(**overrides)
        except ValidationError as error:
            raise invalid_settings(error) from error

    @property
    def thresholds(self) -> Thresholds:
        """The gates' part: the settings of these names."""
        return Thresholds(**{field.name: getattr(self, field.name) for field in fields(Thresholds)})

    @field_validator("min_shadow_overlap", "max_shadow_latency_ratio")
    @classmethod
    def _has_queries(cls, limit: float | None, info: ValidationInfo) -> float | None:
        if limit is not None and info.data.get("min_shadow_queries") == 0:
            raise ValueError(f"has no effect without queries to judge by: set {PREFIX}MIN_SHADOW_QUERIES too")
        return limit
