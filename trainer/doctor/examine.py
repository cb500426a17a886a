"""The examination: every section that a checkpoint, and the data where there is some, allows.

Deliberately does not know how a report is shown.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from towers.checkpoint import CheckpointStore
from towers.schema import Owner
from trainer.doctor.accuracy import gap_section, newcomers_section, slices_section
from trainer.doctor.features import features_section
from trainer.doctor.geometry import geometry_section
from trainer.doctor.lists import lists_section, popularity_section
from trainer.doctor.neighbours import neighbours_section
from trainer.doctor.report import Report, Section
from trainer.doctor.subject import Subject, subject_of
from trainer.doctor.training import training_section
from trainer.published import open_published


def examine(checkpoints: CheckpointStore, version: int, folder: Path | None) -> Report:
    """Examines a checkpoint.

    Args:
        checkpoints: Holds the version.
        version: The checkpoint.
        folder: Where the data files are; None leaves what the checkpoint says by itself.

    Raises:
        NotFoundError: the version is not published.
        CorruptArtefactError: a file of it is missing or damaged.
        InvalidInputError: a mistake in the data, or the configuration cannot be read; names file, column and fix.
    """
    published = open_published(checkpoints, version)
    training = training_section(published.manifest, published.config())
    if folder is None:
        queries = checkpoints.validation_queries(published.manifest)
        known: Mapping[Owner, Tensor] = {} if queries is None else {"query": torch.tensor(queries)}
        return Report(version, None, [training, *([geometry_section(known)] if known else [])])
    subject = subject_of(published, folder)
    return Report(version, str(folder), [training, *_sections(subject)], subject.data.notes)


def _sections(subject: Subject) -> list[Section]:
    rows, items = map(torch.from_numpy, subject.questions.targets.pairs())
    positives = subject.query_embeddings[rows], subject.item_embeddings[items]
    embeddings: Mapping[Owner, Tensor] = {"query": subject.query_embeddings, "item": subject.item_embeddings}
    return [
        geometry_section(embeddings, positives),
        lists_section(subject),
        popularity_section(subject),
        gap_section(subject),
        slices_section(subject),
        features_section(subject),
        newcomers_section(subject),
        neighbours_section(subject),
    ]
