"""Trainings of the toy world without what comes after them, and states that are equal.

Deliberately does not know what a test changes.
"""

import copy
import dataclasses
import io
import signal
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from trainer import state
from trainer.config import TrainerConfig
from trainer.encode import Tensors, TrainingQueries
from trainer.model import TwoTowers
from trainer.ranks import ALONE, Ranks
from trainer.run import prepare
from trainer.train import train_towers

ORIGIN = {"config": {}, "file": {}}


def run(
    config: TrainerConfig,
    folder: Path,
    state_file: Path,
    interrupt_at: int | None = None,
    resumed: state.RunState | None = None,
    console: Console | None = None,
    ranks: Ranks = ALONE,
) -> state.RunState:
    """Trains on the data of a folder; Ctrl-C comes while the given batch, counted from 1 over all epochs, is read."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.training.seed)
        prepared = prepare(config, folder)
        model = TwoTowers(prepared.fitted.schema, prepared.encoder.query, prepared.encoder.item, config.model)
        examples = prepared.examples
        if interrupt_at is not None:
            examples = dataclasses.replace(examples, queries=_interrupting(examples.queries, interrupt_at))
        return train_towers(
            model,
            prepared.items,
            examples,
            prepared.validation,
            config,
            ORIGIN,
            state_file,
            console or Console(file=io.StringIO()),
            resumed,
            ranks,
        )


def _interrupting(queries: TrainingQueries, interrupt_at: int) -> TrainingQueries:
    """Queries whose nth batch brings a real SIGINT."""
    countdown = iter(range(interrupt_at - 1, -1, -1))

    def batch(rows: Tensor) -> Tensors:
        if next(countdown, None) == 0:
            signal.raise_signal(signal.SIGINT)
        return queries.batch(rows)

    interrupting = copy.copy(queries)
    object.__setattr__(interrupting, "batch", batch)
    return interrupting


def assert_equal_states(first: state.RunState, second: state.RunState) -> None:
    """Bit for bit."""
    assert first.progress == second.progress
    assert first.sources.keys() == second.sources.keys()
    for name, tensor in first.sources.items():
        assert torch.equal(tensor, second.sources[name]), name
    for name, tensor in first.parameters.items():
        assert torch.equal(tensor, second.parameters[name]), name
        assert torch.equal(first.best_parameters[name], second.best_parameters[name]), name
        for moment, value in first.moments[name].items():
            assert torch.equal(value, second.moments[name][moment]), (name, moment)
