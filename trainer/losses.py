"""The training loss: small steps over one `[B, B]` score matrix, row i a query, column j the item of query j.

Deliberately does not know towers, data or optimisers.
"""

import torch
from torch import Tensor
from torch.nn import functional


def in_batch_softmax(
    query_embeddings: Tensor, item_embeddings: Tensor, item_ids: Tensor, log_q: Tensor | None, temperature: float
) -> Tensor:
    """Softmax cross entropy in which the items of the other queries of the batch are the negatives.

    Args:
        query_embeddings: `[B, D]` unit embeddings; row i is the query of interaction i.
        item_embeddings: `[B, D]` unit embeddings; row i is the item of interaction i.
        item_ids: `[B]` the item of interaction i.
        log_q: `[B]` log of the probability that the item of interaction i is drawn into a batch place; None leaves
            the correction out.
        temperature: Scores are divided by it.

    Returns:
        Scalar, the mean over the batch.
    """
    scores = scaled(query_embeddings @ item_embeddings.T, temperature)  # [B, B]
    if log_q is not None:
        scores = logq_corrected(scores, log_q)
    return cross_entropy(accidental_hits_masked(scores, item_ids))


def scaled(scores: Tensor, temperature: float) -> Tensor:
    """Cosine scores lie in [-1, 1], too narrow for a softmax; dividing by a temperature below 1 widens them.

    Args:
        scores: `[B, B]`
        temperature: Above 0.

    Returns:
        `[B, B]`
    """
    return scores / temperature


def logq_corrected(scores: Tensor, log_q: Tensor) -> Tensor:
    """Subtracts log q of each column's item, the positive's included.

    In-batch negatives are drawn by popularity, q. With `score - log q` in the exponent, the batch's sum is an
    estimate of the sum over all items (Bengio and Senécal 2008; Yi et al. 2019, "Sampling-bias-corrected neural
    modeling for large corpus item recommendations"), so the loss estimates the full softmax.

    Args:
        scores: `[B, B]`; column j belongs to the item of interaction j.
        log_q: `[B]`; entry j belongs to the item of interaction j.

    Returns:
        `[B, B]`
    """
    return scores - log_q.unsqueeze(0)


def accidental_hits_masked(scores: Tensor, item_ids: Tensor) -> Tensor:
    """Takes out the columns that hold the row's own positive item a second time: it is no negative.

    The positive itself, on the diagonal, always stays.

    Args:
        scores: `[B, B]`
        item_ids: `[B]` the item of interaction i.

    Returns:
        `[B, B]`, minus infinity where masked.
    """
    is_same_item = item_ids.unsqueeze(1) == item_ids.unsqueeze(0)  # [B, B]
    is_positive = torch.eye(len(item_ids), dtype=torch.bool, device=item_ids.device)
    return scores.masked_fill(is_same_item & ~is_positive, -torch.inf)


def cross_entropy(scores: Tensor) -> Tensor:
    """Mean over rows of -log softmax at the diagonal.

    Args:
        scores: `[B, B]`; the positive of row i is column i.

    Returns:
        Scalar.
    """
    positives = torch.arange(len(scores), device=scores.device)
    return functional.cross_entropy(scores, positives)


def log_sampling_probabilities(item_counts: Tensor) -> Tensor:
    """Log of the probability that one place of a batch holds an item, from exact counts.

    Batches are slices of a random permutation of all training interactions, so a place holds item i with probability
    count i / sum of counts; no streaming estimate is needed.

    Args:
        item_counts: `[I]` training interactions of each item.

    Returns:
        `[I]` minus infinity for items without any, which no batch holds.
    """
    counts = item_counts.to(torch.float64)
    return (counts / counts.sum()).log().to(torch.float32)
