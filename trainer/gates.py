"""What trained towers must pass to be published: finite weights, no collapse, no worse than the live checkpoint.

Deliberately does not know where checkpoints are published, nor who may override a gate.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from towers.errors import GateRefusedError, InvalidInputError
from towers.schema import FeatureSchema, Owner
from trainer import data
from trainer.bootstrap import intervals
from trainer.config import DataConfig
from trainer.evaluate import Ranking, embedding_scores, query_figures, rank
from trainer.published import PublishedTowers
from trainer.questions import Questions
from trainer.slices import Slice, slice_kinds

MAX_SIMILARITY = 0.98
"""Largest mean cosine of pairs of embeddings, as the rollout has it for items: near 1 a tower has collapsed."""


@dataclass(frozen=True)
class Judgement:
    """One metric of new towers beside that of the live checkpoint, on the same targets."""

    part: str
    """The slice, or `all targets`."""
    metric: str
    value: float
    live_value: float
    low: float
    """Bounds of the 95 % interval of the difference."""
    high: float
    max_loss: float
    """Allowed loss, as a share of the live value."""
    is_passed: bool

    def __str__(self) -> str:
        return (
            f"{self.metric}, {self.part}: {self.value:.4f}, of the live checkpoint {self.live_value:.4f}; difference "
            f"{self.value - self.live_value:+.4f} ({self.low:+.4f} to {self.high:+.4f})"
        )

    @property
    def refusal(self) -> str:
        """Why this does not pass."""
        return f"{self}; it must be shown to lose no more than {self.max_loss:.0%} of it"


def check_finite(model: nn.Module) -> None:
    """Refuses weights that are not numbers; nothing overrides that.

    Raises:
        GateRefusedError: names the parameter.
    """
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise GateRefusedError(
                f"the trained parameter {name} is not finite, so nothing is published; lower [training] learning_rate "
                "and train afresh"
            )


def collapse_refusals(embeddings: Mapping[Owner, Tensor]) -> list[str]:
    """A refusal for each tower whose unit embeddings `[N, D]` are nearly all alike."""
    found = {owner: mean_cosine(rows) for owner, rows in embeddings.items()}
    return [
        f"the {owner} tower has collapsed: the mean cosine of its embeddings is {similarity:.4f}, more than "
        f"{MAX_SIMILARITY}; lower [training] learning_rate, or give the tower features that differ"
        for owner, similarity in found.items()
        if not similarity <= MAX_SIMILARITY
    ]


def mean_cosine(embeddings: Tensor) -> float:
    """Of all pairs of different rows of unit embeddings `[N, D]`; 0 where there is no pair."""
    num_rows = len(embeddings)
    if num_rows < 2:
        return 0.0
    rows = embeddings.double()
    return float((rows.sum(dim=0).square().sum() - rows.square().sum()) / (num_rows * (num_rows - 1)))


def live_ranking(
    live: PublishedTowers, config: DataConfig, folder: Path, questions: Questions, ks: Sequence[int]
) -> Ranking:
    """How the live checkpoint ranks the targets of the new one's questions.

    Raises:
        InvalidInputError: the data lacks a column that the live checkpoint reads.
    """
    tables = data.read_data(config, live.fitted.schema, folder)
    scores = embedding_scores(*live.embed(tables, questions.positions))
    return rank(scores, questions.targets, questions.excluded, ks)


def judge(
    new: Ranking,
    live: Ranking,
    metric: str,
    max_loss: float,
    slices: Sequence[Slice],
    max_slice_loss: Mapping[str, float],
) -> list[Judgement]:
    """Compares two rankings of the same questions, on all targets and on each slice.

    Args:
        new: Of the trained towers.
        live: Of the live checkpoint.
        metric: Such as `recall_at_10`; both rankings are as deep.
        max_loss: Allowed loss on all targets, as a share of the live checkpoint's figure.
        slices: Parts of the targets.
        max_slice_loss: The same for each of them, by name.
    """
    k = int(metric.rpartition("_")[2])

    def judged(part: str, allowed: float, chosen: Slice | None) -> Judgement:
        values, live_values = (
            query_figures(ranking, [k], None if chosen is None else chosen.chosen)[metric] for ranking in (new, live)
        )
        # One resample draws both columns, so what the two have in common cancels out. The second one is the margin
        # to what is allowed; where both rank alike and nothing may be lost it is exactly zero.
        columns = np.stack([values - live_values, values - (1 - allowed) * live_values], axis=1)  # [Q, 2]
        (low, margin), (high, _) = intervals(columns).tolist()
        return Judgement(
            part, metric, float(values.mean()), float(live_values.mean()), low, high, allowed, is_passed=margin >= 0
        )

    return [
        judged("all targets", max_loss, None),
        *(judged(part.name, max_slice_loss[part.name], part) for part in slices),
    ]


def chosen_slices(
    names: Sequence[str], slices: Sequence[Slice], schema: FeatureSchema
) -> tuple[list[Slice], list[str]]:
    """The slices of some names, and a note for each that has no target in this data.

    Raises:
        InvalidInputError: there can be no slice of such a name.
    """
    found = {part.name: part for part in slices}
    kinds = slice_kinds(schema)
    for name in names:
        if name.partition("=")[0] not in kinds:
            raise InvalidInputError(
                f"[evaluation] max_slice_loss: no slice {name!r}; use one of {list(found)}, as twotower evaluate "
                "shows them"
            )
    notes = [
        f"[evaluation] max_slice_loss: slice {name!r} is not among those of the test targets, so it is not judged"
        for name in names
        if name not in found
    ]
    return [found[name] for name in names if name in found], notes
