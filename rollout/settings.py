"""Settings of the rollout controller, read once from the environment (prefix `TWOTOWER_`).

Deliberately does not know any fact about a model; those come from its checkpoint.
"""

from typing import Any

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from rollout.gates import Thresholds
from towers.settings import PREFIX, Addresses, invalid_settings


class RolloutSettings(BaseSettings):
    """Where the services are and where the gates draw the line. Keyword arguments come before the environment."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True)

    store: str = Field(min_length=1)
    """A folder, or `s3://…`, `gs://…`, `az://…`."""
    shards: Addresses = ("127.0.0.1:50061", "127.0.0.1:50062")
    """`host:port,host:port`: the position is the number of the shard."""
    query_services: Addresses = ("127.0.0.1:50051",)
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
            raise invalid_settings(error) from error

    @property
    def thresholds(self) -> Thresholds:
        """The gates' part."""
        return Thresholds(self.recall_metric, self.max_recall_drop, self.min_item_ratio)
