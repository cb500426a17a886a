"""What a typed query and a training step cost, each beside another way: both take turns, and medians count.

Deliberately does not know what is found.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from rich.table import Table
from tokenizers import Tokenizer
from torch import Tensor

from retrieval_client import RetrievalClient
from towers.checkpoint import CheckpointStore
from towers.text import TextTokenizer
from towers.tower import Tower
from trainer import losses
from trainer.config import TrainerConfig
from trainer.likes import Likes
from trainer.model import TwoTowers
from trainer.negatives import Sources
from trainer.optimisers import Optimisers
from trainer.run import Prepared
from trainer.step import backward
from trainer.text import with_adapters_merged
from trainer.train import learning_rate, permutation

NUM_TOKENS = 16
"""Of a typed query, those that mark its start and end included."""
_K = 10


@dataclass(frozen=True)
class Ratio:
    """Medians of two sides that took turns."""

    name: str
    other: str
    """What it is compared with."""
    seconds: float
    other_seconds: float
    most: float
    """That the ratio of both is to be."""

    @property
    def ratio(self) -> float:
        """Of the other side's time."""
        return self.seconds / self.other_seconds

    @property
    def verdict(self) -> str:
        """Whether it is as low as it is to be."""
        return "reached" if self.ratio <= self.most else "missed"


def in_turn(
    name: str, side: Callable[[], object], other: str, other_side: Callable[[], object], most: float, rounds: int
) -> Ratio:
    """Times both sides in turn, after one round that does not count.

    Args:
        name: Of the first side.
        side: Does something once.
        other: Name of the other.
        other_side: The other way.
        most: Share of the other's time that is asked for.
        rounds: How many.
    """
    found = [(_seconds(side), _seconds(other_side)) for _ in range(rounds + 1)][1:]
    seconds, other_seconds = (statistics.median(of_side) for of_side in zip(*found, strict=True))
    return Ratio(name, other, seconds, other_seconds, most)


def typed_queries(tokenizer: str, count: int) -> list[str]:
    """Different texts of `NUM_TOKENS` tokens each.

    Args:
        tokenizer: Content of the tokenizer's file.
        count: How many.
    """
    words = sorted(word for word in Tokenizer.from_str(tokenizer).get_vocab() if word.isalpha() and word.islower())
    cutter = TextTokenizer(tokenizer, NUM_TOKENS)
    num_words = NUM_TOKENS - (len(cutter.ids(words[0])) - 1)
    generator, texts = np.random.default_rng(0), dict[str, None]()
    while len(texts) < count:
        text = " ".join(generator.choice(words, num_words))
        if len(cutter.ids(text)) == NUM_TOKENS and not cutter.is_truncated(text):
            texts[text] = None
    return list(texts)


def cached_query(client: RetrievalClient, feature: str, texts: Sequence[str], rounds: int) -> Ratio:
    """A query whose embedding the service holds, beside queries that it never saw; the 10 best items of each.

    Args:
        client: Calls the service.
        feature: Name of the text.
        texts: At least `rounds + 2`, none of which was asked before.
        rounds: How many.

    Raises:
        RuntimeError: the service held what it should not, or did not hold what it should.
    """
    unseen = iter(texts)
    seen = next(unseen)
    client.retrieve({feature: seen}, _K)

    def ask(text: str, is_held: bool) -> None:
        if client.retrieve({feature: text}, _K).embedding_cached != is_held:
            raise RuntimeError(f"the embedding was {'not ' if is_held else ''}held: {text!r}")

    return in_turn(
        f"Retrieve, {NUM_TOKENS} tokens, embedding held",
        lambda: ask(seen, True),
        "not held",
        lambda: ask(next(unseen), False),
        1 / 3,
        rounds,
    )


