"""Our training steps, in a process of its own: `python -m benchmarks.training.steps FOLDER` takes them when asked to.

Deliberately does not know what they are compared with. Each line on the standard input asks for a burst of steps, as
JSON; each line of the answer says what they took.
"""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.training.data import LENGTH, configuration
from trainer import losses
from trainer.config import TrainerConfig
from trainer.encode import EncodedQueries, Tensors
from trainer.likes import Likes
from trainer.model import TwoTowers
from trainer.negatives import Sources
from trainer.optimisers import Optimisers
from trainer.run import prepare
from trainer.step import backward

ROWWISE, ADAMW, NONE = "row-wise Adagrad", "AdamW", "no optimiser"
_LEARNING_RATE = 0.01


class _Timed(EncodedQueries):
    """Queries that note what making their batches took."""

    def batch(self, rows: Tensor) -> Tensors:
        started_s = time.perf_counter()
        features = super().batch(rows)
        object.__setattr__(self, "batches_s", getattr(self, "batches_s", 0.0) + time.perf_counter() - started_s)
        return features


class Steps:
    """Steps over whole histories in a log, each of two tables that a row is read from for each id."""

    def __init__(self, folder: Path) -> None:
        """Reads and encodes the log.

        Args:
            folder: As `benchmarks.training.data.write_log` fills it.
        """
        self._config = _configuration()
        self._prepared = prepare(self._config, folder)
        examples = self._prepared.examples
        [(name, history)] = examples.queries.histories.items()
        num_examples = len(examples.positives)
        # Stretches of the log from anywhere: whole, as the histories of old users are.
        starts = np.random.default_rng(0).integers(len(history.ids) - LENGTH, size=num_examples)
        whole = replace(
            history,
            starts=torch.from_numpy(starts),
            lengths=torch.full((num_examples,), LENGTH, dtype=history.lengths.dtype),
        )
        self._queries = _Timed(examples.queries.users, examples.queries.user_features, {name: whole})
        self._examples = replace(examples, queries=self._queries)
        users, num_items = examples.queries.users, len(self._prepared.item_counts)
        self._likes = Likes.of(users, examples.positives, int(users.max()) + 1, num_items)

    def burst(self, variant: str, batch_size: int, num_steps: int) -> dict[str, float]:
        """Takes some steps, from the same start each time.

        Args:
            variant: Of the optimiser.
            batch_size: B
            num_steps: How many; the first of another two warms up.

        Returns:
            Seconds of the steps, and of making their batches.
        """
        options = self._config.training.model_copy(
            update={"batch_size": batch_size, "table_optimiser": "adamw" if variant == ADAMW else "adagrad"}
        )
        torch.manual_seed(0)
        encoder = self._prepared.encoder
        model = TwoTowers(self._prepared.fitted.schema, encoder.query, encoder.item, self._config.model).train()
        temperature = losses.Temperature(options.temperature, options.learn_temperature)
        optimisers = Optimisers(model, temperature, options)
        sources = Sources(self._examples.log_q, self._config.model.dim, options)
        rows = torch.from_numpy(np.random.default_rng(1).integers(len(self._queries), size=(num_steps + 2, batch_size)))
        for step, of_step in enumerate(rows):
            if step == 2:
                object.__setattr__(self._queries, "batches_s", 0.0)
                started_s = time.perf_counter()
            optimisers.zero_grad()
            backward(
                model,
                temperature,
                self._prepared.items,
                self._examples,
                of_step,
                sources,
                self._likes,
                None,
                options,
                epoch=0,
                step=step,
            )
            if variant != NONE:
                optimisers.step(_LEARNING_RATE)
        return {
            "seconds": time.perf_counter() - started_s,
            "feeding_s": self._queries.batches_s,  # type: ignore[attr-defined]
        }


def _configuration() -> TrainerConfig:
    """That of the log, and the id of the user."""
    declared = configuration(seed=0).model_dump(mode="json")
    declared["features"] = [{"name": "user_id", "owner": "query", "kind": "categorical"}, *declared["features"]]
    return TrainerConfig.model_validate_json(json.dumps(declared))


def main() -> None:
    """Answers until the input ends."""
    folder, num_threads = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(num_threads)
    steps = Steps(folder)
    _say({"version": f"torch {torch.__version__}"})
    for line in sys.stdin:
        _say(steps.burst(**json.loads(line)))


def _say(figures: dict[str, Any]) -> None:
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
