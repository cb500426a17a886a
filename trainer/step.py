"""One step: the loss of a batch, and its gradients, in one piece or in parts that fit.

Deliberately does not know optimisers, epochs, nor where the examples come from.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer import losses
from trainer.caching import Embedded
from trainer.config import TrainingConfig
from trainer.encode import Tensors, TrainingQueries
from trainer.likes import Likes
from trainer.model import TwoTowers
from trainer.negatives import Sources, joined


@dataclass(frozen=True)
class TrainingExamples:
    """N training interactions."""

    queries: TrainingQueries
    """Its rows are what an epoch permutes: an interaction each, or several."""
    positives: Tensor
    """`[N]` row of each interaction's item."""
    log_q: Tensor
    """`[I]` log probability that a batch place holds an item."""
    weights: Tensor | None
    """`[N]` what the loss of each interaction is multiplied by, 1 on average; None where all count alike."""


@dataclass(frozen=True)
class StepFigures:
    """What a step was like."""

    loss: float
    masked: float
    """Share of the negatives that was masked."""
    left: float
    """Share that was not, although the user is known to like the item; 0 where that was not asked."""


def backward(
    model: TwoTowers,
    temperature: losses.Temperature,
    items: Tensors,
    examples: TrainingExamples,
    rows: Tensor,
    sources: Sources,
    likes: Likes,
    left_likes: Likes | None,
    options: TrainingConfig,
    epoch: int,
    step: int,
) -> StepFigures:
    """Adds the gradients of a batch to the parameters, after which the sources go on to the next.

    With `chunk_size` a chunk of rows goes through a tower at a time, and as many rows of scores are there at a time as
    have half the places of a whole batch of that size, which leaves room for the embeddings of all rows and their
    gradients. The gradients of the parameters are the same; each tower runs twice.

    Args:
        model: Both towers.
        temperature: Of the softmax.
        items: Features of all items, `[I, …]`.
        examples: The training interactions.
        rows: Rows of the examples' queries that make the batch of B interactions.
        sources: Of negatives.
        likes: What users are known to like: never a negative.
        left_likes: What they are known to like besides; counted among the negatives. None: nothing is.
        options: The loss.
        epoch: Whole epochs done.
        step: Steps done of this one.
    """
    batch, askers = examples.queries.interactions(rows), examples.queries.askers(rows)
    users, positives = examples.queries.users[batch], examples.positives[batch]
    embedded, columns = sources.candidates(positives, epoch, step)
    remembered, remembered_embeddings = sources.remembered()
    candidates = joined([embedded, remembered])
    is_corrected = options.logq != "none"
    log_q = candidates.log_q if is_corrected else torch.zeros_like(candidates.log_q)
    weights = None if examples.weights is None else examples.weights[batch]
    chunk_size, batch_size = options.chunk_size, len(batch)

    def is_liked(places: Tensor, ids: Tensor) -> Tensor:
        """`[P, C]` which ids `[C]` are no negatives of the interactions at places `[P]` of the batch."""
        if options.mask_known_positives:
            return likes.among(users[places], ids)
        return losses.accidental_hits(positives[places], ids)

    queries = Embedded(
        lambda some: model.query(examples.queries.batch(some), examples.queries.places(some)), rows, chunk_size
    )
    scored = Embedded(lambda some: model.item(take(items, some)), embedded.ids, chunk_size)
    item_embeddings = torch.cat([scored.embeddings, remembered_embeddings])
    num_columns = len(candidates.ids)
    part_size = batch_size if chunk_size is None else max(1, chunk_size * chunk_size // (2 * num_columns))

    def of_interactions(part: Tensor) -> tuple[Tensor, int, int]:
        """Loss of the interactions at some places, how many columns are masked and how many left."""
        liked = is_liked(part, candidates.ids)
        loss = losses.softmax_loss(
            queries.embeddings[part],
            item_embeddings,
            log_q,
            columns[part],
            liked,
            temperature(),
            options.score_margin,
            None if weights is None else weights[part],
        )
        if options.symmetric:
            # Queries have no q: how often one comes is known of its user, not of its history.
            to_queries = losses.softmax_loss(
                scored.embeddings[columns[part]],
                queries.embeddings,
                torch.zeros(batch_size),
                part,
                is_liked(torch.arange(batch_size), positives[part]).T,
                temperature(),
                options.score_margin,
                None if weights is None else weights[part],
            )
            loss = (loss + to_queries) / 2
        num_left = 0 if left_likes is None else int((left_likes.among(users[part], candidates.ids) & ~liked).sum())
        return loss * (len(part) / batch_size), int(liked.sum()) - len(part), num_left

    def of_askers(part: Tensor) -> tuple[Tensor, int, int]:
        """The same of all interactions that the queries at some places ask for."""
        assert askers is not None
        asked = ((askers >= part[0]) & (askers <= part[-1])).nonzero().squeeze(1)
        within, of_users = askers[asked] - part[0], users[torch.searchsorted(askers, part)]
        liked = likes.among(of_users, candidates.ids)
        loss = losses.shared_softmax_loss(
            queries.embeddings[part],
            item_embeddings,
            log_q + math.log(num_columns) if is_corrected else log_q,
            within,
            columns[asked],
            liked,
            temperature(),
            None if weights is None else weights[asked],
        )
        num_masked = int(liked.sum(dim=1)[within].sum()) - len(asked)
        num_left = 0
        if left_likes is not None:
            left = left_likes.among(of_users, candidates.ids) & ~liked
            num_left = int(left.sum(dim=1)[within].sum())
        return loss * (len(asked) / batch_size), num_masked, num_left

    of_part = of_interactions if askers is None else of_askers
    loss, num_masked, num_left = 0.0, 0, 0
    for part in torch.split(torch.arange(len(queries.embeddings)), part_size):
        loss_of_part, masked_of_part, left_of_part = of_part(part)
        loss_of_part.backward()  # type: ignore[no-untyped-call]
        loss += loss_of_part.item()
        num_masked += masked_of_part
        num_left += left_of_part
    queries.backward()
    scored.backward()
    sources.remember(positives, scored.embeddings[columns].detach())
    num_negatives = max(1, batch_size * (num_columns - 1))
    return StepFigures(loss, num_masked / num_negatives, num_left / num_negatives)


def take(features: Tensors, rows: Tensor) -> Tensors:
    """Features of some rows."""
    return {name: values[rows] for name, values in features.items()}
