"""Settings of the rollout controller, read once from the environment (prefix `TWOTOWER_`).

Deliberately does not know any fact about a model; those come from its checkpoint.
"""

from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from rollout.gates import Thresholds
from towers.errors import InvalidInputError

_PREFIX = "TWOTOWER_"
_Addresses = Annotated[tuple[str, ...], NoDecode]


class RolloutSettings(BaseSettings):
    """Where the services are and where the gates draw the line. Keyword arguments come before the environment."""

    model_config = SettingsConfigDict(env_prefix=_PREFIX, frozen=True)

    store: str = Field(min_length=1)
    """A folder, or `s3://…`, `gs://…`, `az://…`."""
    shards: _Addresses = ("127.0.0.1:50061", "127.0.0.1:50062")
    """`host:port,host:port`: the position is the number of the shard."""
    query_services: _Addresses = ("127.0.0.1:50051",)
    """`host:port,host:port`: every replica."""
    poll_interval_s: float = Field(default=1.0, gt=0, le=3600)
    max_recall_drop: float = Field(default=0.1, ge=0, le=1)
    """Largest drop of `recall_metric` below the live version's, as a share of it."""
    min_item_ratio: float = Field(default=0.8, ge=0, le=1)
    """Smallest number of items, as a share of the live version's."""
    recall_metric: str = Field(default="test.recall_at_10", min_length=1)
    """Name of the offline metric in the manifests."""

    def __init__(self, **overrides: Any) -> None:
        """Reads the environment.

        Raises:
            InvalidInputError: one or more settings are missing or wrong; the message names them all.
        """
        try:
            super().__init__(**overrides)
        except ValidationError as error:
            raise InvalidInputError("; ".join(_in_words(detail) for detail in error.errors())) from error

    @property
    def thresholds(self) -> Thresholds:
        """The gates' part."""
        return Thresholds(self.recall_metric, self.max_recall_drop, self.min_item_ratio)

    @field_validator("shards", "query_services", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value

    @field_validator("shards", "query_services")
    @classmethod
    def _are_addresses(cls, addresses: tuple[str, ...]) -> tuple[str, ...]:
        for address in addresses:
            _, separator, port = address.rpartition(":")
            if not address.startswith("unix:") and not (separator and port.isdecimal() and 0 < int(port) < 65536):
                raise ValueError(f"{address!r} is not an address; give host:port,host:port")
        if len(set(addresses)) != len(addresses):
            raise ValueError("an address is there twice")
        return addresses


def _in_words(detail: Any) -> str:
    variable = _PREFIX + str(detail["loc"][0]).upper()
    if detail["type"] == "missing":
        return f"{variable} is not set"
    return f"{variable}: {str(detail['msg']).removeprefix('Value error, ')}"
