"""What a build process is told, and what it says.

Deliberately does not know how to build, so that the serving process need not hold what only a build needs.
"""

from typing import Self

from pydantic import BaseModel, ConfigDict

from index_service.plan import TuningGoal
from towers.errors import CorruptArtefactError, TwoTowerError


class BuildOrder(BaseModel):
    """What to build, and the revision to publish it as. The process gets it as JSON on its command line."""

    model_config = ConfigDict(frozen=True)

    store: str
    shard: int
    num_shards: int
    checkpoint_version: int
    catalogue_version: str
    revision: int
    goal: TuningGoal


class BuildMessage(BaseModel):
    """One line, JSON, on the process's stdout. The last one says how it ended."""

    model_config = ConfigDict(frozen=True)

    progress: float = 0.0
    """Share of the work that is done."""
    build: str = ""
    """Name of the build that was published; empty where another one was first."""
    failure: str = ""
    """Why there is no index, in words."""
    is_corrupt: bool = False
    """Whether the checkpoint itself is at fault."""

    @classmethod
    def of_failure(cls, error: TwoTowerError) -> Self:
        """What to say of a failure."""
        return cls(failure=str(error), is_corrupt=isinstance(error, CorruptCheckpointError))

    def raise_failure(self) -> None:
        """Raises the failure in the process that waits, if there is one."""
        if self.failure:
            raise (CorruptCheckpointError if self.is_corrupt else TwoTowerError)(self.failure)


class CorruptCheckpointError(CorruptArtefactError):
    """The checkpoint itself is at fault: trying again cannot heal that."""
