"""The same steps by TensorFlow Recommenders, run by a Python that has it; asked and answering as `steps` does.

Deliberately imports nothing of this project, and gets its batches ready made: what is measured is the step alone.
"""

import json
import os
import sys
import time
from typing import Any

os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")  # The Keras that TensorFlow Recommenders is written for.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
import tensorflow_recommenders as tfrs

DIM = 64
LENGTH = 50
TEMPERATURE = 0.1
LEARNING_RATE = 0.01


class TwoTowers(tf.Module):  # type: ignore[misc]
    """User id and mean of the history through a layer; item id through another; one table for items in both."""

    def __init__(self, num_users: int, num_items: int) -> None:
        super().__init__()
        random = tf.random.Generator.from_seed(0)
        self.users = tf.Variable(random.normal((num_users + 2, DIM), stddev=0.05))
        self.items = tf.Variable(random.normal((num_items + 2, DIM), stddev=0.05))
        self.query_layer = tf.keras.layers.Dense(DIM)
        self.item_layer = tf.keras.layers.Dense(DIM)
        self.task = tfrs.tasks.Retrieval(temperature=TEMPERATURE, remove_accidental_hits=True)

    def loss(self, users: Any, histories: Any, positives: Any, probabilities: Any) -> Any:
        """Of a batch: users `[B]`, histories `[B, L]`, positives `[B]`, how likely a place holds each `[B]`."""
        history = tf.reduce_mean(tf.gather(self.items, histories), axis=1)
        queries = self.query_layer(tf.concat([tf.gather(self.users, users), history], axis=1))
        items = self.item_layer(tf.gather(self.items, positives))
        return self.task(
            tf.math.l2_normalize(queries, axis=1),
            tf.math.l2_normalize(items, axis=1),
            candidate_sampling_probability=probabilities,
            candidate_ids=positives,
            compute_metrics=False,
        )


def burst(num_users: int, num_items: int, batch_size: int, num_steps: int) -> dict[str, float]:
    """As `benchmarks.training.steps.Steps.burst`, with items as popular as in its log."""
    model = TwoTowers(num_users, num_items)
    optimiser = tf.keras.optimizers.legacy.Adagrad(LEARNING_RATE)
    random = np.random.default_rng(0)

    def drawn(*shape: int) -> Any:
        return (num_items * random.random(shape) ** 3).astype(np.int64) + 2

    positives = drawn(num_steps + 2, batch_size)
    # Of the power law that items are drawn by: the density of its place, in items.
    probabilities = ((positives - 1.5) / num_items) ** (-2 / 3) / (3 * num_items)
    batches = [
        tuple(map(tf.constant, batch))
        for batch in zip(
            random.integers(num_users, size=(num_steps + 2, batch_size)) + 2,
            drawn(num_steps + 2, batch_size, LENGTH),
            positives,
            probabilities.astype(np.float32),
            strict=True,
        )
    ]

    @tf.function  # type: ignore[untyped-decorator]
    def take(users: Any, histories: Any, positives: Any, probabilities: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = model.loss(users, histories, positives, probabilities)
        variables = model.trainable_variables
        optimiser.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        return loss

    for batch in batches[:2]:
        take(*batch)
    started_s = time.perf_counter()
    for batch in batches[2:]:
        loss = take(*batch)
    assert np.isfinite(loss.numpy())
    return {"seconds": time.perf_counter() - started_s, "feeding_s": 0.0}


def main() -> None:
    """Answers until the input ends."""
    num_users, num_items, num_threads = map(int, sys.argv[1:])
    tf.config.threading.set_intra_op_parallelism_threads(num_threads)
    tf.config.threading.set_inter_op_parallelism_threads(num_threads)
    versions = f"tensorflow {tf.__version__}, tensorflow-recommenders {tfrs.__version__.lstrip('v')}"
    print(json.dumps({"version": versions}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(burst(num_users, num_items, asked["batch_size"], asked["num_steps"])), flush=True)


if __name__ == "__main__":
    main()
