"""How well answers are found, and where not: training beside the test, false negatives, slices, newcomers.

Deliberately does not know why.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from towers.features import UNKNOWN_ID
from towers.schema import CategoricalFeature, Feature, SequenceFeature
from trainer.baselines import baselines
from trainer.bm25 import texts_of
from trainer.bootstrap import intervals
from trainer.comparison import TOWERS, Figure, compare
from trainer.config import TrainingConfig
from trainer.data import USER_ID, InteractionLog
from trainer.doctor.report import Bars, Finding, Section, Table
from trainer.doctor.subject import Subject, emptied, figure, shown
from trainer.encode import Tensors
from trainer.evaluate import embedding_scores, query_figures, rank
from trainer.published import Change
from trainer.slices import all_slices

MAX_GAP = 3.0
"""The metric on interactions that were trained on may be so many times that on new ones; training is always easier, and
beyond that the towers remember rather than know."""
MAX_FALSE_NEGATIVES = 0.05
"""Of the negatives. A query has thousands of them, and of one in twenty that is liked the softmax makes the hardest."""
MIN_TARGETS = 20
"""Of a slice, to say anything of it."""
MIN_OF_OVERALL = 0.25
"""Share of the overall metric that a slice should reach."""
_UNPOPULAR = ("cold-items", "item-popularity")
"""Slices that every model finds less of than of others; newcomers and popularity have sections of their own."""
MIN_COLD_OF_OVERALL = 0.1
"""The same of items that training never saw, which only their features can tell apart."""


def gap_section(subject: Subject) -> Section:
    """The metric on training, validation and test questions."""
    split, log = subject.data.split, subject.data.log
    is_newest = np.diff(log.users[split.train], append=-1) != 0
    values = {}
    for name, positions in (("training", split.train[is_newest]), ("validation", split.validation)):
        if len(positions):
            questions = subject.sampled(positions)
            queries = subject.published.embed_queries(subject.encoder.queries(questions.positions))
            values[name] = subject.judged(embedding_scores(queries, subject.item_embeddings), questions)
    found = {name: figure(some) for name, some in (values | {"test": subject.values}).items()}
    left = false_negative_share(log, split.train, subject.config.training, len(subject.item_counts))
    findings = []
    if found["training"].low > MAX_GAP * found["test"].high:
        findings.append(
            Finding(
                "overfitting",
                "warning",
                f"{subject.metric} is {shown(found['training'])} on interactions that were trained on, and "
                f"{shown(found['test'])} on the test.",
                "Raise [model] dropout or [training] weight_decay, or lower the embedding_dim of ids.",
            )
        )
    if left > MAX_FALSE_NEGATIVES:
        findings.append(
            Finding(
                "false-negatives",
                "warning",
                f"{left:.1%} of the negatives are items that the user is known to like, before or after.",
                "Set [training] mask_known_positives = true."
                if not subject.config.training.mask_known_positives
                else "Set [training] score_margin, such as 0.0: negatives that score above the positive are left out.",
            )
        )
    return Section(
        "Training, validation, test",
        "The metric on each user's newest interaction of each part. Training is best by nature; a wide gap is "
        "overfitting, a test far below validation a world that changes. False negatives are items that a user likes "
        "and is pushed away from: the share of the negatives of a batch, or of all items where these are the "
        "negatives, that the user chose at any time and that training does not mask.",
        findings,
        {**{f"{subject.metric}_{name}": value.value for name, value in found.items()}, "false_negatives": left},
        [_bars("By part", subject.metric, found)],
    )


def slices_section(subject: Subject) -> Section:
    """The metric by slice, beside the baselines."""
    data, questions, k = subject.data, subject.questions, subject.k
    texts = texts_of(data, subject.published.fitted.schema)
    models = {
        **baselines(data.log, data.split.train, questions.positions, len(subject.item_counts), texts),
        TOWERS: embedding_scores(subject.query_embeddings, subject.item_embeddings),
    }
    rankings = {name: rank(scores, questions.targets, questions.excluded, [k]) for name, scores in models.items()}
    slices = all_slices(data, subject.published.fitted.schema, subject.item_counts, questions)
    found = compare(rankings, [k], subject.item_counts, questions.targets.pairs()[1], slices)
    overall = {model: figures[subject.metric] for model, figures in found.figures.items()}
    parts = {
        part.name: part.figures[TOWERS][subject.metric] for part in found.slices if part.num_targets >= MIN_TARGETS
    }
    weak = [
        name
        for name, value in parts.items()
        if value.high < MIN_OF_OVERALL * overall[TOWERS].value and name.partition("=")[0] not in _UNPOPULAR
    ]
    findings = []
    if weak:
        findings.append(
            Finding(
                "weak-slices",
                "note",
                f"{subject.metric} is below {MIN_OF_OVERALL:.0%} of the overall {overall[TOWERS].value:.4f} in "
                f"{', '.join(weak)}.",
                "Add features that tell these apart, or more of their interactions; gate them with max_slice_loss.",
            )
        )
    best = max((name for name in overall if name != TOWERS), key=lambda name: overall[name].value)
    if overall[best].low > overall[TOWERS].high:
        findings.append(
            Finding(
                "below-a-baseline",
                "warning",
                f"{best} has {subject.metric} {shown(overall[best])}, the towers {shown(overall[TOWERS])}.",
                "Look at the critical findings first; then at the temperature, the number of epochs and the features.",
            )
        )
    return Section(
        "Slices",
        "The metric on parts of the test, with 95 % intervals, and on all of it beside models that need little "
        "training. item-popularity runs from 1, the least popular tenth of the items, to 10.",
        findings,
        {f"{model}_{subject.metric}": value.value for model, value in overall.items()},
        [
            _bars("Models", subject.metric, overall),
            *([_bars("The towers by slice", subject.metric, parts)] if parts else []),
        ],
        [
            Table(
                "By slice",
                ("slice", "users", "targets", subject.metric),
                [
                    (
                        part.name,
                        f"{part.num_queries:,}",
                        f"{part.num_targets:,}",
                        shown(part.figures[TOWERS][subject.metric]),
                    )
                    for part in found.slices
                ],
            )
        ],
    )


def newcomers_section(subject: Subject) -> Section:
    """Items without a training interaction, and users without a known id and a history."""
    targets = subject.questions.targets.pairs()[1]
    is_cold = subject.item_counts[targets] == 0
    cold_share, num_cold = float((subject.item_counts == 0).mean()), int(is_cold.sum())
    figures = {"cold_share_of_the_catalogue": cold_share, "cold_targets": float(num_cold)}
    charts: dict[str, Figure] = {"all": figure(subject.values)}
    findings = []
    if num_cold >= MIN_TARGETS:
        scores = embedding_scores(subject.query_embeddings, subject.item_embeddings)
        ranking = rank(scores, subject.questions.targets, subject.questions.excluded, [subject.k])
        found = figure(query_figures(ranking, [subject.k], is_cold)[subject.metric])
        figures["cold_items"] = found.value
        charts["cold items"] = found
        if found.high < MIN_COLD_OF_OVERALL * charts["all"].value:
            findings.append(
                Finding(
                    "cold-items-not-found",
                    "warning",
                    f"{subject.metric} of items without a training interaction is {shown(found)}, of all "
                    f"{charts['all'].value:.4f}.",
                    "Give the item tower features of content, and raise min_count of the item id, so that the tower "
                    "learns to do without it.",
                )
            )
    personal = [
        feature
        for feature in subject.published.fitted.schema.of("query")
        if isinstance(feature, SequenceFeature) or feature.column == USER_ID
    ]
    if personal:
        newcomer = subject.judged(embedding_scores(subject.changed_queries(as_new(personal)), subject.item_embeddings))
        counts = torch.from_numpy(subject.item_counts).float()
        popular = subject.judged(lambda start, stop: counts.expand(stop - start, -1))
        _, (high,) = intervals((newcomer - popular)[:, None]).tolist()
        figures |= {"new_users": float(newcomer.mean()), "popularity": float(popular.mean())}
        charts |= {"new users": figure(newcomer), "popularity": figure(popular)}
        if high < 0:
            findings.append(
                Finding(
                    "new-users-below-popularity",
                    "warning",
                    f"{subject.metric} of new users is {newcomer.mean():.4f}; the most popular items for everybody "
                    f"have {popular.mean():.4f}.",
                    "Show new users the most popular items, or raise [model] dropout and min_count of the user id, so "
                    "that the tower learns to do without them.",
                )
            )
    return Section(
        "Newcomers",
        "Cold items have no training interaction: only their features can place them. A new user has an id that "
        "training never saw and no history; other features stay. Popularity is the same list for everybody, the least "
        "to be better than.",
        findings,
        figures,
        [_bars("Newcomers", subject.metric, charts)],
    )


def as_new(personal: Sequence[Feature]) -> Change:
    """Users' ids as those that a vocabulary does not know, and nothing in all else that is theirs alone."""
    unknown = [one.name for one in personal if isinstance(one, CategoricalFeature) and one.hash_buckets is None]
    without = emptied([one.name for one in personal if one.name not in unknown])

    def change(features: Tensors, rows: Tensor) -> Tensors:
        ids = {name: torch.full_like(features[name], UNKNOWN_ID) for name in unknown}
        return without(features, rows) | ids

    return change


