"""Where the embeddings lie: spectrum and effective rank of both towers, alignment and uniformity.

Deliberately does not know checkpoints, nor what is asked of the embeddings.
"""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from towers.schema import Owner
from trainer.doctor.report import Finding, Lines, Section, Series
from trainer.gates import MAX_SIMILARITY, mean_cosine

MAX_MEAN_COSINE = 0.9
"""Mean cosine of two embeddings of a tower. Trained towers stay below 0.6, since the softmax pushes apart whatever is
not asked for together; above 0.9 all lie within a narrow cone, and all queries see the items in nearly one order."""
MIN_EFFECTIVE_RANK = 2.0
"""Dimensions: with fewer items are ranked along a line, so that there are two lists, one from each end."""
MIN_COSINE_GAP = 0.05
"""Between a positive and a random item: a twentieth of the scale, half of what a usual temperature divides by."""
_MAX_ROWS = 2000
"""Uniformity looks at all pairs of so many."""


def geometry_section(embeddings: Mapping[Owner, Tensor], positives: tuple[Tensor, Tensor] | None = None) -> Section:
    """Of unit embeddings.

    Args:
        embeddings: `[N, D]` of each tower that there are embeddings of.
        positives: `[P, D]` queries and `[P, D]` the items that they ask for; None where that is not known.
    """
    figures: dict[str, float] = {}
    series = []
    for owner, rows in embeddings.items():
        shares = spectrum(rows)
        figures |= {
            f"{owner}_effective_rank": effective_rank(shares),
            f"{owner}_mean_cosine": mean_cosine(rows),
            f"{owner}_uniformity": uniformity(rows),
        }
        drawn = np.maximum(shares, 1e-8)  # A logarithm has no zero.
        series.append(Series(f"{owner} tower", list(range(1, len(drawn) + 1)), drawn.tolist()))
    if positives is not None:
        queries, items = positives
        figures |= {
            "alignment": alignment(queries, items),
            "positive_cosine": float((queries * items).sum(dim=1).mean()),
            "random_cosine": float(embeddings["query"].double().mean(dim=0) @ embeddings["item"].double().mean(dim=0)),
        }
    return Section(
        "Geometry of the embeddings",
        "The spectrum is the share of the variance along each direction; the effective rank is the number of "
        "directions in use (Roy and Vetterli 2007), at most the dimension. A collapsed tower has few, or a mean "
        "cosine near 1. Alignment is the mean squared distance of a query to the item it asks for, uniformity the "
        "logarithm of the mean of exp(-2 d²) over pairs of a tower (Wang and Isola 2020): lower is better in both; "
        "uniformity 0 is one point, about -4 a whole sphere.",
        [*_collapse_findings(embeddings, figures), *_alignment_findings(figures)],
        figures,
        [Lines("Spectrum", "direction", "share of the variance", series, is_log=True)],
    )


def spectrum(embeddings: Tensor) -> NDArray[np.float64]:
    """Shares `[D]` of the variance of embeddings `[N, D]` along their principal directions, falling; 0 without any."""
    centred = (embeddings - embeddings.mean(dim=0)).double().numpy()
    variances = np.linalg.eigvalsh(centred.T @ centred / len(centred))[::-1].clip(min=0)
    # What rounding leaves of float32 embeddings that are all alike is no variance.
    total = variances.sum()
    return variances / total if total > np.finfo(np.float32).eps else np.zeros_like(variances)


def effective_rank(shares: NDArray[np.float64]) -> float:
    """Of a covariance matrix, by its spectrum `[D]`: the exponential of its entropy (Roy and Vetterli 2007).

    0 where nothing varies.
    """
    there = shares[shares > 0]
    return float(np.exp(-(there * np.log(there)).sum())) if len(there) else 0.0


def alignment(queries: Tensor, items: Tensor) -> float:
    """Mean squared distance of positive pairs `[P, D]` (Wang and Isola 2020, alpha = 2)."""
    return float((queries - items).square().sum(dim=1).mean())


def uniformity(embeddings: Tensor) -> float:
    """Logarithm of the mean Gaussian potential of pairs of embeddings `[N, D]` (Wang and Isola 2020, t = 2)."""
    rows = embeddings[:: -(-len(embeddings) // _MAX_ROWS)].double()
    if len(rows) < 2:
        return 0.0
    return float(torch.pdist(rows).square().mul(-2).exp().mean().log())


def _collapse_findings(embeddings: Mapping[Owner, Tensor], figures: Mapping[str, float]) -> list[Finding]:
    findings = []
    for owner, rows in embeddings.items():
        cosine, rank = figures[f"{owner}_mean_cosine"], figures[f"{owner}_effective_rank"]
        if len(rows) > 1 and (cosine > MAX_MEAN_COSINE or rank < MIN_EFFECTIVE_RANK):
            findings.append(
                Finding(
                    "collapsed-tower",
                    "critical" if cosine > MAX_SIMILARITY or rank < MIN_EFFECTIVE_RANK else "warning",
                    f"The {owner} tower has collapsed: the mean cosine of its embeddings is {cosine:.3f}, and they use "
                    f"{rank:.1f} of {rows.shape[1]} dimensions.",
                    "Look whether its features differ from row to row; lower [training] learning_rate and temperature.",
                )
            )
    return findings


def _alignment_findings(figures: Mapping[str, float]) -> list[Finding]:
    if "positive_cosine" not in figures or figures["positive_cosine"] - figures["random_cosine"] >= MIN_COSINE_GAP:
        return []
    return [
        Finding(
            "positives-not-nearer",
            "critical",
            "Queries stand no nearer to what they ask for than to other items: mean cosine "
            f"{figures['positive_cosine']:.3f} and {figures['random_cosine']:.3f}.",
            "The towers have learned nothing that lasts to the test: look at the curves, then at the features.",
        )
    ]
