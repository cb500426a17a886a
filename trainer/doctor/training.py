"""How the training went: its curves, its temperature.

Deliberately does not know data or towers: the manifest holds all of it.
"""

import itertools
import math

from towers.checkpoint import Manifest
from trainer.config import TrainerConfig
from trainer.doctor.report import Finding, Lines, Section, Series
from trainer.doctor.subject import best_epoch, temperature_of

MIN_LOSS_FALL = 0.02
"""Share of the first epoch's loss: towers that learn lose many times as much, a loss that stands still only wavers."""
MIN_GAIN_OF_LAST_EPOCH = 0.02
"""Share of the metric: a last epoch that gains more is followed by another that would have gained too."""
MIN_EPOCHS_TO_JUDGE = 3
"""From fewer no turn of a curve can be read."""
MIN_BEST_PROBABILITY = 0.1
"""Cosines end at 1 and -1, so a temperature bounds the probability that even perfect towers could give a positive among
its negatives. Usual temperatures (0.05 to 0.2) leave more than 0.9 among thousands; below a tenth the loss pulls with
nearly all its force whatever the towers do, and what it pulls at is no ranking."""


def training_section(manifest: Manifest, config: TrainerConfig) -> Section:
    """Curves of loss and validation metric, and whether the temperature allows an answer."""
    epochs, metric = manifest.epochs, config.evaluation.metric
    figures = {
        "temperature": temperature_of(manifest, config),
        "best_probability": best_probability(config, temperature_of(manifest, config)),
    }
    charts = []
    numbers = list(range(1, len(epochs) + 1))
    if epochs:
        figures |= {"epochs": len(epochs), "best_epoch": best_epoch(manifest), "last_loss": epochs[-1].loss}
        charts.append(Lines("Loss", "epoch", "mean loss", [Series("training", numbers, [e.loss for e in epochs])]))
        judged = [(number, e.metric) for number, e in zip(numbers, epochs, strict=True) if e.metric is not None]
        if judged:
            of_epoch = Series("validation", [number for number, _ in judged], [value for _, value in judged])
            charts.append(Lines("Validation metric", "epoch", metric, [of_epoch]))
        if len({e.temperature for e in epochs}) > 1:
            learned = Series("learned", numbers, [e.temperature for e in epochs])
            charts.append(Lines("Temperature", "epoch", "temperature", [learned], is_log=True))
    return Section(
        "Training",
        "The loss should fall steeply, then flatten; the validation metric should rise, flatten, and not fall for "
        "long. Both have scales of their own: a loss depends on how many negatives it has. The temperature divides the "
        "cosines before the softmax: best_probability is the most that perfect towers could give a positive with it.",
        [*_curve_findings(manifest, config), *_temperature_findings(figures, config)],
        figures,
        charts,
    )


def best_probability(config: TrainerConfig, temperature: float) -> float:
    """Of a positive at cosine 1 whose negatives are all at -1, with as many as a batch gives.

    Where all items are negatives there are more, and it is less.
    """
    options = config.training
    num_negatives = options.batch_size - 1 + options.uniform_negatives + options.memory
    num_negatives += options.hard_negatives + options.shown_negatives
    return 1 / (1 + num_negatives * math.exp(-2 / temperature))


def _curve_findings(manifest: Manifest, config: TrainerConfig) -> list[Finding]:
    epochs, metric = manifest.epochs, config.evaluation.metric
    if not epochs:
        return [
            Finding(
                "no-curves",
                "note",
                "The manifest holds no figures of single epochs, so there are no curves.",
                "Train with this release: it keeps them.",
            )
        ]
    findings = []
    first, last = epochs[0].loss, epochs[-1].loss
    if len(epochs) >= MIN_EPOCHS_TO_JUDGE and last > (1 - MIN_LOSS_FALL) * first:
        findings.append(
            Finding(
                "flat-loss",
                "warning",
                f"The loss hardly fell: {first:.4f} after the first epoch, {last:.4f} after the last of {len(epochs)}.",
                "Raise [training] learning_rate; where the temperature is found too high, lower that first.",
            )
        )
    best = best_epoch(manifest)
    if len(epochs) >= MIN_EPOCHS_TO_JUDGE and best == 1 and epochs[0].metric is not None:
        findings.append(
            Finding(
                "best-at-first",
                "warning",
                f"{metric} was best after the first of {len(epochs)} epochs and fell from then on.",
                "Lower [training] learning_rate, or raise weight_decay or [model] dropout.",
            )
        )
    metrics = [figures.metric for figures in epochs if figures.metric is not None]
    gain = next((new / old - 1 for old, new in itertools.pairwise(metrics[-2:]) if old > 0), 0.0)
    if best == len(epochs) == config.training.epochs and gain > MIN_GAIN_OF_LAST_EPOCH:
        findings.append(
            Finding(
                "still-learning",
                "note",
                f"{metric} still rose by {gain:.1%} in the last epoch.",
                "Raise [training] epochs; patience ends the training when it no longer helps.",
            )
        )
    return findings


def _temperature_findings(figures: dict[str, float], config: TrainerConfig) -> list[Finding]:
    if figures["best_probability"] >= MIN_BEST_PROBABILITY:
        return []
    remedy = "Set [training] temperature to 0.1 or so"
    return [
        Finding(
            "temperature-too-high",
            "critical",
            f"At temperature {figures['temperature']:g} even perfect towers could give a positive a probability of no "
            f"more than {figures['best_probability']:.2g} among its negatives.",
            f"{remedy}, with learn_temperature = false." if config.training.learn_temperature else f"{remedy}.",
        )
    ]
