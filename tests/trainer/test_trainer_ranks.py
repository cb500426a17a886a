"""Processes that train together make what one makes."""

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import taken_steps
import torch
from child_process import tied
from rich.console import Console
from safetensors.torch import load_file
from toy_runs import run

from trainer import state
from trainer.config import TrainerConfig, read_config
from trainer.train import seed_of_dropout

Configure = Callable[..., TrainerConfig]
HARD: Mapping[str, Any] = {"training__hard_negatives": 2, "training__hard_negatives_ranks": [1, 7]}
SOURCES: Mapping[str, Any] = {
    **HARD,
    "training__hard_negatives_every": 7,
    "training__memory": 70,
    "training__logq": "streaming",
}
CASES: list[tuple[dict[str, Any], int]] = [
    ({}, 61),
    ({"training__symmetric": True, "training__chunk_size": 7, **HARD}, 61),
    ({"training__memory": 40, "training__logq": "streaming", "training__uniform_negatives": 15}, 61),
    ({"training__negatives": "all", "training__score_margin": 0.05}, 61),
    ({"history__pooling": "transformer", "model__transformer_dropout": 0.0, **HARD}, 61),
    ({"training__history_share": 0.5, **HARD}, 61),
    ({"training__table_optimiser": "adagrad", "training__chunk_size": 7}, 61),
    ({"model__matryoshka_dims": [3, 6], "training__memory": 40, "training__symmetric": True, **HARD}, 61),
    ({"training__items_as_of": "interaction", "training__uniform_negatives": 15, **HARD}, 61),
    ({"data__label_column": "label", "training__shown_negatives": 3, **HARD}, 61),
    # The second step has one row for two processes.
    ({"training__memory": 40, **HARD}, 3),
]


def torchrun(world: Path, *arguments: str) -> subprocess.Popen[str]:
    """Two processes."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    return subprocess.Popen(
        tied(sys.executable, *launcher, *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=world,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"},
    )


def train(world: Path, *arguments: str) -> subprocess.Popen[str]:
    return torchrun(world, "-m", "trainer", str(world / "toy.toml"), "--store", str(world / "store"), *arguments)


def without_dropout(config: TrainerConfig) -> TrainerConfig:
    """Nor with the sample of a history: what chance drops is other in each process."""
    toml = config.model_dump(mode="json")
    toml["model"]["dropout"] = 0.0
    if toml["training"]["history_share"] is not None:
        toml["features"] = [feature for feature in toml["features"] if feature["name"] != "history"]
    return TrainerConfig.model_validate_json(json.dumps(toml))


def test_two_processes_give_the_gradients_of_one(world: Path, configure: Configure) -> None:
    """And, after two epochs with all that a source has to remember, its parameters."""
    table = pq.read_table(world / "interactions.parquet")
    labels = pa.array([int(number % 4 > 0) for number in range(len(table))])
    pq.write_table(table.append_column("label", labels), world / "interactions.parquet")
    cases = [(without_dropout(configure(**changes)), num_rows) for changes, num_rows in CASES]
    (world / "cases.json").write_text(json.dumps([(config.model_dump(mode="json"), rows) for config, rows in cases]))
    whole = configure(model__dropout=0.0, training__epochs=2, **SOURCES)
    (world / "whole.json").write_text(whole.model_dump_json())
    process = torchrun(world, taken_steps.__file__, str(world), str(world / "cases.json"), str(world / "whole.json"))
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    for number, (config, num_rows) in enumerate(cases):
        figures, of_one = taken_steps.take_steps(config, world, num_rows)
        for rank in range(2):
            taken = json.loads((world / f"{number}.{rank}.json").read_text())
            assert taken["loss"] == pytest.approx(figures.loss, rel=1e-5), CASES[number]
            assert (taken["masked"], taken["left"]) == (figures.masked, figures.left), CASES[number]
            gradients = load_file(world / f"{number}.{rank}.safetensors")
            assert gradients.keys() == of_one.keys()
            for name, gradient in gradients.items():
                torch.testing.assert_close(
                    gradient, of_one[name], atol=1e-6, rtol=1e-4, msg=lambda text, n=name, c=number: f"{c} {n} {text}"
                )

    run(whole, world, world / "alone")
    expected, found = state.load_state(world / "alone"), state.load_state(world / "trained")
    assert found.progress.best_metric == expected.progress.best_metric
    assert_close_parameters(found, expected)


def assert_close_parameters(found: state.RunState, expected: state.RunState) -> None:
    assert found.parameters.keys() == expected.parameters.keys()
    for name, value in expected.parameters.items():
        torch.testing.assert_close(found.parameters[name], value, atol=1e-5, rtol=1e-4)


def test_two_processes_train_and_publish_what_one_does(world: Path) -> None:
    """With row-wise Adagrad for the tables; Ctrl-C on the way, which comes to torchrun, changes nothing."""
    sources = "memory = 70\nlogq = 'streaming'\nhard_negatives = 2\nhard_negatives_ranks = [1, 7]"
    sources += "\ntable_optimiser = 'adagrad'"
    content = (world / "toy.toml").read_text().replace("dropout = 0.1", "dropout = 0.0")
    (world / "toy.toml").write_text(content.replace("epochs = 4", f"epochs = 4\nhard_negatives_every = 7\n{sources}"))
    screen = io.StringIO()
    expected = run(read_config(world / "toy.toml"), world, world / "alone", console=Console(file=screen, width=160))

    process = train(world)
    assert process.stdout is not None
    before = []
    for line in process.stdout:
        before.append(line)
        if line.startswith("epoch   2"):
            process.send_signal(signal.SIGINT)
            break
    rest, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "epoch   4" not in rest
    assert errors.count("Interrupted. The run is saved in ") == 1

    process = train(world, "--resume")
    output, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    assert output.count("Published checkpoint 1") == 1

    found = state.load_state(world / "run" / state.STATE_FILE)
    assert found.progress.best_metric == expected.progress.best_metric
    assert_close_parameters(found, expected)
    assert figures_of([*before, *rest.splitlines(), *output.splitlines()]) == figures_of(screen.getvalue().splitlines())


def figures_of(lines: list[str]) -> list[str]:
    """The lines of the epochs, without their times."""
    return [line.rsplit("left", 1)[0] for line in lines if line.startswith("epoch")]


def test_a_mistake_is_said_once(world: Path) -> None:
    process = train(world, "--data", str(world / "nowhere"))
    output, errors = process.communicate(timeout=100)
    assert process.returncode != 0
    assert output == ""
    assert errors.count(f"{world / 'nowhere'}") == 1


def test_no_two_processes_and_no_two_steps_drop_alike() -> None:
    numbers = (0, 1)
    seeds = {
        seed_of_dropout(seed, epoch, step, rank)
        for seed in numbers
        for epoch in numbers
        for step in numbers
        for rank in numbers
    }
    assert len(seeds) == 16
    assert seed_of_dropout(1, 2, 3, 0) == seed_of_dropout(1, 2, 3, 0)
