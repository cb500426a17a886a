"""The error tree: every failure a caller may act on, each with its gRPC status.

Deliberately does not know who raises what; `towers.rpc` turns these into statuses, `cli` into exit codes.
"""

import grpc


class TwoTowerError(Exception):
    """Root of all expected failures. The message names the field and the fix; it may reach callers."""

    status: grpc.StatusCode = grpc.StatusCode.INTERNAL


class InvalidInputError(TwoTowerError):
    """The caller's fault: a bad request, configuration or data file."""

    status = grpc.StatusCode.INVALID_ARGUMENT


class InvalidFeatureError(InvalidInputError):
    """A feature value that the schema does not allow. The message names the feature and, if known, the row."""

    def __init__(self, reason: str, row: int | None = None) -> None:
        """Keeps the reason apart from the row, which means nothing to somebody who sent a single query.

        Args:
            reason: What is wrong; names the feature.
            row: Position among the rows that were encoded together.
        """
        super().__init__(reason if row is None else f"row {row}: {reason}")
        self.reason = reason
        self.row = row


class InvalidSchemaError(InvalidInputError):
    """A feature declaration that makes no sense. The message names the feature."""


class CrossTowerFeatureError(InvalidSchemaError):
    """A feature that needs both the query and the item: it belongs in the reranker, not in a tower."""


class ConflictError(TwoTowerError):
    """Another writer was first; nothing of this write is visible."""

    status = grpc.StatusCode.ABORTED


class NotFoundError(TwoTowerError):
    """A checkpoint, record or table that does not exist."""

    status = grpc.StatusCode.NOT_FOUND


class CorruptArtefactError(TwoTowerError):
    """A stored file whose size or sha256 differs from its manifest, or that cannot be parsed."""

    status = grpc.StatusCode.DATA_LOSS


class GoldenDriftError(CorruptArtefactError):
    """A tower that does not reproduce its golden embeddings on this machine."""


class StoreUnavailableError(TwoTowerError):
    """The object store cannot be reached or read: keep what you have, try again."""

    status = grpc.StatusCode.UNAVAILABLE


class TooLittleMemoryError(TwoTowerError):
    """More memory than there is would be needed; nothing was allocated. The message names both figures."""

    status = grpc.StatusCode.RESOURCE_EXHAUSTED


class VersionNotLoadedError(TwoTowerError):
    """A checkpoint version that this process does not hold."""

    status = grpc.StatusCode.FAILED_PRECONDITION


class WrongShardError(TwoTowerError):
    """A request meant for another shard: the caller's shard addresses are in the wrong order or incomplete."""

    status = grpc.StatusCode.FAILED_PRECONDITION


class GateRefusedError(TwoTowerError):
    """A publication or promotion that a gate refuses. The message names the gate and its figure."""

    status = grpc.StatusCode.FAILED_PRECONDITION


class TooFewShardsError(TwoTowerError):
    """Fewer shards answered than the request needs; retry."""

    status = grpc.StatusCode.UNAVAILABLE


class NotReadyError(TwoTowerError):
    """No version is loaded yet, or the process is draining; retry elsewhere."""

    status = grpc.StatusCode.UNAVAILABLE


class DeadlineError(TwoTowerError):
    """The caller's deadline passed before the work was done."""

    status = grpc.StatusCode.DEADLINE_EXCEEDED


class OverloadedError(TwoTowerError):
    """More is asked at once than can be held; retry with backoff."""

    status = grpc.StatusCode.RESOURCE_EXHAUSTED

    def __init__(self, message: str, pushback_ms: int | None = None) -> None:
        """Says when to try again.

        Args:
            message: What there is too much of.
            pushback_ms: How long the caller's gRPC waits before it tries again; negative: it does not; None: as it is
                configured.
        """
        super().__init__(message)
        self.pushback_ms = pushback_ms
