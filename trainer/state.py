"""The resumable state of a training run: one safetensors file, replaced atomically.

Deliberately does not know the training loop; it stores tensors and a few figures, and unpickles nothing.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from towers.checkpoint import EpochFigures
from towers.errors import CorruptArtefactError, InvalidInputError

STATE_FILE = "state.safetensors"
_LOCK_FILE = "lock"

_MOMENTS = ("step", "exp_avg", "exp_avg_sq", "sum")
"""What AdamW keeps for each parameter, and Adagrad for each table."""


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    epoch: int = 0
    """Whole epochs done."""
    step: int = 0
    """Steps done of the epoch after those."""
    loss_sum: float = 0.0
    """Sum of the losses of those steps."""
    masked_sum: float = 0.0
    """Sum of the shares of their negatives that were masked."""
    left_sum: float = 0.0
    """Sum of the shares that were not, although the user likes them; of those steps that looked."""
    best_epoch: int = 0
    """The epoch whose parameters are kept, from 1; 0 before the first validation."""
    best_metric: float = 0.0
    epochs: tuple[EpochFigures, ...] = ()
    """What each whole epoch came to."""
    is_finished: bool = False
    published: Mapping[str, int] = field(default_factory=dict)
    """Store URL to the checkpoint version that this run became there."""


@dataclass(frozen=True)
class RunState:
    """Everything that the next step depends on."""

    progress: Progress
    origin: Mapping[str, Any]
    """The configuration, and the sha256 of the data files: what a run must have in common with the one it resumes."""
    parameters: Mapping[str, Tensor]
    best_parameters: Mapping[str, Tensor]
    """Empty before the first validation."""
    moments: Mapping[str, Mapping[str, Tensor]]
    """The optimisers', by parameter."""
    sources: Mapping[str, Tensor]
    """What the next step's negatives depend on."""


def save_state(path: Path, state: RunState) -> None:
    """Writes the state; the file is the old one or the new one at every moment.

    Raises:
        InvalidInputError: the folder or the file cannot be written.
    """
    tensors = {f"parameter.{name}": tensor for name, tensor in state.parameters.items()}
    tensors |= {f"best.{name}": tensor for name, tensor in state.best_parameters.items()}
    for name, moments in state.moments.items():
        tensors |= {f"{moment}.{name}": tensor for moment, tensor in moments.items()}
    tensors |= {f"source.{name}": tensor for name, tensor in state.sources.items()}
    metadata = {"progress": json.dumps(asdict(state.progress)), "origin": json.dumps(state.origin, sort_keys=True)}
    _replace_file(path, save({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, metadata))


def load_state(path: Path) -> RunState:
    """Reads a state.

    Raises:
        InvalidInputError: there is none.
        CorruptArtefactError: the file is not a state.
    """
    if not path.exists():
        raise InvalidInputError(f"{path}: there is no run to resume; train without --resume")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
        moments: dict[str, dict[str, Tensor]] = {}
        for moment in _MOMENTS:
            for name, tensor in _below(tensors, moment).items():
                moments.setdefault(name, {})[moment] = tensor
        return RunState(
            progress=_progress(json.loads(metadata["progress"])),
            origin=json.loads(metadata["origin"]),
            parameters=_below(tensors, "parameter"),
            best_parameters=_below(tensors, "best"),
            moments=moments,
            sources=_below(tensors, "source"),
        )
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptArtefactError(
            f"{path}: not a readable training state ({error}); train without --resume"
        ) from error


@contextmanager
def alone_in(run_folder: Path) -> Iterator[None]:
    """Holds a run's folder; the system lets go of it when the process ends, however it ends.

    Raises:
        InvalidInputError: another process holds it, or it cannot be made.
    """
    try:
        run_folder.mkdir(parents=True, exist_ok=True)
        lock = (run_folder / _LOCK_FILE).open("w")
    except OSError as error:
        raise InvalidInputError(f"{run_folder}: cannot be written ({error.strerror}); set run_folder") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InvalidInputError(
                f"{run_folder}: another training is running there; wait for it, or set run_folder"
            ) from error
        yield


def check_origin(path: Path, resumed: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuses to resume a run that was started with another configuration or other data.

    Raises:
        InvalidInputError: names what differs.
    """
    before, now = _flat(resumed), _flat(current)
    changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if changed:
        raise InvalidInputError(
            f"{path}: the run was started with another {', '.join(changed)}; restore it, or train afresh without "
            "--resume"
        )


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters that are trained, by name; a table that both towers share comes once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def restore_parameters(model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    """Copies parameters into a model of the same shape."""
    with torch.no_grad():
        for name, parameter in parameters_of(model).items():
            parameter.copy_(parameters[name])


def _progress(values: Mapping[str, Any]) -> Progress:
    epochs = tuple(EpochFigures(**figures) for figures in values.get("epochs", ()))
    return Progress(**{**values, "epochs": epochs})


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}."): value for name, value in tensors.items() if name.startswith(f"{prefix}.")}


def _flat(values: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(values, Mapping):
        return {name: values}
    return {
        inner: value
        for key, entry in values.items()
        for inner, value in _flat(entry, f"{name}.{key}" if name else str(key)).items()
    }


def _replace_file(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise InvalidInputError(
            f"{path}: the training state cannot be written ({error.strerror}); free space or set run_folder"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