def false_negative_share(
    log: InteractionLog, train: NDArray[np.int64], options: TrainingConfig, num_items: int
) -> float:
    """Expected share of the negatives that are liked and not masked; those in a batch come by their popularity.

    Args:
        log: All interactions; what a user chose at any time is liked.
        train: Positions of the interactions to train on.
        options: Say what is masked.
        num_items: I.
    """
    drawn = np.bincount(log.items[train], minlength=num_items) / len(train)
    if options.negatives == "all":
        drawn = np.full(num_items, 1 / num_items)
    in_training = np.unique(log.users[train] * num_items + log.items[train])
    liked = np.unique(log.users * num_items + log.items)
    if options.mask_known_positives:
        liked = np.setdiff1d(liked, in_training, assume_unique=True)
    of_user = np.bincount(liked // num_items, weights=drawn[liked % num_items], minlength=int(log.users.max()) + 1)
    own = 0.0 if options.mask_known_positives else drawn[log.items[train]]
    return float((of_user[log.users[train]] - own).mean())


def _bars(title: str, metric: str, figures: Mapping[str, Figure]) -> Bars:
    values = figures.values()
    return Bars(
        title,
        metric,
        list(figures),
        [value.value for value in values],
        [value.low for value in values],
        [value.high for value in values],
    )
