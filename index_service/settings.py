"""Settings of one shard replica, read once from the environment.

Deliberately does not know what they are used for.
"""

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from index_service.plan import TuningGoal
from towers.settings import PREFIX, Address, invalid_settings

_SHARD_HELP = f"{PREFIX}SHARD: say which shard this is, of how many, for example 0/2"


def _split(names: Any) -> Any:
    """`"genres, year"` to `("genres", "year")`; anything else is left for the field to refuse."""
    return tuple(name.strip() for name in names.split(",") if name.strip()) if isinstance(names, str) else names


class IndexSettings(BaseSettings):
    """Settings by keyword, else from `TWOTOWER_<NAME>` in the environment.

    Raises:
        InvalidInputError: settings are missing or wrong; the message names all of them.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    store: str = Field(min_length=1)
    """The object store: a folder, or `s3://…`, `gs://…`, `az://…`."""
    shard: int = Field(ge=0)
    """Number of this shard; set together with `num_shards` as `shard="0/2"`."""
    num_shards: int = Field(ge=1)
    """Number of shards of the catalogue; never set by itself."""
    address: Address = "127.0.0.1:50061"
    """`host:port` to listen on, port 0 for any free one, or `unix:/path`."""
    poll_interval_s: float = Field(default=0.5, gt=0)
    """Seconds between two looks at the deployment record."""
    drain_s: float = Field(default=0.5, ge=0)
    """Seconds between NOT_SERVING and the refusal of new calls at the end."""
    grace_s: float = Field(default=10.0, ge=0)
    """Seconds that calls in flight then have to end."""
    target_recall: float = Field(default=0.95, gt=0, le=1)
    """Recall@`target_k` against exact search that an index must reach; of those that do, the fastest is built."""
    target_k: int = Field(default=100, ge=1)
    """Items a search that the kind of index is chosen for; other numbers reach the same recall."""
    max_latency_ms: float | None = Field(default=None, gt=0)
    """Most that the median search for one query may take, with one thread, at `target_k`."""
    max_index_mb: float | None = Field(default=None, gt=0)
    """Most memory that the index of a version and its vectors may take, in 10^6 bytes."""
    index_type: str | None = Field(default=None, min_length=1)
    """Pins the kind of index, a FAISS factory string such as `IVF1024,SQ8`; without it the build chooses."""
    exact_below: int = Field(default=5000, ge=0)
    """Shards with fewer items are searched exactly, unless the kind is pinned."""
    rebuild_share: float = Field(default=0.1, gt=0)
    """Share of an index that live updates may change before it is built anew in the background."""
    filterable: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)] = ()
    """Attributes that filters may name, `genres,year`; each costs memory, about 4 bytes an item and value."""
    reflection: bool = False
    """Whether the gRPC reflection service is on."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise invalid_settings(error, {"shard": _SHARD_HELP, "num_shards": _SHARD_HELP}) from error

    @property
    def goal(self) -> TuningGoal:
        """What an index must reach."""
        return TuningGoal(
            target_recall=self.target_recall,
            target_k=self.target_k,
            max_latency_ms=self.max_latency_ms,
            max_index_mb=self.max_index_mb,
            index_type=self.index_type,
            exact_below=self.exact_below,
        )

    @model_validator(mode="before")
    @classmethod
    def _split_shard(cls, values: Any) -> Any:
        """`shard="0/2"` to `shard=0, num_shards=2`; anything else is left for the fields to refuse."""
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", str(values.get("shard", "")).strip())
        values = {name: value for name, value in values.items() if name != "num_shards"}
        if match and int(match.group(1)) < int(match.group(2)):
            return {**values, "shard": int(match.group(1)), "num_shards": int(match.group(2))}
        return {**values, "shard": str(values["shard"])} if "shard" in values else values
