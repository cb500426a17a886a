"""Which settings to train with, from the size and shape of the data: rules, each with its reason.

Deliberately does not know files, nor how anything is trained. docs/recipe.md says how the rules were found, and how to
go on from what they choose.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.data import TrainingData

Settings = Mapping[str, Any]
"""A training configuration, as its TOML file reads."""

HISTORY: Settings = {"name": "history", "owner": "query", "kind": "sequence", "items": "item_id"}
ITEM_ID: Settings = {"name": "item_id", "owner": "item", "kind": "categorical"}
_QUERY_TEXT: Settings = {"name": "text", "owner": "query", "kind": "text", "max_length": 128}
_DOCUMENT: Settings = {"name": "document", "owner": "item", "kind": "text", "max_length": 256}
ENCODER = "all-MiniLM-L6-v2"
_ENCODER_WIDTH = 384

MOST_ITEMS_AT_ONCE = 50_000
"""Up to so many, a step can afford to score every query against all items."""
_VERY_FEW_EXAMPLES = 10_000
_FEW_EXAMPLES = 100_000
_EXAMPLES_IN_ALL = 20_000_000
"""Of all epochs together."""
_STEPS_PER_EPOCH = 100
"""At least, where the smallest batch allows."""
_SHORT_HISTORY = 5
_MOST_TIES = 0.9
"""Share of interactions at the time of the one before, from which on times are said to be none: logs such as ratings,
entered several at a time, are ordered none the less."""
_SEEN_AGAIN = 0.01
"""Share of interactions with items that the user had before, from which on users are said to repeat them."""
_ONE_BY_ONE = {"mask_known_positives": True, "symmetric": False, "score_margin": None}
"""Settings that `history_share` needs as they are here."""


@dataclass(frozen=True)
class Shape:
    """What the rules know of the data."""

    num_users: int
    """With interactions to train on."""
    num_items: int
    num_examples: int
    """Interactions to train on."""
    typical_history: int
    """Interactions to train on of half of the users, at least."""
    long_history: int
    """Interactions that all but a twentieth of the users have at most, those that are held out included."""
    repeat_share: float
    """Of all interactions, those with an item that the user had before."""
    tie_share: float
    """Of all interactions but each user's first, those at the same time as the one before."""
    targets_per_query: float
    """Interactions that are held out for the test, of each user who has any."""
    num_validation: int
    """Held-out interactions that choose the best epoch."""

    @property
    def is_ordered(self) -> bool:
        """Whether what is asked for comes next, and not anywhere among what the user likes."""
        return self.tie_share < _MOST_TIES and self.targets_per_query < 1.5

    @property
    def has_repeats(self) -> bool:
        """Whether users come back to items."""
        return self.repeat_share >= _SEEN_AGAIN


@dataclass(frozen=True)
class Choice:
    """One setting that the configuration leaves out."""

    place: tuple[str, ...]
    """Table and key; `features`, name and key; or `features` alone for the declarations."""
    value: Any
    reason: str


def shape_of(data: TrainingData) -> Shape:
    """Counts."""
    log, split = data.log, data.split
    _, trained = np.unique(log.users[split.train], return_counts=True)
    _, all_counts = np.unique(log.users, return_counts=True)
    _, asked = np.unique(log.users[split.test], return_counts=True)
    pairs = np.unique(np.stack([log.users, log.items]), axis=1).shape[1]
    follows = log.users[1:] == log.users[:-1]
    ties = (log.timestamps_s[1:] == log.timestamps_s[:-1])[follows]
    return Shape(
        num_users=len(trained),
        num_items=len(data.items.ids),
        num_examples=len(split.train),
        typical_history=int(np.median(trained)),
        long_history=int(np.quantile(all_counts, 0.95, method="higher")),
        repeat_share=1 - pairs / len(log.users),
        tie_share=float(ties.mean()) if len(ties) else 1.0,
        targets_per_query=float(asked.mean()),
        num_validation=len(split.validation),
    )


def choose(shape: Shape, settings: Settings, has_encoder: bool) -> list[Choice]:
    """All that settings leave out and a rule knows of, in the order of the file.

    Args:
        shape: Of the data.
        settings: What the user chose; it stays, and the rest is chosen to go with it.
        has_encoder: Whether a pretrained text encoder is installed.

    Returns:
        The choices; keys that none is about keep their defaults.
    """
    chosen: list[Choice] = []
    if "features" not in settings:
        chosen.append(_declarations(shape, settings, has_encoder))
    for rules in (_of_features, _of_model, _of_training, _of_evaluation):
        known = completed(settings, chosen)
        chosen += [choice for choice in rules(shape, known) if not _is_given(known, choice.place)]
    return chosen


