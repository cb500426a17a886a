"""One step: the loss of a batch, and its gradients, in one piece or in parts that fit.

Deliberately does not know optimisers, epochs, nor where the examples come from.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trainer import losses
from trainer.as_of import ItemsAsOf
from trainer.caching import Embedded
from trainer.config import TrainingConfig
from trainer.encode import Tensors, TrainingQueries
from trainer.likes import Likes
from trainer.matryoshka import prefix
from trainer.model import TwoTowers
from trainer.negatives import Sources, joined
from trainer.ranks import ALONE, Everywhere, Ranks
from trainer.shown import Shown, keys_of

_SCORES_AT_ONCE = 2**18
"""1 MB: passes over scores that a core's own cache holds take a third of the time of passes over memory."""
_ROWS_AT_LEAST = 64
"""Of a part: each adds to the gradients of all items, which for a few rows costs more than their scores.
With chunks memory comes first."""


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
    as_of: ItemsAsOf | None
    """What of the items changes with time; None where they are as at the end of the training data."""
    shown: Shown | None = None
    """What users did not choose; None where that is no negative."""


@dataclass(frozen=True)
class StepFigures:
    """What a step was like."""

    loss: float
    masked: float
    """Share of the negatives that was masked."""
    left: float
    """Share that was not, although the user is known to like the item; 0 where that was not asked."""


