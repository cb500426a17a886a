"""The curves of a run, for TensorBoard to show beside those of other runs.

Deliberately does not know how anything is trained: it is told of each epoch.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

NoteEpoch = Callable[[int, Mapping[str, float]], None]
"""Is told of each epoch, counted from 1, and of its figures by name."""


def unnoted(epoch: int, figures: Mapping[str, float]) -> None:
    """Writes nothing."""


@contextmanager
def written(folder: Path, num_epochs: int) -> Iterator[NoteEpoch]:
    """Writes curves while it is open.

    Args:
        folder: Takes the event files; what earlier runs left there of later epochs is no longer shown.
        num_epochs: Done before, by the run that goes on.

    Raises:
        ModuleNotFoundError: TensorBoard is not installed.
    """
    # Here, because it takes a second and most trainings do without.
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder), purge_step=num_epochs + 1)

    def note(epoch: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, epoch)
        writer.flush()

    try:
        yield note
    finally:
        writer.close()
