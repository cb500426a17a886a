"""How the rows of a list become one vector where that is learned: by attention, or by a causal transformer.

Deliberately does not know features, tables or towers: rows in, vectors out.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

_START_STD = 0.05


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


class CausalTransformer(nn.Module):
    """What a history says about the next item, after each of its entries (Kang and McAuley 2018, "SASRec").

    A start token stands before the oldest entry, so that an empty history says something too. Each place sees only
    those before it: what comes later, padding included, changes nothing.
    """

    def __init__(self, width: int, max_length: int, blocks: int, heads: int, dropout: float) -> None:
        """Builds the blocks.

        Args:
            width: E, a multiple of the heads.
            max_length: Most entries of a history.
            blocks: How many.
            heads: Of each block's attention.
            dropout: Share of the inputs, and of what each block adds, that is dropped in training.
        """
        super().__init__()
        self.start = nn.Parameter(torch.empty(width))
        self.positions = nn.Embedding(max_length + 1, width)
        nn.init.normal_(self.start, std=_START_STD)
        nn.init.normal_(self.positions.weight, std=_START_STD)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(_Block(width, heads, dropout) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)

    def forward(self, rows: Tensor, is_present: Tensor) -> Tensor:
        """After the newest entry.

        Args:
            rows: `[B, L, E]`, the newest entry last.
            is_present: `[B, L]`, false after the newest entry.

        Returns:
            `[B, E]`
        """
        newest = is_present.sum(dim=1)  # [B]
        # `len` would bind the exported graph to the number of rows that it was traced with.
        return self.after_each(rows)[torch.arange(rows.shape[0], device=rows.device), newest]  # [B, E]

    def after_each(self, rows: Tensor) -> Tensor:
        """After no entry, after the first, … in one pass.

        Args:
            rows: `[B, L, E]`, the newest entry last.

        Returns:
            `[B, L + 1, E]`
        """
        start = self.start.expand(rows.shape[0], 1, -1)
        states = torch.cat([start, rows], dim=1)  # [B, L + 1, E]
        places = torch.arange(states.shape[1], device=rows.device)
        # Scaled as in the paper, so that entries do not drown in what the blocks add to them.
        states = self.dropout((states + self.positions(places)) * math.sqrt(rows.shape[-1]))
        for block in self.blocks:
            states = block(states)
        out: Tensor = self.norm(states)
        return out


class _Block(nn.Module):
    """Attention to what came before, then a layer for each place alone; both add to what they are given."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.attention_in = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.layers = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, states: Tensor) -> Tensor:
        """`[B, L, E]` to `[B, L, E]`."""
        parts = self.attention_in(self.attention_norm(states)).unflatten(-1, (3, self.heads, -1))  # [B, L, 3, H, E / H]
        queries, keys, values = (part.transpose(1, 2) for part in parts.unbind(dim=2))  # [B, H, L, E / H]
        seen = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        states = states + self.dropout(self.attention_out(seen.transpose(1, 2).flatten(-2)))  # [B, L, E]
        out: Tensor = states + self.dropout(self.layers(states))
        return out


def _weighted_mean(rows: Tensor, weights: Tensor) -> Tensor:
    """`[B, E]` from rows `[B, L, E]` and weights `[B, L]` that sum up to 1 or more, or are all zero."""
    weights = weights.unsqueeze(-1)  # [B, L, 1]
    return (rows * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1.0)  # [B, E]
