"""What everybody is shown: hubs, the same list for all, popularity, and whether popularity is corrected for rightly.

Deliberately does not know whether what is shown is liked, save for the popularity that would be liked better.
"""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.bootstrap import intervals
from trainer.comparison import exposure
from trainer.doctor.report import Finding, Lines, Section, Series, Table
from trainer.doctor.subject import Subject
from trainer.evaluate import ScoreRows, best_items, embedding_scores

MAX_OVERLAP = 0.5
"""Share of a list that two users have in common on average: from a half on it says more of the catalogue than of the
user."""
MAX_SKEWNESS = 10.0
"""Of how often items are shown. Radovanović et al. 2010 call 1.4 strong, in data where nothing is popular; what people
choose is skewed itself, so only far more than that is a fault."""
MIN_HUB_SHARE = 0.25
"""Of all lists, for an item to be called a hub: skewness alone is also had by a few items shown ten times."""
MAX_POPULARITY_BIAS = 2.0
"""Shown items may be so many times as popular as chosen ones, or that much less. Lists of the likeliest items are more
popular than choices by nature, so 1 is not the aim."""
MIN_PRIOR_GAIN = 0.2
"""Share of the metric that another weight of popularity must gain: below it the curve is flat, its top is chance."""
WRONG_SIGN_WEIGHT = 1.5
"""From there on. Towers without a correction lack log q once, with the wrong sign twice."""
MIN_ITEMS_PER_PLACE = 10
"""Of the lists: with fewer, two lists of a small catalogue have much in common by chance alone."""
PRIOR_WEIGHTS = (-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)
_ROWS_AT_ONCE = 256
_HUBS_SHOWN = 10
_HISTOGRAM_STEPS = 30


