"""What a call can fail with.

Deliberately hides gRPC: callers need not import it.
"""

import grpc


class RetrievalError(Exception):
    """A call that the query service, or the way to it, did not answer."""

    def __init__(self, code: str, message: str) -> None:
        """Keeps both apart.

        Args:
            code: Name of the gRPC status, for example `"UNAVAILABLE"`.
            message: What is wrong, in words.
        """
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message

    def __reduce__(self) -> tuple[type["RetrievalError"], tuple[str, str]]:
        return type(self), (self.code, self.message)


class InvalidRequestError(RetrievalError):
    """The request is wrong; the message names the field or the feature. Trying again does not help."""


class UnavailableError(RetrievalError):
    """The service cannot be reached, has no version loaded, or too few shards answered. Try again later."""


class DeadlineExceededError(RetrievalError):
    """The answer was not there in time."""


class OverloadedError(RetrievalError):
    """The service has more to do than it can, or the message is too large. Ask for less, or later."""


_CLASSES: dict[grpc.StatusCode, type[RetrievalError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
}
_STATUSES = {status.value[0]: status for status in grpc.StatusCode}
_ENDS_OF_A_REPLICA = (
    grpc.StatusCode.UNAVAILABLE,
    # A replica whose time to drain is over ends its streams with this.
    grpc.StatusCode.CANCELLED,
)


def error_of(code: grpc.StatusCode, details: str | None) -> RetrievalError:
    """The error for a status."""
    return _CLASSES.get(code, RetrievalError)(code.name, details or "")


def error_of_batch(start: int, code: grpc.StatusCode, details: str | None) -> RetrievalError:
    """The error of one batch of many: it numbers its queries from 0."""
    return error_of(code, f"in the batch that begins with query {start}: {details or ''}")


def error_of_query(code: int, message: str) -> RetrievalError:
    """The error of one query of a stream."""
    return error_of(_STATUSES.get(code, grpc.StatusCode.UNKNOWN), message)


def is_worth_another_stream(code: grpc.StatusCode) -> bool:
    """Whether a stream that ended so may go on elsewhere."""
    return code in _ENDS_OF_A_REPLICA
