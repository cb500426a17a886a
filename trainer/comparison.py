"""Several models on the same questions: figures with intervals, overall and by slice, as tables and as JSON.

Deliberately does not know the models, only their rankings.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from trainer.bootstrap import intervals
from trainer.evaluate import Ranking, query_figures
from trainer.slices import Slice

TOWERS = "two_towers"
"""Name of the model that the baselines stand beside."""
_METRICS = {"recall": "Recall", "ndcg": "NDCG", "mrr": "MRR"}


@dataclass(frozen=True)
class Figure:
    """A mean over queries, and its 95 % interval."""

    value: float
    low: float
    high: float


Figures = Mapping[str, Mapping[str, Figure]]
"""Model to `recall_at_10` and so on to its figure."""


@dataclass(frozen=True)
class SliceFigures:
    """All models on some of the targets."""

    name: str
    num_queries: int
    num_targets: int
    figures: Figures


@dataclass(frozen=True)
class Comparison:
    """All models on all targets, and on each slice of them."""

    num_queries: int
    num_targets: int
    figures: Figures
    exposure: Mapping[str, Mapping[str, float]]
    """Model to `coverage_at_10`, `gini_at_10` and `popularity_bias_at_10`."""
    slices: Sequence[SliceFigures]


def compare(
    rankings: Mapping[str, Ranking],
    ks: Sequence[int],
    item_counts: NDArray[np.int64],
    targets: NDArray[np.int64],
    slices: Sequence[Slice] = (),
) -> Comparison:
    """Judges models by their rankings.

    Args:
        rankings: Name to ranking, all of the same questions.
        ks: The cut-offs.
        item_counts: `[I]` training interactions of each item.
        targets: `[P]` the targets.
        slices: Parts of the targets.
    """
    queries = next(iter(rankings.values())).queries
    return Comparison(
        num_queries=len(np.unique(queries)),
        num_targets=len(targets),
        figures=_figures(rankings, ks, None),
        exposure={
            name: {
                f"{figure}_at_{k}": value
                for k in ks
                for figure, value in exposure(ranking.shown[k], item_counts, targets).items()
            }
            for name, ranking in rankings.items()
        },
        slices=[
            SliceFigures(
                part.name,
                len(np.unique(queries[part.chosen])),
                int(part.chosen.sum()),
                _figures(rankings, ks, part.chosen),
            )
            for part in slices
        ],
    )


def exposure(shown: NDArray[np.int64], item_counts: NDArray[np.int64], targets: NDArray[np.int64]) -> dict[str, float]:
    """How evenly a model shows the catalogue.

    Args:
        shown: `[I]` number of queries that are shown each item.
        item_counts: `[I]` training interactions of each item.
        targets: `[P]` what users chose.

    Returns:
        `coverage`: share of all items that anybody is shown. `gini`: coefficient of how often items are shown, 0 where
        all are shown alike, near 1 where a few take all. `popularity_bias`: mean training interactions of what is
        shown, divided by those of what users chose, both with one added for the sake of cold items; above 1 the model
        prefers popular items more than users do.
    """
    num_items = len(shown)
    rising = np.sort(shown)
    gini = float((2 * np.arange(1, num_items + 1) - num_items - 1) @ rising / (num_items * rising.sum()))
    popularity = item_counts + 1
    return {
        "coverage": float((shown > 0).mean()),
        "gini": gini,
        "popularity_bias": float(shown @ popularity / shown.sum() / popularity[targets].mean()),
    }


def as_json(comparison: Comparison) -> dict[str, Any]:
    """All figures, for a file."""

    def figures(found: Figures) -> dict[str, Any]:
        return {model: {name: vars(figure) for name, figure in by_name.items()} for model, by_name in found.items()}

    models = figures(comparison.figures)
    for model, found in comparison.exposure.items():
        models[model] |= found
    return {
        "num_queries": comparison.num_queries,
        "num_targets": comparison.num_targets,
        "models": models,
        "slices": [
            {
                "name": part.name,
                "num_queries": part.num_queries,
                "num_targets": part.num_targets,
                "models": figures(part.figures),
            }
            for part in comparison.slices
        ],
    }


def accuracy_table(comparison: Comparison, ks: Sequence[int], title: str) -> Table:
    """Recall, NDCG and MRR of each model, with intervals."""
    table = Table(title=title)
    table.add_column("")
    for k in ks:
        for metric in _METRICS.values():
            table.add_column(f"{metric}@{k}", justify="right")
    for model, figures in comparison.figures.items():
        table.add_row(_title(model), *(_with_interval(figures[f"{metric}_at_{k}"]) for k in ks for metric in _METRICS))
    return table


def exposure_table(comparison: Comparison, ks: Sequence[int]) -> Table:
    """What each model shows of the catalogue."""
    table = Table(title="What is shown of the catalogue")
    table.add_column("")
    for k in ks:
        for heading in ("Coverage", "Gini", "Popularity bias"):
            table.add_column(f"{heading}@{k}", justify="right")
    for model, found in comparison.exposure.items():
        table.add_row(_title(model), *(f"{value:.3f}" for value in found.values()))
    return table


def slice_table(comparison: Comparison, metric: str) -> Table:
    """One metric of each model on each slice, with intervals."""
    name, _, k = metric.partition("_at_")
    table = Table(title=f"{_METRICS[name]}@{k} by slice")
    table.add_column("slice")
    for heading in ("users", "targets", *map(_title, comparison.figures)):
        table.add_column(heading, justify="right")
    for part in comparison.slices:
        figures = (_with_interval(figures[metric]) for figures in part.figures.values())
        table.add_row(part.name, f"{part.num_queries:,}", f"{part.num_targets:,}", *figures)
    return table


def _figures(rankings: Mapping[str, Ranking], ks: Sequence[int], chosen: NDArray[np.bool_] | None) -> Figures:
    found = {model: query_figures(ranking, ks, chosen) for model, ranking in rankings.items()}
    columns = [(model, name, values) for model, by_name in found.items() for name, values in by_name.items()]
    values = np.stack([values for _, _, values in columns], axis=1)  # [Q, M]
    estimates = iter(_estimates(values))
    return {model: {name: next(estimates) for name in by_name} for model, by_name in found.items()}


def _estimates(values: NDArray[np.float64]) -> Iterator[Figure]:
    low, high = intervals(values)
    for figure in zip(values.mean(axis=0).tolist(), low.tolist(), high.tolist(), strict=True):
        yield Figure(*figure)


def _with_interval(figure: Figure) -> str:
    return f"{figure.value:.4f} ({figure.low:.4f}-{figure.high:.4f})"


def _title(model: str) -> str:
    return {"item_knn": "item-kNN", "als": "ALS"}.get(model, model.replace("_", " "))