def lists_section(subject: Subject) -> Section:
    """Of the lists without exclusions: with them even one list for everybody would look like many."""
    k = min(subject.k, max(1, len(subject.item_counts) // MIN_ITEMS_PER_PLACE))
    lists = top_lists(subject.query_embeddings, subject.item_embeddings, k)
    shown = np.bincount(lists.reshape(-1), minlength=len(subject.item_counts))
    _, times = np.unique(lists, axis=0, return_counts=True)
    chosen = subject.questions.targets.pairs()[1]
    of_choices = exposure(shown, subject.item_counts, chosen)
    figures = {
        "overlap_of_two_lists": overlap(shown, len(lists), k),
        "share_of_the_most_frequent_list": float(times.max() / len(lists)),
        "k_occurrence_skewness": skewness(shown),
        "share_of_lists_with_the_largest_hub": float(shown.max() / len(lists)),
        **of_choices,
    }
    hubs = np.argsort(-shown, kind="stable")[:_HUBS_SHOWN]
    counts = np.bincount(chosen, minlength=len(shown))
    rows = [
        (subject.item_names[item], f"{shown[item] / len(lists):.1%}", f"{counts[item] / len(lists):.1%}")
        for item in hubs.tolist()
    ]
    return Section(
        "What everybody is shown",
        f"The {k} best items of each query, seen items included: a list of the metric's length, or a tenth of a small "
        "catalogue. Overlap is the share of a list that two users have in common; 1 is the same list for everyone. "
        "k-occurrence is how often an item is in a list: high skewness means hubs, that stand near to all queries "
        "(Radovanović et al. 2010). Coverage, Gini and popularity bias are as in twotower evaluate.",
        list_findings(figures, k, subject.config.training.logq),
        figures,
        [_occurrences(shown)],
        [Table("Items in most lists", ("item", "of lists", "of choices"), rows)],
    )


def popularity_section(subject: Subject) -> Section:
    """Ranks with more and with less of popularity: rightly corrected towers are best as they are."""
    log_q = np.log((subject.item_counts + 1) / (subject.item_counts + 1).sum()) * subject.temperature
    values = np.stack([subject.judged(_with_prior(subject, weight * log_q)) for weight in PRIOR_WEIGHTS], axis=1)
    means, (lows, highs) = values.mean(axis=0), intervals(values)
    best, as_is = int(means.argmax()), PRIOR_WEIGHTS.index(0.0)
    (low,), _ = intervals(values[:, [best]] - values[:, [as_is]]).tolist()
    figures = {
        "best_weight_of_log_q": PRIOR_WEIGHTS[best],
        f"{subject.metric}_at_best_weight": float(means[best]),
        f"{subject.metric}_as_it_is": float(means[as_is]),
    }
    weights = list(PRIOR_WEIGHTS)
    findings = []
    if low > 0 and means[best] > (1 + MIN_PRIOR_GAIN) * means[as_is]:
        before, after, logq = float(means[as_is]), float(means[best]), subject.config.training.logq
        findings.append(popularity_finding(PRIOR_WEIGHTS[best], subject.metric, before, after, logq))
    return Section(
        "Popularity and its correction",
        "In-batch negatives are drawn by popularity q; the loss subtracts log q, so that scores end as log p(item | "
        "query). Here log q is added to the scores with different weights, times the temperature. Towers that were "
        "corrected rightly are best at 0; without a correction at 1; at 2 where log q was added instead.",
        findings,
        figures,
        [
            Lines(
                "Popularity added to the scores",
                "weight of log q",
                subject.metric,
                [Series("mean, 95 %", weights, means.tolist(), lows.tolist(), highs.tolist())],
            )
        ],
    )


def top_lists(queries: Tensor, items: Tensor, k: int) -> NDArray[np.int64]:
    """Rows of the k nearest of items `[I, D]` to each of queries `[Q, D]`, best first, `[Q, k]`."""
    blocks = torch.split(queries, _ROWS_AT_ONCE)
    found: NDArray[np.int64] = torch.cat([best_items(block @ items.T, k) for block in blocks]).numpy()
    return found


def overlap(shown: NDArray[np.int64], num_lists: int, k: int) -> float:
    """Mean share of a list that another one has too, from how many of the lists hold each item `[I]`."""
    if num_lists < 2:
        return 0.0
    return float((shown * (shown - 1)).sum() / (num_lists * (num_lists - 1) * k))


def skewness(values: NDArray[np.int64]) -> float:
    """Third standardised moment of `[N]` values; 0 where all are alike."""
    deviations = values - values.mean()
    std = deviations.std()
    return float((deviations**3).mean() / std**3) if std > 0 else 0.0


def _with_prior(subject: Subject, prior: NDArray[np.float64]) -> ScoreRows:
    added = torch.from_numpy(prior).to(subject.item_embeddings.dtype)
    scores = embedding_scores(subject.query_embeddings, subject.item_embeddings)
    return lambda start, stop: scores(start, stop) + added


def _occurrences(shown: NDArray[np.int64]) -> Lines:
    rising = np.sort(shown)[::-1]
    places = np.unique(np.linspace(0, len(rising) - 1, _HISTOGRAM_STEPS).astype(np.int64))
    series = Series("items", (places + 1).tolist(), rising[places].tolist())
    return Lines("How often items are shown", "items, most shown first", "lists that hold the item", [series])


def list_findings(figures: Mapping[str, float], k: int, logq: str) -> list[Finding]:
    """What the figures of lists of k items say; `logq` is the correction that training was to make."""
    findings = []
    if figures["overlap_of_two_lists"] > MAX_OVERLAP:
        findings.append(
            Finding(
                "same-list-for-everyone",
                "critical",
                f"Two users have {figures['overlap_of_two_lists']:.0%} of their best {k} in common; the most frequent "
                f"list goes to {figures['share_of_the_most_frequent_list']:.1%} of them.",
                "Look whether the query tower has collapsed and which of its features matter; lower [training] "
                "temperature, or give the query tower a history.",
            )
        )
    hub = figures["share_of_lists_with_the_largest_hub"]
    if figures["k_occurrence_skewness"] > MAX_SKEWNESS and hub > MIN_HUB_SHARE:
        findings.append(
            Finding(
                "hubs",
                "warning",
                f"A few items are near to everything: the most frequent one is in {hub:.0%} of the lists, and the "
                f"skewness of how often items are shown is {figures['k_occurrence_skewness']:.1f}.",
                "Raise [training] uniform_negatives or hard_negatives: hubs are negatives too seldom.",
            )
        )
    bias = figures["popularity_bias"]
    if not 1 / MAX_POPULARITY_BIAS <= bias <= MAX_POPULARITY_BIAS:
        findings.append(
            Finding(
                "popularity-bias",
                "warning",
                f"What is shown is {bias:.2f} times as popular as what users choose.",
                _too_popular_remedy(logq) if bias > 1 else _too_rare_remedy(logq),
            )
        )
    return findings


def popularity_finding(weight: float, metric: str, as_it_is: float, at_weight: float, logq: str) -> Finding:
    """What it means that ranks are better with another weight of popularity.

    Args:
        weight: Of log q.
        metric: Its name.
        as_it_is: The metric without.
        at_weight: The metric with it.
        logq: The correction that training was to make.
    """
    gain = f"{metric} rises from {as_it_is:.4f} to {at_weight:.4f} when {weight:g} times log q is added to the scores"
    if weight >= WRONG_SIGN_WEIGHT and logq != "none":
        return Finding(
            "wrong-logq-sign",
            "critical",
            f"Popular items are pushed away twice over, as by a correction of the wrong sign: {gain}.",
            f'With logq = "{logq}" the loss must subtract log q from the scores: see that it does and train again.',
        )
    if weight > 0:
        return Finding(
            "popularity-missing",
            "warning",
            f"Popular items stand too low: {gain}.",
            _too_rare_remedy(logq),
        )
    return Finding(
        "popularity-excess",
        "warning",
        f"Popular items stand too high: {gain}.",
        _too_popular_remedy(logq),
    )


def _too_popular_remedy(logq: str) -> str:
    """Of what is not in force yet."""
    if logq != "none":
        return 'Set [training] logq = "none", which holds popular items back, and compare the metric.'
    return "Look which features matter: towers that know little of a user fall back on what all like."


def _too_rare_remedy(logq: str) -> str:
    """The same of items that are not popular enough."""
    if logq == "none":
        return 'Set [training] logq = "counts": without it popular items are pushed away too often.'
    return "Train longer, or with a larger embedding: popularity has not been learned yet."