def completed(settings: Settings, choices: Sequence[Choice]) -> dict[str, Any]:
    """Settings with choices besides."""
    tables = {
        **settings,
        "features": [dict(feature) for feature in settings.get("features", [])],
        **{name: dict(settings.get(name, {})) for name in ("model", "training", "evaluation")},
    }
    for choice in choices:
        match choice.place:
            case ("features",):
                tables["features"] = [dict(feature) for feature in choice.value]
            case ("features", name, key):
                _named(tables["features"], name)[key] = choice.value
            case (table, key):
                tables[table][key] = choice.value
    return tables


def _declarations(shape: Shape, settings: Settings, has_encoder: bool) -> Choice:
    if settings["data"].get("layout") == "beir":
        encoder = {"encoder": ENCODER} if has_encoder else {}
        reason = "queries and documents are texts" + ("" if has_encoder else "; twotower[text] would bring an encoder")
        return Choice(("features",), [{**_QUERY_TEXT, **encoder}, {**_DOCUMENT, **encoder}], reason)
    reason = "what comes next depends on what came before" if shape.is_ordered else "users are all that they like"
    return Choice(("features",), [HISTORY, ITEM_ID], reason)


def _of_features(shape: Shape, settings: Settings) -> Iterator[Choice]:
    sequences = [feature for feature in settings["features"] if feature["kind"] == "sequence"]
    for feature in sequences:
        if shape.is_ordered and shape.typical_history >= _SHORT_HISTORY and len(sequences) == 1:
            pooling, reason = "transformer", "order matters: what comes next is asked for"
        elif shape.is_ordered:
            pooling, reason = "mean", "histories are short" if len(sequences) == 1 else "there is more than one history"
        else:
            pooling, reason = "mean", "order says nothing: equal times, or several targets for each user"
        yield Choice(("features", feature["name"], "pooling"), pooling, reason)
        most = 200 if shape.is_ordered else 1000
        length = max(1, min(most, shape.long_history))
        yield Choice(("features", feature["name"], "max_length"), length, f"holds 95 % of the histories, up to {most}")


def _of_model(shape: Shape, settings: Settings) -> Iterator[Choice]:
    model = settings["model"]
    if _reads_by_encoder(settings):
        yield Choice(("model", "dim"), _ENCODER_WIDTH, "the width of the encoder: training starts from its embeddings")
        return
    if shape.num_examples < _FEW_EXAMPLES:
        dim, reason = 32, f"few interactions ({shape.num_examples:,}) teach few dimensions"
    elif shape.num_examples < 100 * _FEW_EXAMPLES:
        dim, reason = 64, f"usual for {shape.num_examples:,} interactions"
    else:
        dim, reason = 128, f"many interactions ({shape.num_examples:,}) teach many dimensions"
    while dim <= max(model.get("matryoshka_dims", ()), default=0):
        dim, reason = 2 * dim, "more than matryoshka_dims"
    yield Choice(("model", "dim"), dim, reason)
    width = model.get("dim", dim)
    yield Choice(("model", "embedding_dim"), width, "as dim: towers start as the sum of their embeddings")
    width = model.get("embedding_dim", width)
    features = {feature["name"]: feature for feature in settings["features"]}
    transformers = [feature for feature in features.values() if feature.get("pooling") == "transformer"]
    if shape.num_examples < _VERY_FEW_EXAMPLES and not transformers:
        yield Choice(("model", "dropout"), 0.3, "so few interactions are soon known by heart")
    if any(features[feature["items"]].get("embedding_dim", width) % 2 for feature in transformers):
        yield Choice(("model", "transformer_heads"), 1, "the width of the history is odd")


