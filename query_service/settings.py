"""Configuration of the query service, read once from the environment.

Deliberately does not know how any of it is used.
"""

import sys
from typing import Any, Literal

from pydantic import AliasChoices, Field, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from towers.settings import PREFIX, Address, Layouts, invalid_settings

_REDIS_SCHEMES = ("redis://", "rediss://", "unix://")


class QuerySettings(BaseSettings):
    """Settings of one replica. Environment variables have the prefix `TWOTOWER_`; arguments override them."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, populate_by_name=True)

    store: str = Field(min_length=1)
    """The object store: a folder, or `s3://…`, `gs://…`, `az://…`."""
    address: Address = "127.0.0.1:50051"
    """Where the service listens: `host:port`, port 0 for any free one, or `unix:/path`."""
    workers: int = Field(default=1, ge=1, le=64)
    """Processes that share the address; more than one needs Linux and `host:port`."""
    shards: Layouts
    """Addresses of the index shards, `a:1|a:2,b:1`: `,` between shards, `|` between replicas; `;` between layouts."""
    redis_url: str = Field(default="", validation_alias=AliasChoices(f"{PREFIX}REDIS_URL", "REDIS_URL"), repr=False)
    """Where replicas share embeddings; empty: nowhere."""
    cache_ttl_s: float = Field(default=3600.0, gt=0, allow_inf_nan=False)
    """Lifetime of a cached embedding."""
    cache_timeout_s: float = Field(default=0.02, gt=0, le=10, allow_inf_nan=False)
    """The longest that a request waits for the cache."""
    cache_dtype: Literal["float32", "float16"] = "float32"
    """Of the embeddings in Redis; float16 takes half the room there, and moves a score by up to 0.0005."""
    cache_entries: int = Field(default=16384, ge=0, le=10_000_000)
    """Embeddings of each loaded version that the process holds itself, before it asks Redis; 0: none."""
    cache_prewarm: int = Field(default=1000, ge=0, le=100_000)
    """The queries that come most often and that a standby version embeds ahead, before it answers; 0: none."""
    cache_bypass: bool = True
    """Whether a cache that costs more than the tower is left out."""
    default_timeout_s: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Deadline of a request that comes without one."""
    max_k: int = Field(default=1000, ge=1)
    max_batch_size: int = Field(default=1024, ge=1)
    """Most queries in one `BatchRetrieve` or `Embed`."""
    max_stream_queries: int = Field(default=64, ge=1)
    """Most queries of one `StreamRetrieve` that are under way, or whose answers wait to be taken."""
    max_micro_batch: int = Field(default=64, ge=1)
    """Most single requests that are answered together when many arrive at once; 1: each is answered by itself."""
    max_in_flight: int = Field(default=1024, ge=1)
    """Most queries that are being answered at once; what comes above is refused. The bound in force may be lower."""
    target_latency_s: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    """When every answer takes longer, or twice as long as a lone one, fewer requests are let in at once."""
    hedge: bool = True
    """Whether a shard's replica that is late has another one asked beside it, and one that is slow stands back."""
    stale_result_s: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """How old the last full answer to the same question may be that is given where no shard answers; 0: none is."""
    stale_entries: int = Field(default=4096, ge=1, le=1_000_000)
    """Most answers that are remembered for it, about 2 kB each at 100 items."""
    popular_items: int = Field(default=1000, ge=0, le=100_000)
    """Most items that are given, because the live version returned them most often lately, where nothing better is
    known; 0: none, and the request fails."""
    shadow_share: float = Field(default=0.01, ge=0, le=1, allow_inf_nan=False)
    """Share of the requests that a standby version answers too, beside the live one, to be compared; 0: none."""
    poll_interval_s: float = Field(default=0.5, gt=0, allow_inf_nan=False)
    """Pause between two looks at the deployment record."""
    drain_s: float = Field(default=0.5, ge=0, allow_inf_nan=False)
    """After SIGTERM: time for clients to see NOT_SERVING before new calls are refused."""
    grace_s: float = Field(default=10.0, ge=0, allow_inf_nan=False)
    """After that: time for the calls in flight to end."""
    reflection: bool = False
    """Whether the gRPC reflection service is on."""

    def __init__(self, **overrides: Any) -> None:
        """Reads the environment.

        Raises:
            InvalidInputError: one or more settings are missing or wrong; the message names them all.
        """
        try:
            super().__init__(**overrides)
        except ValidationError as error:
            raise invalid_settings(error) from None

    @field_validator("workers")
    @classmethod
    def _can_share(cls, workers: int, info: ValidationInfo) -> int:
        if workers > 1 and info.data.get("address", "").startswith("unix:"):
            raise ValueError(f"{workers} processes cannot share a unix socket: set {PREFIX}ADDRESS to host:port, or 1")
        if workers > 1 and sys.platform != "linux":
            raise ValueError("only Linux spreads connections over the processes of one port: set 1")
        return workers

    @field_validator("redis_url")
    @classmethod
    def _is_redis(cls, url: str) -> str:
        if url and not url.startswith(_REDIS_SCHEMES):
            raise ValueError(f"must start with one of {', '.join(_REDIS_SCHEMES)}, or be empty for no cache")
        return url
