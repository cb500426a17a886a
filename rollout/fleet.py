"""What shards and query services say of the versions they load, as plain data.

Deliberately does not know how it was asked for (`rollout.statuses`) nor what follows from it (`rollout.gates`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal

Role = Literal["shard", "query service"]


class State(Enum):
    """Life of a version on a replica."""

    UNKNOWN = "unknown"
    BUILDING = "building"
    LOADING = "loading"
    AVAILABLE = "available"
    UNLOADING = "unloading"
    FAILED = "failed"


@dataclass(frozen=True)
class LoadStatus:
    """One version on one replica."""

    version: int
    state: State
    reason: str = ""
    """Why it failed, in words."""
    is_corrupt: bool = False
    """Whether the checkpoint itself is at fault, so that trying again cannot heal it."""
    progress: float = 0.0
    """Share of the work done, from 0 to 1."""
    golden_difference: float = 0.0
    """Largest absolute difference to a golden embedding on that machine."""
    num_items: int = 0
    """Items in the index; shards only."""
    num_quarantined: int = 0
    """Items left out because their embedding was not finite; shards only."""
    index_type: str = ""
    catalogue_version: str = ""


@dataclass(frozen=True)
class Replica:
    """One process, as it answered; or why it did not."""

    role: Role
    address: str
    shard: int | None = None
    """Number of the shard, from 0; None for a query service."""
    deployment_revision: int = 0
    """Revision of the deployment record that it follows."""
    loads: Sequence[LoadStatus] = ()
    error: str = ""
    """Why there is no valid answer, in words; empty when there is one."""

    @property
    def name(self) -> str:
        """Role, number and address."""
        number = "" if self.shard is None else f" {self.shard}"
        return f"{self.role}{number} at {self.address}"

    def load_of(self, version: int) -> LoadStatus | None:
        """The status of a version; None when the replica does not mention it."""
        return next((load for load in self.loads if load.version == version), None)

    def serves(self, version: int) -> bool:
        """Whether a version is AVAILABLE."""
        load = self.load_of(version)
        return not self.error and load is not None and load.state is State.AVAILABLE


@dataclass(frozen=True)
class Fleet:
    """All replicas that a version must be AVAILABLE on before it goes live."""

    shards: Sequence[Replica]
    query_services: Sequence[Replica]

    @property
    def replicas(self) -> tuple[Replica, ...]:
        """Shards first."""
        return (*self.shards, *self.query_services)