def tower_beside_torch(
    checkpoints: CheckpointStore, version: int, model: TwoTowers, text: str, num_threads: int, rounds: int
) -> Ratio:
    """The query tower as it is served, beside the network that it was exported from.

    Args:
        checkpoints: Holds the version.
        version: The checkpoint.
        model: Of which it is the export.
        text: The query.
        num_threads: Of both sides.
        rounds: How many.
    """
    tower = Tower(checkpoints.load(version, "query"), num_threads)
    (feature,) = tower.encoder.features
    arrays = tower.encoder.encode_rows([{feature.name: text}])
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    network, threads_before = with_adapters_merged(model.query).eval(), torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        with torch.inference_mode():
            return in_turn(
                f"exported query tower, {NUM_TOKENS} tokens, threads: {num_threads}",
                lambda: tower.embed(arrays),
                "eager torch",
                lambda: network(tensors),
                0.5,
                rounds,
            )
    finally:
        torch.set_num_threads(threads_before)


@dataclass(frozen=True)
class Step:
    """A step of a training: what it learns from and how far it goes."""

    rows: Tensor
    """`[B]` of the training interactions."""
    learning_rate: float
    """Of the encoder."""


def steps_of(config: TrainerConfig, num_pairs: int) -> list[Step]:
    """All that a training of so many interactions takes, without stopping early."""
    options = config.training
    encoder_share = (options.encoder_learning_rate or options.learning_rate) / options.learning_rate
    batches = [
        rows
        for epoch in range(options.epochs)
        for rows in torch.split(permutation(options.seed, epoch, num_pairs), options.batch_size)
    ]
    return [
        Step(rows, encoder_share * learning_rate(options, number, len(batches))) for number, rows in enumerate(batches)
    ]


class OurSteps:
    """Steps from the untrained towers on, as a training takes them."""

    def __init__(self, config: TrainerConfig, prepared: Prepared) -> None:
        """Before the first step."""
        torch.manual_seed(config.training.seed)
        self.model = TwoTowers(
            prepared.fitted.schema, prepared.encoder.query, prepared.encoder.item, config.model
        ).train()
        self._prepared, self._options = prepared, config.training
        self._temperature = losses.Temperature(self._options.temperature, self._options.learn_temperature)
        self._optimisers = Optimisers(self.model, self._temperature, self._options)
        examples = prepared.examples
        self._sources = Sources(examples.log_q, config.model.dim, self._options)
        users, num_items = examples.queries.users, len(prepared.item_counts)
        self._likes = Likes.of(users, examples.positives, int(users.max()) + 1, num_items)
        self._count = itertools.count()

    def take(self, step: Step) -> None:
        """Takes one."""
        self._optimisers.zero_grad()
        backward(
            self.model,
            self._temperature,
            self._prepared.items,
            self._prepared.examples,
            step.rows,
            self._sources,
            self._likes,
            None,
            self._options,
            epoch=0,
            step=next(self._count),
        )
        self._optimisers.step(self._options.learning_rate)


def steps_beside(
    ours: OurSteps, theirs: Callable[[Step], object], name_of_theirs: str, steps: Sequence[Step], rounds: int
) -> Ratio:
    """Training steps of two sides over the same batches, all of the same size.

    Args:
        ours: Takes steps.
        theirs: Takes a step too.
        name_of_theirs: For the table.
        steps: Those of a training, taken in turn.
        rounds: How many.
    """
    size = max(len(step.rows) for step in steps)
    whole = [step for step in steps if len(step.rows) == size]
    mine, others = itertools.cycle(whole), itertools.cycle(whole)
    return in_turn(
        f"training step, batch of {size}",
        lambda: ours.take(next(mine)),
        name_of_theirs,
        lambda: theirs(next(others)),
        1.0,
        rounds,
    )


def shown(ratios: Sequence[Ratio]) -> Table:
    """The ratios as a table, beside what they are to be."""
    table = Table(title="Medians, in turn")
    for column in ("", "ms", "beside", "ms", "ratio", "at most"):
        table.add_column(column, justify="left" if column in ("", "beside") else "right")
    table.add_column("")
    for ratio in ratios:
        table.add_row(
            ratio.name,
            f"{1e3 * ratio.seconds:.1f}",
            ratio.other,
            f"{1e3 * ratio.other_seconds:.1f}",
            f"{ratio.ratio:.2f}",
            f"{ratio.most:.2f}",
            ratio.verdict,
        )
    return table


def _seconds(act: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    act()
    return time.perf_counter() - started_s
