"""Features that matter: what the metric loses when the values of one change places, and what a history does.

Deliberately does not know how features are encoded.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from towers.schema import NumberFeature, Owner, SequenceFeature, TimestampFeature
from trainer.comparison import Figure
from trainer.doctor.leaks import certain_share
from trainer.doctor.report import Bars, Finding, Section, Table
from trainer.doctor.subject import Subject, emptied, figure, permutation, shown
from trainer.encode import Tensors
from trainer.evaluate import embedding_scores
from trainer.published import Change

MIN_IMPORTANCE = 0.05
"""Share of the metric: a history that surely costs less when users exchange theirs does nothing for them."""
MIN_MOVED = 0.01
"""1 - cosine of a query with and without its history: below, the tower does not read it at all."""
MAX_IMPORTANCE_OF_A_NUMBER = 0.5
"""Share of the metric that rests on one number of the user: numbers say how much, not what; one that finds half of what
users want knows it from elsewhere."""
MIN_CERTAIN = 0.25
"""Share of test targets that a value of a feature gives away for certain: by chance less than one in 10,000 does."""
NO_IMPORTANCE = 0.01
"""Share of the metric below which a feature that is not surely of use is called idle."""


@dataclass(frozen=True)
class Importance:
    """What one feature is worth."""

    feature: str
    owner: Owner
    loss: Figure
    """Of the metric, when rows exchange their values (Breiman 2001, "Random forests")."""


def features_section(subject: Subject) -> Section:
    """Of both towers."""
    found = sorted(importances(subject), key=lambda importance: -importance.loss.value)
    leaks = certain_share(subject)
    metric = float(subject.values.mean())
    rows = [
        (
            importance.feature,
            importance.owner,
            shown(importance.loss),
            f"{leaks[importance.feature]:.1%}" if importance.feature in leaks else "",
        )
        for importance in found
    ]
    return Section(
        "Features that matter",
        f"The loss of {subject.metric} when queries, or items, exchange their values of one feature (permutation "
        "importance, Breiman 2001), with 95 % intervals: nothing lost, nothing learned from it. A feature gives a "
        "target away where nearly all others with the same value chose that item, more of them than chance allows: it "
        "was made from the interactions that are to be predicted.",
        [
            *_leak_findings(leaks, found, metric),
            *_history_findings(subject, found, metric),
            *_idle_findings(subject, found, metric),
        ],
        {subject.metric: metric},
        [
            Bars(
                "Importance",
                f"loss of {subject.metric}",
                [f"{importance.owner}: {importance.feature}" for importance in found],
                [importance.loss.value for importance in found],
                [importance.loss.low for importance in found],
                [importance.loss.high for importance in found],
            )
        ],
        [Table("Importance", ("feature", "tower", f"loss of {subject.metric}", "gives targets away"), rows)],
    )


def importances(subject: Subject) -> list[Importance]:
    """Of each feature of both towers; both sides of a difference have the same questions."""
    found = []
    for number, feature in enumerate(subject.published.fitted.schema.features):
        queries, items = subject.query_embeddings, subject.item_embeddings
        if feature.owner == "query":
            queries = subject.changed_queries(exchanged(subject, feature.name, number))
        else:
            values = subject.items[feature.name]
            order = permutation(len(values), number)
            items = subject.published.embed_items(subject.items | {feature.name: values[order]})
        losses = subject.values - subject.judged(embedding_scores(queries, items))
        found.append(Importance(feature.name, feature.owner, figure(losses)))
    return found


def exchanged(subject: Subject, name: str, seed: int) -> Change:
    """One feature as other queries have it."""
    order = permutation(len(subject.queries), seed)

    def change(features: Tensors, rows: Tensor) -> Tensors:
        return features | {name: subject.queries.batch(order[rows])[name]}

    return change


def moved_by(subject: Subject, history: str) -> float:
    """Mean of 1 - cosine of queries with and without a history."""
    without = subject.changed_queries(emptied([history]))
    return float(1 - (subject.query_embeddings * without).sum(dim=1).mean())


def known_share(subject: Subject, history: SequenceFeature) -> float:
    """Share of the entries of the questions' histories, as far as they are read, that the vocabulary knows."""
    positions = subject.questions.positions
    lengths = np.minimum(positions - subject.data.log.starts[positions], history.max_length)
    return float(torch.sum(subject.queries.histories[history.name].lengths)) / max(1, int(lengths.sum()))


def _leak_findings(leaks: dict[str, float], found: Sequence[Importance], metric: float) -> list[Finding]:
    losses = {one.feature: one.loss.value for one in found}
    return [
        Finding(
            "leaked-feature",
            "critical",
            f"Feature {name!r} knows the answers: {share:.0%} of the test targets follow from its value for certain, "
            f"and it is worth {losses[name]:.4f} of the metric's {metric:.4f}. It was made from the interactions that "
            "are to be predicted, which services do not have.",
            "Make the column from interactions before the split only, or leave it to the reranker (owner = "
            '"reranker"); a sequence over the item ids is cut at each interaction by itself.',
        )
        for name, share in leaks.items()
        if share >= MIN_CERTAIN
    ]


def _history_findings(subject: Subject, found: Sequence[Importance], metric: float) -> list[Finding]:
    findings = []
    for history in subject.published.fitted.schema.of("query"):
        if not isinstance(history, SequenceFeature):
            continue
        loss = next(one.loss for one in found if one.feature == history.name)
        if loss.high >= MIN_IMPORTANCE * metric:
            continue
        known, moved = known_share(subject, history), moved_by(subject, history.name)
        findings.append(
            Finding(
                "untrained-history",
                "critical",
                f"The history {history.name!r} does nothing: {subject.metric} loses {shown(loss)} when users exchange "
                f"theirs, {known:.0%} of its entries are known items, and with it a query moves by {moved:.4f} (1 - "
                "cosine).",
                _history_remedy(history, known, moved),
            )
        )
    return findings


def _history_remedy(history: SequenceFeature, known: float, moved: float) -> str:
    if known < 1 / 2:
        return f"Lower min_count of {history.items!r}: the vocabulary leaves out most items."
    if moved >= MIN_MOVED:
        return (
            "The tower reads it and has learned nothing from it: see that histories reach it in training, that their "
            "order is that of time, and train longer."
        )
    return (
        "Its embeddings are near zero: train longer or raise [training] learning_rate, and see whether the user id "
        "explains everything before it does."
    )


def _idle_findings(subject: Subject, found: Sequence[Importance], metric: float) -> list[Finding]:
    findings = []
    idle = [one.feature for one in found if one.loss.low <= 0 and one.loss.value < NO_IMPORTANCE * metric]
    if idle:
        findings.append(
            Finding(
                "idle-features",
                "note",
                f"Nothing is lost without {', '.join(idle)}.",
                "Leave them out, or look whether their values differ and are there when queries come.",
            )
        )
    numbers = {
        feature.name
        for feature in subject.published.fitted.schema.of("query")
        if isinstance(feature, NumberFeature | TimestampFeature)
    }
    findings += [
        Finding(
            "number-knows-too-much",
            "warning",
            f"{one.loss.value / metric:.0%} of {subject.metric} rests on the number {one.feature!r} of the user.",
            "See that it is not made from the interactions that are to be predicted.",
        )
        for one in found
        if one.feature in numbers and one.loss.low > MAX_IMPORTANCE_OF_A_NUMBER * metric
    ]
    return findings
