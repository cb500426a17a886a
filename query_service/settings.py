"""Configuration of the query service, read once from the environment.

Deliberately does not know how any of it is used.
"""

import re
from typing import Annotated, Any

from pydantic import AliasChoices, Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from towers.errors import InvalidInputError

_PREFIX = "TWOTOWER_"
_HOST_AND_PORT = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[^\s:/,\[\]]+):(?P<port>\d{1,5})")
_REDIS_SCHEMES = ("redis://", "rediss://", "unix://")


class QuerySettings(BaseSettings):
    """Settings of one replica. Environment variables have the prefix `TWOTOWER_`; arguments override them."""

    model_config = SettingsConfigDict(env_prefix=_PREFIX, frozen=True, populate_by_name=True)

    store: str = Field(min_length=1)
    """The object store: a folder, or `s3://…`, `gs://…`, `az://…`."""
    address: str = "127.0.0.1:50051"
    """Where the service listens: `host:port`, port 0 for any free one, or `unix:/path`."""
    shards: Annotated[tuple[str, ...], NoDecode]
    """Addresses of the index shards, `host:port,host:port`; the position is the number of the shard."""
    redis_url: str = Field(default="", validation_alias=AliasChoices(f"{_PREFIX}REDIS_URL", "REDIS_URL"), repr=False)
    """The embedding cache; empty: no cache."""
    cache_ttl_s: float = Field(default=3600.0, gt=0, allow_inf_nan=False)
    """Lifetime of a cached embedding."""
    cache_timeout_s: float = Field(default=0.02, gt=0, le=10, allow_inf_nan=False)
    """The longest that a request waits for the cache."""
    default_timeout_s: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Deadline of a request that comes without one."""
    max_k: int = Field(default=1000, ge=1)
    max_batch_size: int = Field(default=1024, ge=1)
    """Most queries in one `BatchRetrieve` or `Embed`."""
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
            raise InvalidInputError("; ".join(_in_words(detail) for detail in error.errors())) from None

    @field_validator("address")
    @classmethod
    def _can_be_listened_on(cls, address: str) -> str:
        if address.startswith("unix:") and len(address) > len("unix:"):
            return address
        return _host_and_port(address)

    @field_validator("shards", mode="before")
    @classmethod
    def _split(cls, shards: Any) -> Any:
        return tuple(part.strip() for part in shards.split(",")) if isinstance(shards, str) else shards

    @field_validator("shards")
    @classmethod
    def _can_be_called(cls, shards: tuple[str, ...]) -> tuple[str, ...]:
        if not shards or shards == ("",):
            raise ValueError("give at least one shard, for example 127.0.0.1:50061,127.0.0.1:50062")
        for shard in shards:
            if not shard.startswith("unix:"):
                _host_and_port(shard)
        if repeated := sorted({shard for shard in shards if shards.count(shard) > 1}):
            raise ValueError(f"{', '.join(repeated)} is named more than once; each shard has an address of its own")
        return shards

    @field_validator("redis_url")
    @classmethod
    def _is_redis(cls, url: str) -> str:
        if url and not url.startswith(_REDIS_SCHEMES):
            raise ValueError(f"must start with one of {', '.join(_REDIS_SCHEMES)}, or be empty for no cache")
        return url


def _host_and_port(address: str) -> str:
    match = _HOST_AND_PORT.fullmatch(address)
    if match is None or int(match["port"]) > 65_535:
        raise ValueError(f"{address!r} is not host:port")
    return address


def _in_words(detail: Any) -> str:
    name = str(detail["loc"][0]) if detail["loc"] else ""
    variable = name if name.upper() == name else _PREFIX + name.upper()
    if detail["type"] == "missing":
        return f"{variable} is not set"
    if detail["type"] == "extra_forbidden":
        return f"there is no setting {name!r}"
    return f"{variable}: {str(detail['msg']).removeprefix('Value error, ')}"
