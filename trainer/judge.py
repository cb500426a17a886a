"""`twotower evaluate`: a published checkpoint on a set of data, beside the baselines.

Deliberately does not know the command line.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from towers.checkpoint import CheckpointStore
from trainer import data
from trainer.baselines import baselines
from trainer.bm25 import texts_of
from trainer.comparison import Comparison, compare
from trainer.config import EvaluationConfig
from trainer.encode import DataEncoder
from trainer.evaluate import rank
from trainer.live import LIVE, AskLive, live_ranking
from trainer.matryoshka import tower_scores
from trainer.published import open_published
from trainer.questions import ask
from trainer.slices import all_slices


@dataclass(frozen=True)
class Evaluation:
    """What a checkpoint came to."""

    comparison: Comparison
    options: EvaluationConfig
    """Of the checkpoint's configuration."""
    notes: Sequence[str]
    """What of the data was left out and why."""


def evaluate_version(
    checkpoints: CheckpointStore, version: int, folder: Path, ask_live: AskLive | None = None
) -> Evaluation:
    """Ranks all items for each user's held-out interactions, by the published towers and by the baselines.

    Files, columns and split are those of the checkpoint's training configuration.

    Args:
        checkpoints: Holds the version.
        version: The checkpoint.
        folder: Where the data files are.
        ask_live: Asks a service that serves the version, to be judged beside them by what it returns; None: nobody.

    Raises:
        NotFoundError: the version is not published.
        CorruptArtefactError: a file of it is missing or damaged.
        InvalidInputError: a mistake in the data, or the configuration cannot be read; names file, column and fix.
    """
    published = open_published(checkpoints, version)
    config = published.config()
    options = config.evaluation
    tables = data.read_data(config.data, published.fitted.schema, folder)
    split = tables.split
    questions = ask(tables.log, split.test, options.exclude_seen)
    num_items = len(tables.items.ids)
    item_counts = np.bincount(tables.log.items[split.train], minlength=num_items)
    models = {
        **baselines(tables.log, split.train, questions.positions, num_items, texts_of(tables, published.fitted.schema)),
        **tower_scores(*published.embed(tables, questions.positions), config.widths),
    }
    rankings = {
        name: rank(scores, questions.targets, questions.excluded, options.ks) for name, scores in models.items()
    }
    notes = list(tables.notes)
    if ask_live is not None:
        encoder = DataEncoder(published.fitted, tables)
        rankings[LIVE], live_notes = live_ranking(ask_live, questions, encoder, tables.items, options.ks)
        notes += live_notes
    slices = all_slices(tables, published.fitted.schema, item_counts, questions)
    comparison = compare(rankings, options.ks, item_counts, questions.targets.items, slices)
    return Evaluation(comparison, options, notes)
