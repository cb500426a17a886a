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
    asking = users if askers is None else users[torch.searchsorted(askers, torch.arange(len(rows)))]  # [Q]
    weights = None if examples.weights is None else examples.weights[batch]
    chunk_size, batch_size = options.chunk_size, len(batch)

    def is_liked(places: Tensor, ids: Tensor) -> Tensor:
        """`[P, C]` which ids `[C]` are no negatives of the queries at places `[P]`."""
        if options.mask_known_positives:
            return likes.among(asking[places], ids)
        return losses.accidental_hits(positives[places], ids)

    def are_liked(ids: Tensor) -> Tensor:
        """`[Q, K]` which ids `[Q, K]`, each query's own, are no negatives of it."""
        return likes.each(asking, ids) if options.mask_known_positives else ids == positives.unsqueeze(1)

    queries = Embedded(
        lambda some: model.query(examples.queries.batch(some), examples.queries.places(some)), rows, chunk_size
    )
    fresh, columns = sources.candidates(positives, epoch, step)
    scored = Embedded(lambda some: model.item(take(items, some)), fresh.ids, chunk_size)
    remembered, remembered_embeddings = sources.remembered()
    candidates = joined([fresh, remembered])
    item_embeddings, num_columns = torch.cat([scored.embeddings, remembered_embeddings]), len(candidates.ids)
    num_liked = likes.counts(asking) if options.mask_known_positives else torch.ones_like(asking)
    hard = sources.hard(queries.embeddings.detach(), num_liked, are_liked, epoch, step)
    mined = None if hard is None else Embedded(lambda some: model.item(take(items, some)), hard.items(), chunk_size)
    is_corrected = options.logq != "none"
    log_counts = candidates.log_q + math.log(num_columns) if is_corrected else torch.zeros(num_columns)

    def own_negatives(part: Tensor) -> losses.OwnNegatives | None:
        """Those of the queries at some places."""
        if hard is None or mined is None:
            return None
        is_missing = hard.ids[part] < 0  # [P, H]
        log_shares = hard.log_shares()[part].unsqueeze(1).expand_as(is_missing)
        return losses.OwnNegatives(
            mined.embeddings.view(*hard.ids.shape, -1)[part],
            log_shares if is_corrected else torch.zeros_like(log_shares),
            is_missing,
        )

    def of_part(part: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of what the queries at some places ask for; how many negatives are masked, are left, and there are."""
        asked, within = part, torch.arange(len(part))
        if askers is not None:
            asked = ((askers >= part[0]) & (askers <= part[-1])).nonzero().squeeze(1)
            within = askers[asked] - part[0]
        liked, own = is_liked(part, candidates.ids), own_negatives(part)
        # What is drawn from a window stands for all of it.
        is_out = liked | hard.in_windows(part, candidates.ids, likes.num_items) if hard and is_corrected else liked
        weights_of_part = None if weights is None else weights[asked]
        if askers is None:
            loss = losses.softmax_loss(
                queries.embeddings[part],
                item_embeddings,
                log_counts,
                columns[part],
                is_out,
                temperature(),
                options.score_margin,
                weights_of_part,
                own,
            )
        else:
            loss = losses.shared_softmax_loss(
                queries.embeddings[part],
                item_embeddings,
                log_counts,
                within,
                columns[asked],
                is_out,
                temperature(),
                weights_of_part,
                own,
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
                weights_of_part,
            )
            loss = (loss + to_queries) / 2
        num_left = torch.zeros_like(part)
        num_negatives = torch.full_like(part, num_columns - 1)
        if left_likes is not None:
            num_left += (left_likes.among(asking[part], candidates.ids) & ~is_out).sum(dim=1)
        if hard is not None:
            num_negatives += (hard.ids[part] >= 0).sum(dim=1)
            if left_likes is not None:
                num_left += left_likes.each(asking[part], hard.ids[part]).sum(dim=1)
        counts = torch.stack([liked.sum(dim=1) - 1, num_left, num_negatives])
        return loss * (len(asked) / batch_size), counts[:, within].sum(dim=1)

    part_size = batch_size if chunk_size is None else max(1, chunk_size * chunk_size // (2 * num_columns))
    loss, counts = 0.0, torch.zeros(3, dtype=torch.int64)
    for part in torch.split(torch.arange(len(queries.embeddings)), part_size):
        loss_of_part, counts_of_part = of_part(part)
        loss_of_part.backward()  # type: ignore[no-untyped-call]
        loss += loss_of_part.item()
        counts += counts_of_part
    for embedded in (queries, scored, mined):
        if embedded is not None:
            embedded.backward()
    sources.remember(positives, scored.embeddings[columns].detach())
    num_masked, num_left, num_negatives = counts.tolist()
    return StepFigures(loss, num_masked / max(1, num_negatives), num_left / max(1, num_negatives))


def take(features: Tensors, rows: Tensor) -> Tensors:
    """Features of some rows."""
    return {name: values[rows] for name, values in features.items()}
