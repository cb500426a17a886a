"""How the rows of a list become one vector: their mean, or a mean whose weights are learned.

Deliberately does not know features, tables or towers: rows in, vectors out.
"""

import torch
from torch import Tensor, nn


class MeanPooling(nn.Module):
    """The mean of the entries that are there; a masked gather, which ONNX Runtime runs faster than an EmbeddingBag."""

    def forward(self, rows: Tensor, is_present: Tensor) -> Tensor:
        """Zero where there is no entry.

        Args:
            rows: `[B, L, E]`
            is_present: `[B, L]`

        Returns:
            `[B, E]`
        """
        return _weighted_mean(rows, is_present.to(rows.dtype))


class AttentionPooling(nn.Module):
    """A mean whose weights are learned, from what an entry is and from how many newer ones there are.

    Yang et al. 2016, "Hierarchical attention networks for document classification", equations 5 to 7, and a bias for
    each age, because without one the order of a history would say nothing.
    """

    def __init__(self, width: int, max_length: int) -> None:
        """Starts near the mean.

        Args:
            width: E
            max_length: Most entries of a list.
        """
        super().__init__()
        self.hidden = nn.Linear(width, width)
        self.score = nn.Linear(width, 1, bias=False)
        self.score_by_age = nn.Embedding(max_length, 1)
        nn.init.zeros_(self.score_by_age.weight)

    def forward(self, rows: Tensor, is_present: Tensor) -> Tensor:
        """Zero where there is no entry.

        Args:
            rows: `[B, L, E]`, the newest entry last.
            is_present: `[B, L]`, false after the newest entry.

        Returns:
            `[B, E]`
        """
        newer = is_present.sum(dim=1, keepdim=True) - 1 - torch.arange(rows.shape[1], device=rows.device)  # [B, L]
        scores = self.score(torch.tanh(self.hidden(rows))) + self.score_by_age(newer.clamp(min=0))  # [B, L, 1]
        scores = scores.squeeze(-1).masked_fill(~is_present, -torch.inf)  # [B, L]
        # The largest weight is 1, so the sum of a list that has entries is at least 1.
        highest = scores.amax(dim=1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)  # [B, 1]
        return _weighted_mean(rows, (scores - highest).exp())


def _weighted_mean(rows: Tensor, weights: Tensor) -> Tensor:
    """`[B, E]` from rows `[B, L, E]` and weights `[B, L]` that sum up to 1 or more, or are all zero."""
    weights = weights.unsqueeze(-1)  # [B, L, 1]
    return (rows * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1.0)  # [B, E]
