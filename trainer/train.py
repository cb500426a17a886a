"""The training loop, top to bottom: permute, slice, score, step; validate, keep the best, save.

Deliberately does not know files of data, ONNX or checkpoints.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from towers.checkpoint import EpochFigures
from towers.errors import InvalidInputError
from trainer import losses, state
from trainer.config import TrainerConfig, TrainingConfig
from trainer.curves import NoteEpoch, unnoted
from trainer.encode import EncodedQueries, Tensors
from trainer.evaluate import ScoreRows, embedding_scores, evaluate
from trainer.likes import Likes
from trainer.model import TowerNetwork, TwoTowers
from trainer.negatives import Sources
from trainer.optimisers import Optimisers
from trainer.questions import Questions
from trainer.ranks import ALONE, Ranks
from trainer.step import StepFigures, TrainingExamples, backward, take

_ROWS_AT_ONCE = 1024
_STEPS_PER_ESTIMATE = 16
"""Of so many steps one looks for false negatives that are left."""

_OF_DROPOUT = 2
"""Behind the step in the seed of what it draws; negatives have other numbers there."""


@dataclass(frozen=True)
class HeldOut:
    """Interactions to be predicted."""

    queries: EncodedQueries
    questions: Questions


def train_towers(
    model: TwoTowers,
    items: Tensors,
    examples: TrainingExamples,
    validation: HeldOut,
    config: TrainerConfig,
    origin: Mapping[str, Any],
    state_file: Path,
    console: Console,
    resumed: state.RunState | None = None,
    ranks: Ranks = ALONE,
    note_epoch: NoteEpoch = unnoted,
) -> state.RunState:
    """Trains until the last epoch or until validation stops getting better; without validation to the last.

    The state is saved at the start, after each epoch, and on Ctrl-C after the current step; a run that is resumed
    from it takes exactly the steps that it would have taken undisturbed. Of several processes each takes its part of
    every batch, and the first validates, saves and says how it goes; in all of them Ctrl-C in one ends the same step.

    Args:
        model: Both towers; ends with the parameters of the best epoch.
        items: Features of all items, `[I, …]`.
        examples: The training interactions.
        validation: Chooses the best epoch; where it is empty, that is the last.
        config: The configuration.
        origin: Goes into the state.
        state_file: Where the state is saved.
        console: Progress: a live bar on a terminal, and one line per epoch anywhere.
        resumed: The state to go on from.
        ranks: The processes that train together.
        note_epoch: Is told of each epoch, in the first of them.

    Returns:
        The finished state.

    Raises:
        InvalidInputError: the loss is not finite, or the state cannot be written.
        KeyboardInterrupt: on Ctrl-C, once the state is saved.
    """
    options, num_items = config.training, len(examples.log_q)
    temperature = losses.Temperature(options.temperature, options.learn_temperature)
    trained = nn.ModuleDict({"towers": model, "temperature": temperature})
    optimisers = Optimisers(model, temperature, options)
    likes, held_out_likes = _likes(examples, validation, num_items)
    sources = Sources(examples.log_q, config.model.dim, options)
    progress = state.Progress()
    best: Mapping[str, Tensor] = {}
    if resumed is not None:
        progress, best = resumed.progress, resumed.best_parameters
        state.restore_parameters(trained, resumed.parameters)
        optimisers.restore(resumed.moments)
        sources.restore(resumed.sources)

    def snapshot() -> state.RunState:
        return state.RunState(
            progress,
            origin,
            state.parameters_of(trained),
            best,
            optimisers.moments(),
            sources.state(),
        )

    def save() -> None:
        if ranks.is_first:
            state.save_state(state_file, snapshot())
        # Another's end is everybody's: none may end before the state is there.
        ranks.wait()

    queries = examples.queries
    rows_per_step = queries.rows_per_step(options.batch_size)
    num_steps = math.ceil(len(queries) / rows_per_step)
    save()
    with _interrupt_noted() as is_interrupted, _bar(console, config.evaluation.metric) as bar:
        task = bar.add_task("", total=num_steps, loss=math.nan, best=progress.best_metric, rate=0.0)
        while not progress.is_finished:
            order = permutation(options.seed, progress.epoch, len(queries))
            bar.reset(task, description=f"epoch {progress.epoch + 1}/{options.epochs}", completed=progress.step)
            first_step, start_s, rate = progress.step, time.monotonic(), 0.0
            model.train()
            for step in range(first_step, num_steps):
                rows = order[step * rows_per_step : (step + 1) * rows_per_step]
                torch.manual_seed(seed_of_dropout(options.seed, progress.epoch, step, ranks.rank))
                if sources.is_index_due(progress.epoch * num_steps + step):
                    sources.index(_embed_items_together(model.item, items, ranks))
                    model.train()
                optimisers.zero_grad()
                figures = backward(
                    model,
                    temperature,
                    items,
                    examples,
                    rows,
                    sources,
                    likes,
                    held_out_likes if step % _STEPS_PER_ESTIMATE == 0 else None,
                    options,
                    progress.epoch,
                    step,
                    ranks,
                )
                optimisers.step(learning_rate(options, progress.epoch * num_steps + step, options.epochs * num_steps))
                temperature.keep_in_range()
                progress = _after_step(progress, figures)
                rate = (step + 1 - first_step) * options.batch_size / (time.monotonic() - start_s)
                bar.update(task, advance=1, loss=progress.loss_sum / progress.step, rate=rate)
                if ranks.is_any(is_interrupted()):
                    save()
                    raise KeyboardInterrupt

            metrics = validate(model, items, validation, config) if ranks.is_first else {}
            metric = ranks.first_says(metrics.get(config.evaluation.metric))
            figures_of_epoch = EpochFigures(
                loss=progress.loss_sum / num_steps,
                masked=progress.masked_sum / num_steps,
                left=progress.left_sum / math.ceil(num_steps / _STEPS_PER_ESTIMATE),
                temperature=float(temperature().detach()),
                metric=metric,
            )
            progress = _after_epoch(progress, figures_of_epoch, options.epochs, options.patience)
            is_best = progress.best_epoch == progress.epoch
            if is_best:
                best = {name: value.detach().clone() for name, value in state.parameters_of(trained).items()}
            if ranks.is_first:
                last_step = progress.epoch * num_steps - 1
                note_epoch(
                    progress.epoch,
                    {
                        "loss": figures_of_epoch.loss,
                        "masked": figures_of_epoch.masked,
                        "left": figures_of_epoch.left,
                        "temperature": figures_of_epoch.temperature,
                        "learning_rate": learning_rate(options, last_step, options.epochs * num_steps),
                        "examples_per_s": rate,
                        **{f"validation/{name}": value for name, value in metrics.items()},
                    },
                )
            save()
            bar.update(task, best=progress.best_metric)
            console.print(
                f"epoch {progress.epoch:>3}  loss {figures_of_epoch.loss:.4f}  "
                f"{_judged(config.evaluation.metric, metric, is_best)}"
                f"masked {figures_of_epoch.masked:.2%}  left {figures_of_epoch.left:.3%}  {rate:>9,.0f} examples/s",
                highlight=False,
            )
    state.restore_parameters(trained, best)
    return snapshot()


def learning_rate(options: TrainingConfig, step: int, num_steps: int) -> float:
    """The learning rate of a step: depends on nothing that a resumed run would have to restore.

    Args:
        options: Say how it changes.
        step: Steps done.
        num_steps: Of all epochs.
    """
    share = {
        "constant": 1.0,
        "linear": 1 - step / num_steps,
        "cosine": (1 + math.cos(math.pi * step / num_steps)) / 2,
    }[options.schedule]
    return options.learning_rate * share * min(1.0, (step + 1) / max(1, options.warmup_steps))


def permutation(seed: int, epoch: int, num_rows: int) -> Tensor:
    """The order of an epoch's rows: depends on nothing that a resumed run would have to restore."""
    order: NDArray[np.int64] = np.random.default_rng([seed, epoch]).permutation(num_rows)
    return torch.from_numpy(order)


