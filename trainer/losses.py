"""The training loss: small steps over one `[B, C]` score matrix, row i a query, column j an item it is scored against.

Deliberately does not know towers, data, optimisers, nor where the columns come from.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

_LOWEST_TEMPERATURE = 0.01


class Temperature(nn.Module):
    """The temperature that scores are divided by: fixed, or learned as its logarithm (Radford et al. 2021, CLIP)."""

    def __init__(self, start: float, is_learned: bool) -> None:
        """Starts at the configured temperature.

        Args:
            start: Above 0.
            is_learned: Whether training changes it.
        """
        super().__init__()
        log = torch.tensor(math.log(start))
        self.log = nn.Parameter(log) if is_learned else nn.Buffer(log)

    def forward(self) -> Tensor:
        """The temperature, a scalar."""
        temperature: Tensor = self.log.exp()
        return temperature

    def keep_in_range(self) -> None:
        """After a step. Near zero a softmax is an argmax, whose gradients are of no use (CLIP's limit, 0.01)."""
        if self.log.requires_grad:
            with torch.no_grad():
                self.log.clamp_(min=math.log(_LOWEST_TEMPERATURE))


@dataclass(frozen=True)
class OwnNegatives:
    """H negatives of each row alone, beside the columns that all rows share."""

    embeddings: Tensor
    """`[B, H, D]` unit embeddings."""
    log_q: Tensor
    """`[B, H]` what is subtracted from their scores, as `log_q` is from the columns'."""
    is_missing: Tensor
    """`[B, H]` places that hold none."""

    def scores(self, query_embeddings: Tensor) -> Tensor:
        """`[B, H]` of their rows' queries `[B, D]`."""
        return torch.bmm(self.embeddings, query_embeddings.unsqueeze(2)).squeeze(2)


def softmax_loss(
    query_embeddings: Tensor,
    item_embeddings: Tensor,
    log_q: Tensor,
    positives: Tensor,
    is_liked: Tensor,
    temperature: Tensor | float,
    score_margin: float | None = None,
    weights: Tensor | None = None,
    own: OwnNegatives | None = None,
    push: float = 1.0,
) -> Tensor:
    """Softmax cross entropy of each query's positive among all candidates.

    With queries and items changed over it is the other direction, from each item to its query among the batch's.

    In-batch negatives are drawn by popularity, q. With `score - log q` in the exponent, the positive's included, the
    columns' sum is an estimate of the sum over all items (Bengio and Senécal 2008; Yi et al. 2019,
    "Sampling-bias-corrected neural modeling for large corpus item recommendations"), so the loss estimates the full
    softmax.

    Args:
        query_embeddings: `[B, D]` unit embeddings; row i is the query of interaction i.
        item_embeddings: `[C, D]` unit embeddings of the candidates; row `positives[i]` is the item of interaction i.
        log_q: `[C]` log of the probability that a place holds its item, or `[B, C]` where that depends on the row;
            all alike, it changes nothing.
        positives: `[B]` the column of each row's positive.
        is_liked: `[B, C]` columns that are no negatives of the row, wherever they come from. Its positive may be
            among them, and stays.
        temperature: Scores are divided by it.
        score_margin: See `above_margin`; None keeps all.
        weights: `[B]` what the loss of each row is multiplied by; None for all alike.
        own: H negatives more of each row.
        push: See `pushed`; the positive pulls as ever.

    Returns:
        Scalar, the mean over the batch.
    """
    queries = scaled(query_embeddings, temperature)
    # One product with the correction in it, masked where it lies: other copies of it would cost as much as the product.
    scores = torch.addmm(-log_q, queries, pushed(item_embeddings, push).T)  # [B, C]
    if push != 1.0:
        of_positives = (queries * item_embeddings[positives]).sum(dim=1, keepdim=True)
        of_positives = of_positives - log_q.expand_as(scores).gather(1, positives.unsqueeze(1))
        scores = scores.scatter(1, positives.unsqueeze(1), of_positives)
    if own is not None:
        scores = torch.cat([scores, own.scores(queries) - own.log_q], dim=1)  # [B, C + H]
        is_liked = torch.cat([is_liked, own.is_missing], dim=1)
    if score_margin is not None:
        cosines = query_embeddings @ item_embeddings.T
        if own is not None:
            cosines = torch.cat([cosines, own.scores(query_embeddings)], dim=1)
        is_liked = is_liked | above_margin(cosines, positives, score_margin)
    return cross_entropy(masked(scores, false_negatives(is_liked, positives)), positives, weights)


def shared_softmax_loss(
    query_embeddings: Tensor,
    item_embeddings: Tensor,
    log_counts: Tensor,
    askers: Tensor,
    positives: Tensor,
    is_liked: Tensor,
    temperature: Tensor | float,
    weights: Tensor | None = None,
    own: OwnNegatives | None = None,
    push: float = 1.0,
) -> Tensor:
    """Softmax cross entropy of B positives, of which several share a query and with it all negatives.

    `softmax_loss` of each positive, at the cost of scoring each query once. The negatives' sum estimates that over all
    items; the positive is there once and for certain, so that no count of it is divided by.

    Args:
        query_embeddings: `[W, D]` unit embeddings.
        item_embeddings: `[C, D]` unit embeddings of the candidates.
        log_counts: `[C]` log of how often all places are expected to hold this place's item, or `[W, C]` where that
            depends on the query; zeros for no correction.
        askers: `[B]` the query of each positive.
        positives: `[B]` the column of each positive.
        is_liked: `[W, C]` columns that are no negatives of the row, all of its positives among them.
        temperature: Scores are divided by it.
        weights: `[B]` what the loss of each positive is multiplied by; None for all alike.
        own: H negatives more of each of the W rows, the log of how often each is expected in its `log_q`.
        push: See `pushed`; the positives pull as ever.

    Returns:
        Scalar, the mean over the positives.
    """
    scaled_queries = scaled(query_embeddings, temperature)
    # One product with the correction in it, masked where it lies: other copies of it would cost as much as the product.
    scores = torch.addmm(-log_counts, scaled_queries, pushed(item_embeddings, push).T)  # [W, C]
    # Minus infinity would give no gradient but NaN where all is masked.
    scores = scores.masked_fill_(is_liked, torch.finfo(scores.dtype).min)
    negatives = scores.logsumexp(dim=1)  # [W]
    if own is not None:
        of_own = (own.scores(scaled_queries) - own.log_q).masked_fill(own.is_missing, torch.finfo(scores.dtype).min)
        negatives = torch.logaddexp(negatives, of_own.logsumexp(dim=1))
    scores_of_positives = (scaled_queries[askers] * item_embeddings[positives]).sum(dim=1)  # [B]
    loss = functional.softplus(negatives[askers] - scores_of_positives)  # [B]
    return (loss if weights is None else loss * weights).mean()


def pushed(item_embeddings: Tensor, push: float) -> Tensor:
    """The same embeddings, whose gradients are multiplied.

    Remembered places are drawn as others are, but their embeddings take no gradient: queries are pushed away by all
    places, items by those that the tower embeds now, which each have a smaller part of the softmax the more is
    remembered, while positives pull their items in full. Unbalanced so, items gather where the queries are (Kim et al.
    2024, "A gradient accumulation method for dense retriever under memory constraint"). Multiplied by the number of all
    places to that of those embedded now, the push is again an estimate of what all places would give.

    Args:
        item_embeddings: `[C, D]`
        push: What gradients are multiplied by.

    Returns:
        `[C, D]`
    """
    if push == 1.0:
        return item_embeddings
    return item_embeddings.detach() + push * (item_embeddings - item_embeddings.detach())


def scaled(scores: Tensor, temperature: Tensor | float) -> Tensor:
    """Cosine scores lie in [-1, 1], too narrow for a softmax; dividing by a temperature below 1 widens them.

    Args:
        scores: Cosines, or the queries that they are to be the products of: that is cheaper.
        temperature: Above 0.

    Returns:
        The same shape.
    """
    return scores / temperature


def accidental_hits(items: Tensor, ids: Tensor) -> Tensor:
    """The columns that hold the row's own item: its positive, or that item a second time, which is no negative.

    Args:
        items: `[B]` the item of each row's interaction.
        ids: `[C]` the item in each column.

    Returns:
        `[B, C]`
    """
    return items.unsqueeze(1) == ids.unsqueeze(0)


def false_negatives(is_liked: Tensor, positives: Tensor) -> Tensor:
    """What is no negative of its row: all that is liked, save the positive itself, which always stays.

    Args:
        is_liked: `[B, C]` whether the row's user is known to like the column's item.
        positives: `[B]` the column of each row's positive.

    Returns:
        `[B, C]`
    """
    return is_liked.scatter(1, positives.unsqueeze(1), value=False)


def above_margin(scores: Tensor, positives: Tensor, margin: float) -> Tensor:
    """Negatives that score higher than the positive by more than a margin: more likely liked than not.

    De Souza Moreira et al. 2024, "NV-Retriever", with the margin's sign as it reads here: a margin below zero also
    takes out those that score a little less than the positive.

    Args:
        scores: `[B, C]` cosines, before the temperature.
        positives: `[B]` the column of each row's positive.
        margin: In units of the score.

    Returns:
        `[B, C]`
    """
    return scores > scores.gather(1, positives.unsqueeze(1)) + margin


def masked(scores: Tensor, is_false_negative: Tensor) -> Tensor:
    """Takes columns out of the softmax, where the scores lie: a copy would cost as much as their product.

    Args:
        scores: `[B, C]`
        is_false_negative: `[B, C]`

    Returns:
        `[B, C]`, minus infinity where masked.
    """
    return scores.masked_fill_(is_false_negative, -torch.inf)


def cross_entropy(scores: Tensor, positives: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean over rows of -log softmax at the positive.

    Args:
        scores: `[B, C]`
        positives: `[B]` the column of each row's positive.
        weights: `[B]` what the loss of each row is multiplied by; None for all alike. The sum is divided by B, not by
            theirs, so that an example counts the same in whichever batch it comes.

    Returns:
        Scalar.
    """
    if weights is None:
        return functional.cross_entropy(scores, positives)
    return (functional.cross_entropy(scores, positives, reduction="none") * weights).mean()


def log_sampling_probabilities(item_counts: Tensor) -> Tensor:
    """Log of the probability that one place of a batch holds an item, from exact counts.

    Batches are slices of a random permutation of all training interactions, so a place holds item i with probability
    count i / sum of counts.

    Args:
        item_counts: `[I]` training interactions of each item.

    Returns:
        `[I]` minus infinity for items without any, which no batch holds.
    """
    counts = item_counts.to(torch.float64)
    return (counts / counts.sum()).log().to(torch.float32)
