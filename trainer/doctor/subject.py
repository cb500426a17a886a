"""The checkpoint on the table: its towers over a set of data, with questions whose answers are known.

Deliberately does not judge anything.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from towers.checkpoint import Manifest
from trainer.bootstrap import intervals
from trainer.comparison import Figure
from trainer.config import TrainerConfig
from trainer.data import TrainingData, read_data, read_item_texts
from trainer.encode import DataEncoder, EncodedQueries, Tensors
from trainer.evaluate import ScoreRows, embedding_scores, query_figures, rank
from trainer.published import Change, PublishedTowers
from trainer.questions import ItemLists, Questions, ask

MAX_QUERIES = 2000
"""Users that are asked, evenly spaced: every permuted feature costs another pass over all of them."""
TITLE_COLUMNS = ("title", "name")
"""Of the item table; the first that is there names the items."""


@dataclass(frozen=True)
class Subject:
    """A checkpoint, the data, and up to `MAX_QUERIES` test questions."""

    published: PublishedTowers
    config: TrainerConfig
    folder: Path
    data: TrainingData
    encoder: DataEncoder
    item_counts: NDArray[np.int64]
    """`[I]` training interactions of each item."""
    questions: Questions

    @property
    def metric(self) -> str:
        """That of the training, such as `recall_at_10`."""
        return self.config.evaluation.metric

    @property
    def k(self) -> int:
        """Length of the lists that the metric looks at."""
        return int(self.metric.rpartition("_")[2])

    @property
    def temperature(self) -> float:
        """Of the epoch that was published."""
        return temperature_of(self.published.manifest, self.config)

    @cached_property
    def item_names(self) -> list[str]:
        """`[I]` titles, whether or not a feature reads them; ids of items without."""
        titles = read_item_texts(self.config.data, self.folder, TITLE_COLUMNS)
        return [titles.get(item, item) for item in self.data.items.ids]

    @cached_property
    def queries(self) -> EncodedQueries:
        """Of the questions."""
        return self.encoder.queries(self.questions.positions)

    @cached_property
    def items(self) -> Tensors:
        """Features of all items, `[I, …]`."""
        return self.encoder.items()

    @cached_property
    def query_embeddings(self) -> Tensor:
        """`[Q, D]`"""
        return self.published.embed_queries(self.queries)

    @cached_property
    def item_embeddings(self) -> Tensor:
        """`[I, D]`"""
        return self.published.embed_items(self.items)

    @cached_property
    def values(self) -> NDArray[np.float64]:
        """`[Q]` the metric of each question."""
        return self.judged(embedding_scores(self.query_embeddings, self.item_embeddings))

    def judged(self, scores: ScoreRows, questions: Questions | None = None) -> NDArray[np.float64]:
        """`[Q]` the metric of each question, answered by some scores."""
        asked = self.questions if questions is None else questions
        return query_figures(rank(scores, asked.targets, asked.excluded, [self.k]), [self.k])[self.metric]

    def changed_queries(self, change: Change) -> Tensor:
        """`[Q, D]` embeddings of the questions' queries with other features."""
        return self.published.embed_queries(self.queries, change)

    def sampled(self, positions: NDArray[np.int64]) -> Questions:
        """Up to `MAX_QUERIES` questions about held-out positions."""
        return some(ask(self.data.log, positions, self.config.evaluation.exclude_seen), MAX_QUERIES)


def subject_of(published: PublishedTowers, folder: Path) -> Subject:
    """Reads the data as the checkpoint's configuration says.

    Raises:
        InvalidInputError: a mistake in the data, or the configuration cannot be read; names file, column and fix.
    """
    config = published.config()
    tables = read_data(config.data, published.fitted.schema, folder)
    questions = ask(tables.log, tables.split.test, config.evaluation.exclude_seen)
    return Subject(
        published,
        config,
        folder,
        tables,
        DataEncoder(published.fitted, tables),
        np.bincount(tables.log.items[tables.split.train], minlength=len(tables.items.ids)),
        some(questions, MAX_QUERIES),
    )


def temperature_of(manifest: Manifest, config: TrainerConfig) -> float:
    """Of the best epoch; where epochs are not kept, what training started with."""
    if not manifest.epochs:
        return config.training.temperature
    return manifest.epochs[best_epoch(manifest) - 1].temperature


def best_epoch(manifest: Manifest) -> int:
    """The one that is published, from 1: the first with the best metric, or the last where nothing is held out."""
    metrics = [figures.metric for figures in manifest.epochs]
    known = [metric for metric in metrics if metric is not None]
    return metrics.index(max(known)) + 1 if known else len(metrics)


def some(questions: Questions, largest: int) -> Questions:
    """At most so many of the questions, evenly spaced."""
    num_questions = len(questions.positions)
    if num_questions <= largest:
        return questions
    rows = np.linspace(0, num_questions - 1, largest).astype(np.int64)
    return Questions(
        questions.positions[rows], _some_lists(questions.targets, rows), _some_lists(questions.excluded, rows)
    )


def figure(values: NDArray[np.float64]) -> Figure:
    """The mean of `[Q]` values with its interval."""
    (low,), (high,) = intervals(values[:, None]).tolist()
    return Figure(float(values.mean()), low, high)


def shown(found: Figure) -> str:
    """A figure in words."""
    return f"{found.value:.4f} ({found.low:.4f} to {found.high:.4f})"


def permutation(num_rows: int, seed: int) -> Tensor:
    """An order of rows, the same every time."""
    return torch.from_numpy(np.random.default_rng([seed, num_rows]).permutation(num_rows))


def emptied(names: Sequence[str]) -> Change:
    """Features that say nothing in place of some: id 0 is a missing value in every table."""

    def change(features: Tensors, rows: Tensor) -> Tensors:  # noqa: ARG001 - the signature of a change
        return features | {name: torch.zeros_like(features[name]) for name in names}

    return change


def _some_lists(lists: ItemLists, rows: NDArray[np.int64]) -> ItemLists:
    return ItemLists(lists.items, lists.starts[rows], lists.stops[rows])