def validate(model: TwoTowers, items: Tensors, held_out: HeldOut, config: TrainerConfig) -> dict[str, float]:
    """Exact Recall, NDCG and MRR at each k, over all items; none where nothing is held out."""
    questions = held_out.questions
    if not len(questions.targets):
        return {}
    return evaluate(scores(model, items, held_out), questions.targets, questions.excluded, config.evaluation.ks)


def scores(model: TwoTowers, items: Tensors, held_out: HeldOut) -> ScoreRows:
    """Scores of all items for held-out queries."""
    return embedding_scores(embed_queries(model.query, held_out.queries), embed_items(model.item, items))


def embed_queries(tower: TowerNetwork, queries: EncodedQueries) -> Tensor:
    """Embeddings `[N, D]` of all queries, without dropout."""
    return _embed(tower, queries.batch, len(queries))


def embed_items(tower: TowerNetwork, items: Tensors) -> Tensor:
    """Embeddings `[I, D]` of all items, without dropout."""
    return _embed(tower, lambda rows: take(items, rows), len(next(iter(items.values()))))


def _embed(tower: TowerNetwork, batch: Callable[[Tensor], Tensors], num_rows: int) -> Tensor:
    tower.eval()
    with torch.inference_mode():
        return torch.cat([tower(batch(rows)) for rows in torch.split(torch.arange(num_rows), _ROWS_AT_ONCE)])