def _of_training(shape: Shape, settings: Settings) -> Iterator[Choice]:
    given, sequences = settings["training"], [f for f in settings["features"] if f["kind"] == "sequence"]
    if _reads_by_encoder(settings):
        yield from _of_text_training(shape, given)
        return
    batch_size = _power_of_two(shape.num_examples / _STEPS_PER_EPOCH, 64, 4096)
    yield Choice(
        ("training", "batch_size"), batch_size, f"at least {_STEPS_PER_EPOCH} steps an epoch, in batches of 64 to 4,096"
    )
    batch_size = given.get("batch_size", batch_size)
    epochs = int(np.clip(_EXAMPLES_IN_ALL // shape.num_examples, 5, 50))
    yield Choice(("training", "epochs"), epochs, f"{_EXAMPLES_IN_ALL / 1e6:.0f} million examples, in 5 to 50 epochs")
    epochs = given.get("epochs", epochs)
    yield from _of_negatives(shape, given, batch_size)
    if sequences and sequences[0].get("pooling") == "transformer":
        rate, schedule, reason = 0.001, "cosine", "usual for transformers"
        yield Choice(("training", "table_learning_rate"), 0.003, "tables bear more than the transformer behind them")
        yield Choice(("training", "learn_temperature"), True, "wide at first, narrower as the transformer learns")
    else:
        rate, schedule, reason = 0.01, "linear", "tables without layers behind them learn fast"
        if not shape.is_ordered and sequences and _fits(given, _ONE_BY_ONE):
            yield Choice(("training", "history_share"), 0.5, "half of a user's items are to find all of them")
            given = {**given, "history_share": 0.5}
    if shape.is_ordered and not shape.has_repeats and given.get("history_share") is None:
        yield Choice(
            ("training", "mask_known_positives"), False, "items seen are not sought again, so they are negatives too"
        )
    yield Choice(("training", "learning_rate"), rate, reason)
    yield Choice(("training", "schedule"), schedule, "ends in small steps")
    num_steps = epochs * -(-shape.num_examples // batch_size)
    yield Choice(("training", "warmup_steps"), min(200, num_steps // 20), "a twentieth of all steps, up to 200")
    yield Choice(("training", "temperature"), 0.1, "best from 0.05 to 0.1 in what was tried")
    yield Choice(("training", "patience"), epochs, "the small steps at the end are the ones that help most")


def _of_text_training(shape: Shape, given: Settings) -> Iterator[Choice]:
    yield Choice(("training", "batch_size"), 64, "an encoder learns from few, and its memory is dear")
    yield Choice(("training", "chunk_size"), 16, "memory of so many texts at a time, the gradients of the batch")
    yield Choice(("training", "epochs"), 4, "an encoder is nearly there when training starts")
    yield Choice(("training", "learning_rate"), 0.0005, "of adapters")
    yield Choice(("training", "schedule"), "linear", "ends in small steps")
    num_steps = given.get("epochs", 4) * -(-shape.num_examples // given.get("batch_size", 64))
    yield Choice(("training", "warmup_steps"), min(200, num_steps // 20), "a twentieth of all steps, up to 200")
    yield Choice(("training", "temperature"), 0.05, "usual for sentence encoders")
    yield Choice(("training", "logq"), "none", "documents are asked for about as often as each other")
    yield Choice(("training", "patience"), 4, "all epochs")


def _of_negatives(shape: Shape, given: Settings, batch_size: int) -> Iterator[Choice]:
    are_drawn = given.get("logq") == "streaming" or any(
        given.get(name, 0) for name in ("uniform_negatives", "memory", "hard_negatives", "shown_negatives")
    )
    is_small = shape.num_items <= MOST_ITEMS_AT_ONCE
    if is_small and not are_drawn:
        yield Choice(
            ("training", "negatives"), "all", f"{shape.num_items:,} items: a step can afford the exact softmax"
        )
    else:
        reason = "drawn ones are asked for" if is_small else f"{shape.num_items:,} items are too many to score them all"
        yield Choice(("training", "negatives"), "batch", reason)
    if given.get("negatives", "batch" if not is_small or are_drawn else "all") == "batch":
        yield Choice(
            ("training", "uniform_negatives"), batch_size, "as many as the batch: rare items are negatives too"
        )
        yield Choice(("training", "logq"), "counts", "in a batch popular items come more often than others")


def _of_evaluation(shape: Shape, settings: Settings) -> Iterator[Choice]:
    given = settings["evaluation"]
    of_metric = [int(str(given["metric"]).rpartition("_")[2])] if "metric" in given else []
    yield Choice(("evaluation", "ks"), sorted({10, 50, *of_metric}), "a page, and what a ranker would reorder")
    metric = f"ndcg_at_{max(given.get('ks', [50]))}"
    yield Choice(("evaluation", "metric"), metric, "less noisy than recall at 10, where it chooses the best epoch")
    if shape.has_repeats:
        yield Choice(
            ("evaluation", "exclude_seen"), False, f"{shape.repeat_share:.0%} of the interactions are with items seen"
        )


def _reads_by_encoder(settings: Settings) -> bool:
    return any("encoder" in feature for feature in settings["features"] if feature["owner"] == "item")


def _fits(given: Settings, needed: Settings) -> bool:
    return all(given.get(name, value) == value for name, value in needed.items())


def _is_given(settings: Settings, place: tuple[str, ...]) -> bool:
    if place[0] == "features":
        return place[2] in _named(settings["features"], place[1])
    return place[1] in settings[place[0]]


def _named(features: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(feature for feature in features if feature["name"] == name)


def _power_of_two(value: float, least: int, most: int) -> int:
    """The largest that is not above a value, within bounds that are some themselves."""
    return int(2 ** int(np.log2(np.clip(value, least, most))))