@dataclass(frozen=True)
class _Asked:
    """The B interactions of a batch, of all processes, and the Q queries that ask for them."""

    users: Tensor
    """`[Q]` of each query."""
    askers: Tensor | None
    """`[B]` the query of each interaction; None where each has its own."""
    positives: Tensor
    """`[B]` its item."""
    weights: Tensor | None
    """`[B]` what its loss is multiplied by; None where all count alike."""
    moments_s: Tensor | None
    """`[B]` when it was; None where items are the same at all times."""
    likes: Likes
    mask_known_positives: bool

    @classmethod
    def of(cls, examples: TrainingExamples, rows: Tensor, likes: Likes, options: TrainingConfig) -> "_Asked":
        batch, askers = examples.queries.interactions(rows), examples.queries.askers(rows)
        users = examples.queries.users[batch]  # [B]
        return cls(
            users if askers is None else users[torch.searchsorted(askers, torch.arange(len(rows)))],
            askers,
            examples.positives[batch],
            None if examples.weights is None else examples.weights[batch],
            None if examples.as_of is None else examples.as_of.moments_s[batch],
            likes,
            options.mask_known_positives,
        )

    def by(self, part: Tensor) -> tuple[Tensor, Tensor]:
        """The interactions `[b]` that queries at successive places `[P]` ask for, and which of the P asks for each."""
        if self.askers is None:
            return part, torch.arange(len(part))
        asked = ((self.askers >= part[0]) & (self.askers <= part[-1])).nonzero().squeeze(1)
        return asked, self.askers[asked] - part[0]

    def are_liked(self, places: Tensor, ids: Tensor) -> Tensor:
        """`[P, C]` which of the items `[C]` are no negatives of the queries at places `[P]`."""
        if self.mask_known_positives:
            return self.likes.among(self.users[places], ids)
        return losses.accidental_hits(self.positives[places], ids)

    def each_liked(self, places: Tensor, ids: Tensor) -> Tensor:
        """`[P, K]` which of the items `[P, K]` are no negatives of their row's query."""
        if self.mask_known_positives:
            return self.likes.each(self.users[places], ids)
        return ids == self.positives[places].unsqueeze(1)


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
    ranks: Ranks = ALONE,
) -> StepFigures:
    """Gives the parameters, which have none, the gradients of a batch, after which the sources go on to the next.

    Rows are scored a part at a time, whose gradients add up at the embeddings. With `chunk_size` a chunk of rows goes
    through a tower at a time too, and a part has half the places of a whole batch of that size at most, which leaves
    room for the embeddings of all rows and their gradients. The gradients of the parameters are the same; each tower
    runs twice.

    Embeddings of several widths have the mean of the losses by each (Kusupati et al. 2022, with equal weights).

    Several processes embed a part of the queries and items each, and score their part of the queries against all
    items: the sum of their losses is the loss of the batch, and all end with its gradients.

    Args:
        model: Both towers.
        temperature: Of the softmax.
        items: Features of all items, `[I, …]`.
        examples: The training interactions.
        rows: Rows of the examples' queries that make the batch of B interactions, of all processes.
        sources: Of negatives.
        likes: What users are known to like: never a negative.
        left_likes: What they are known to like besides; counted among the negatives. None: nothing is.
        options: The loss.
        epoch: Whole epochs done.
        step: Steps done of this one.
        ranks: The processes that train together.
    """
    asked, chunk_size = _Asked.of(examples, rows, likes, options), options.chunk_size
    num_queries, batch_size = len(asked.users), len(asked.positives)

    def items_of(ids: Tensor, askers: Tensor) -> Callable[[Tensor], Tensor]:
        """Embeddings of places `[R]` among those of items `[C]`, each as of when an interaction `[C]` was."""

        def embed(places: Tensor) -> Tensor:
            features = take(items, ids[places])
            if examples.as_of is not None and asked.moments_s is not None:
                features |= examples.as_of.features(ids[places], asked.moments_s[askers[places]])
            with _precision(options):
                return model.item(features)  # type: ignore[no-any-return]

        return embed

    def embed_queries(some: Tensor) -> Tensor:
        features, places = examples.queries.batch(some), examples.queries.places(some)
        with _precision(options):
            return model.query(features, places)  # type: ignore[no-any-return]

    def count_queries(some: Tensor) -> int:
        return len(some) if asked.askers is not None else len(examples.queries.interactions(some))

    queries = Everywhere(embed_queries, rows, count_queries, chunk_size, ranks)
    fresh, columns = sources.candidates(asked.positives, epoch, step)
    fresh_places = torch.arange(len(fresh.ids))
    # Positives stand first, as of their own interactions; uniform draws as of one each, in turn.
    embed_fresh = items_of(fresh.ids, fresh_places % batch_size)
    scored = Everywhere(embed_fresh, fresh_places, len, chunk_size, ranks)
    remembered, remembered_embeddings = sources.remembered()
    candidates = joined([fresh, remembered])
    item_embeddings, num_columns = torch.cat([scored.embeddings, remembered_embeddings]), len(candidates.ids)
    push = num_columns / len(fresh.ids)
    is_corrected = options.logq != "none"
    log_counts = candidates.log_q + math.log(num_columns) if is_corrected else torch.zeros(num_columns)
    first = int(queries.own[0]) if len(queries.own) else 0
    hard = sources.hard(queries.embeddings.detach(), queries.own, asked.each_liked, epoch, step)
    drawn = [] if hard is None else [hard.ids]
    if examples.shown is not None and len(queries.own):
        keys = keys_of(num_queries, options.seed, epoch, step)[queries.own]
        shown = examples.shown.drawn(asked.users[queries.own], keys, options.shown_negatives)
        drawn.append(shown.masked_fill(asked.each_liked(queries.own, shown), -1))
    own_ids = torch.cat(drawn, dim=1) if drawn else None  # [n, H + S]
    own_embedded = None
    if own_ids is not None:
        ids = own_ids.clamp(min=0).flatten()
        embed_own = items_of(ids, queries.own.repeat_interleave(own_ids.shape[1]))
        own_embedded = Embedded(embed_own, torch.arange(len(ids)), chunk_size)

    def of_part(part: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of what the queries at some places ask for; how many negatives are masked, are left, and there are."""
        interactions, within = asked.by(part)
        weights = None if asked.weights is None else asked.weights[interactions]
        liked = asked.are_liked(part, candidates.ids)  # [P, C]
        log_counts_of_part, own = log_counts, None
        if own_ids is not None and own_embedded is not None:
            here = part - first
            ids_of_part = own_ids[here]  # [P, H + S]
            # What was shown is there once and for certain: the log of its count is 0.
            log_own_counts = torch.zeros(ids_of_part.shape)
            if is_corrected and hard is not None:
                elsewhere = sources.log_expected(candidates.ids, num_columns)
                log_elsewhere = sources.log_expected(hard.ids[here].clamp(min=0), num_columns)
                log_own_counts[:, : hard.ids.shape[1]] = hard.log_counts(here, log_elsewhere)
                log_counts_of_part = hard.log_counts_elsewhere(
                    here, candidates.ids, log_counts, elsewhere, likes.num_items
                )
            embeddings = own_embedded.embeddings.view(*own_ids.shape, -1)[here]
            own = losses.OwnNegatives(embeddings, log_own_counts, ids_of_part < 0)
        asks_liked = asked.are_liked(torch.arange(num_queries), asked.positives[part]).T if options.symmetric else None

        def loss_by(width: int) -> Tensor:
            """By the first dimensions of all embeddings."""
            own_by_width = None if own is None else replace(own, embeddings=prefix(own.embeddings, width))
            if asked.askers is not None:
                return losses.shared_softmax_loss(
                    prefix(queries.embeddings[part], width),
                    prefix(item_embeddings, width),
                    log_counts_of_part,
                    within,
                    columns[interactions],
                    liked,
                    temperature(),
                    weights,
                    own_by_width,
                    push,
                )
            loss = losses.softmax_loss(
                prefix(queries.embeddings[part], width),
                prefix(item_embeddings, width),
                log_counts_of_part,
                columns[part],
                liked,
                temperature(),
                options.score_margin,
                weights,
                own_by_width,
                push,
            )
            if asks_liked is None:
                return loss
            # Queries have no q: how often one comes is known of its user, not of its history.
            to_queries = losses.softmax_loss(
                prefix(scored.embeddings[columns[part]], width),
                prefix(queries.embeddings, width),
                torch.zeros(num_queries),
                part,
                asks_liked,
                temperature(),
                options.score_margin,
                weights,
            )
            return (loss + to_queries) / 2

        loss = torch.stack([loss_by(width) for width in model.widths]).mean()
        num_negatives = torch.full_like(part, num_columns - 1, dtype=torch.int32)
        num_left = torch.zeros_like(part, dtype=torch.int32)
        if left_likes is not None:
            num_left += _count(left_likes.among(asked.users[part], candidates.ids) & ~liked)
        if own_ids is not None:
            ids_of_part = own_ids[part - first]
            num_negatives += _count(ids_of_part >= 0)
            if left_likes is not None:
                num_left += _count(left_likes.each(asked.users[part], ids_of_part))
        counts = torch.stack([_count(liked) - 1, num_left, num_negatives])[:, within].sum(dim=1)
        return loss * (len(interactions) / batch_size), counts

    scores_of_row = num_columns * len(model.widths)
    if chunk_size is None:
        part_size = max(_ROWS_AT_LEAST, _SCORES_AT_ONCE // scores_of_row)
    else:
        part_size = max(1, min(_SCORES_AT_ONCE, chunk_size**2 // 2) // scores_of_row)
    figures = torch.zeros(4, dtype=torch.float64)
    for part in torch.split(queries.own, part_size) if len(queries.own) else ():
        loss, counts = of_part(part)
        loss.backward()  # type: ignore[no-untyped-call]
        figures += torch.cat([loss.detach().unsqueeze(0), counts])
    queries.backward()
    scored.backward()
    if own_embedded is not None:
        own_embedded.backward()
    ranks.sum_gradients([*model.parameters(), *temperature.parameters()])
    sources.remember(asked.positives, scored.embeddings[columns].detach())
    loss_of_all, num_masked, num_left, num_negatives = ranks.summed(figures).tolist()
    return StepFigures(loss_of_all, num_masked / max(1, num_negatives), num_left / max(1, num_negatives))


def _precision(options: TrainingConfig) -> AbstractContextManager[object]:
    """Of the matrix products within: in bfloat16 no range of float32 is lost, so gradients need no scaling.

    Micikevicius et al. 2018, "Mixed precision training"; Kalamkar et al. 2019, "A study of bfloat16".
    """
    return torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bfloat16")


def _count(chosen: Tensor) -> Tensor:
    """`[P]` how many of each row; summing in 32 bits takes half as long as in 64."""
    return chosen.sum(dim=1, dtype=torch.int32)


def take(features: Tensors, rows: Tensor) -> Tensors:
    """Features of some rows."""
    return {name: values[rows] for name, values in features.items()}