def _embed_items_together(tower: TowerNetwork, items: Tensors, ranks: Ranks) -> Tensor:
    """Embeddings `[I, D]` of all items, without dropout, of which each process makes its part."""
    rows = torch.arange(len(next(iter(items.values()))))
    sizes = [len(share) for share in torch.tensor_split(rows, ranks.size)]
    return ranks.gathered(embed_items(tower, take(items, ranks.share(rows))), sizes)


def _after_step(progress: state.Progress, figures: StepFigures) -> state.Progress:
    if not math.isfinite(figures.loss):
        raise InvalidInputError(
            f"the loss is {figures.loss} in epoch {progress.epoch + 1}, step {progress.step + 1}; lower "
            "[training] learning_rate or raise temperature"
        )
    return replace(
        progress,
        step=progress.step + 1,
        loss_sum=progress.loss_sum + figures.loss,
        masked_sum=progress.masked_sum + figures.masked,
        left_sum=progress.left_sum + figures.left,
    )


def _judged(name: str, metric: float | None, is_best: bool) -> str:
    return "" if metric is None else f"validation {name} {metric:.4f}{' *' if is_best else '  '}  "


def _after_epoch(progress: state.Progress, figures: EpochFigures, epochs: int, patience: int) -> state.Progress:
    epoch, metric = progress.epoch + 1, figures.metric
    is_best = progress.best_epoch == 0 or metric is None or metric > progress.best_metric
    best_epoch = epoch if is_best else progress.best_epoch
    return replace(
        progress,
        epoch=epoch,
        step=0,
        loss_sum=0.0,
        masked_sum=0.0,
        left_sum=0.0,
        best_epoch=best_epoch,
        best_metric=metric if is_best and metric is not None else progress.best_metric,
        epochs=(*progress.epochs, figures),
        is_finished=epoch >= epochs or epoch - best_epoch >= patience,
    )


def _likes(examples: TrainingExamples, validation: HeldOut, num_items: int) -> tuple[Likes, Likes]:
    """What training knows that users like, and what validation knows: false negatives that nothing masks."""
    users = examples.queries.users
    rows, targets = map(torch.from_numpy, validation.questions.targets.pairs())
    held_out_users = validation.queries.users[rows]
    num_users = int(torch.cat([users, held_out_users]).max()) + 1
    return (
        Likes.of(users, examples.positives, num_users, num_items),
        Likes.of(held_out_users, targets, num_users, num_items),
    )


def seed_of_dropout(seed: int, epoch: int, step: int, rank: int) -> int:
    """Of what a step draws of torch's generator: nothing to restore for a resumed run, and no two processes alike."""
    sequence = np.random.SeedSequence([seed, epoch, step + 1, _OF_DROPOUT, rank])
    return int(sequence.generate_state(1)[0])


@contextmanager
def _interrupt_noted() -> Iterator[Callable[[], bool]]:
    """Ctrl-C is noted, so that the step in hand ends first; a second one acts at once."""
    if threading.current_thread() is not threading.main_thread():
        # Python delivers signals to the main thread alone.
        yield lambda: False
        return
    noted = threading.Event()
    before = signal.getsignal(signal.SIGINT)

    def note(signal_number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the signature is Python's
        noted.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield noted.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def _bar(console: Console, metric: str) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(f"loss {{task.fields[loss]:.4f}}  best {metric} {{task.fields[best]:.4f}}"),
        TextColumn("{task.fields[rate]:,.0f} examples/s"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
