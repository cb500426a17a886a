"""Items as they were at a moment, and nothing of what came after it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from taken_steps import take_steps
from torch import Tensor

from towers.checkpoint import CheckpointStore
from towers.errors import InvalidInputError, InvalidSchemaError
from towers.schema import NumberFeature, parse_schema
from towers.store import Store
from trainer.as_of import Popularity
from trainer.comparison import TOWERS
from trainer.config import TrainerConfig, read_config
from trainer.data import read_data
from trainer.encode import DataEncoder, EncodedQueries
from trainer.fit import fit_schema
from trainer.judge import evaluate_version
from trainer.run import prepare, train
from trainer.step import take

Configure = Callable[..., TrainerConfig]
POPULARITY = {"name": "popularity", "owner": "item", "kind": "number", "source": "popularity", "scaling": "log1p"}
RECENT = {**POPULARITY, "name": "recent", "scaling": "quantile", "window_days": 0.1}
MIDDLE_S = 1_700_000_000 + 5 * 3600


@pytest.fixture
def timely(configure: Configure) -> Configure:
    """The toy configuration with two popularities, as of each interaction."""

    def changed(**changes: Any) -> TrainerConfig:
        config = configure(training__items_as_of="interaction", **changes)
        return config.model_copy(update={"features": (*config.features, POPULARITY, RECENT)})

    return changed


def test_popularity_against_a_naive_count() -> None:
    random = np.random.default_rng(2)
    items, moments_s = random.integers(0, 5, 80), random.integers(0, 12, 80) * 43_200.0
    popularity = Popularity.of(items, moments_s)
    asked, asked_s = random.integers(0, 7, 50), random.integers(-1, 14, 50) * 43_200.0
    for window_days, from_s in ((None, -np.inf), (2.0, 172_800.0)):
        expected = [
            sum(
                item == i and (moment - from_s if window_days else -np.inf) <= s < moment
                for i, s in zip(items, moments_s, strict=True)
            )
            for item, moment in zip(asked, asked_s, strict=True)
        ]
        assert popularity.before(asked, asked_s, window_days).tolist() == expected


def test_the_future_does_not_leak(world: Path, timely: Configure) -> None:
    """Other items after a moment change no input of the interactions before it, and do change those after it."""
    path, config = world / "interactions.parquet", timely(data__split_column="part")
    log = pq.read_table(path).to_pydict()
    places = [(moment - 1_700_000_000) // 3600 for moment in log["timestamp"]]
    log["part"] = ["test" if place == 9 else "validation" if place == 8 else "train" for place in places]
    pq.write_table(pa.table(log), path)
    fitted = None
    found: list[tuple[list[dict[str, Tensor]], Tensor]] = []
    for shift in (0, 7):
        # After the moment everybody takes to other items.
        moved = [
            (item + shift) % 40 if moment > MIDDLE_S else item
            for item, moment in zip(log["item_id"], log["timestamp"], strict=True)
        ]
        pq.write_table(pa.table({**log, "item_id": moved}), path)
        data = read_data(config.data, config.feature_schema(), world)
        fitted = fitted or fit_schema(config.feature_schema(), data, data.split)
        encoder = DataEncoder(fitted, data)
        as_of, rows = encoder.items_as_of(data.split.train), torch.from_numpy(data.log.items[data.split.train])
        queries = encoder.training_queries(data.split.train, None)
        assert isinstance(queries, EncodedQueries)
        moments_s = as_of.moments_s
        of_items = take(encoder.items(), rows) | as_of.features(rows, moments_s)
        # A negative: any other item as of the same moment.
        of_negatives = as_of.features((rows * 3 + 1) % 40, moments_s)
        found.append(([queries.batch(torch.arange(len(rows))), of_items, of_negatives], moments_s))
    (inputs, moments_s), (others, other_moments_s) = found
    assert torch.equal(moments_s, other_moments_s)
    before = moments_s <= MIDDLE_S
    assert 0 < before.sum() < len(before)
    for features, after_the_change in zip(inputs, others, strict=True):
        for name, values in features.items():
            assert torch.equal(values[before], after_the_change[name][before]), name
    for name in ("popularity", "recent"):
        assert not torch.equal(inputs[1][name], others[1][name])
    assert not torch.equal(inputs[0]["history"], others[0]["history"])


def test_ages_are_those_at_the_moment(world: Path, timely: Configure) -> None:
    prepared = prepare(timely(), world)
    as_of, items = prepared.examples.as_of, prepared.items
    assert as_of is not None
    reference_s = float(prepared.log.timestamps_s[prepared.split.train].max())
    rows = torch.arange(40)
    at_end = as_of.features(rows, torch.full((40,), reference_s, dtype=torch.float64))
    assert torch.equal(at_end["added"], items["added"])
    for days in (1.0, 500.0, 5000.0):
        found = as_of.features(rows, torch.full((40,), reference_s - days * 86_400, dtype=torch.float64))["added"]
        ages = (reference_s - 1_600_000_000) / 86_400 - np.arange(40) - days
        np.testing.assert_allclose(found[:, 0], np.copysign(np.log1p(np.abs(ages)), ages) / 10, atol=1e-6)
        assert torch.equal(found[:, 1:], items["added"][:, 1:])


def test_a_popularity_is_as_trained_at_its_moments_and_whole_at_the_end(world: Path, timely: Configure) -> None:
    prepared = prepare(timely(), world)
    counts = prepared.item_counts.numpy()
    assert [row["popularity"] for row in prepared.encoder.raw_items(range(40))] == counts.tolist()
    [feature] = [feature for feature in prepared.fitted.schema.features if feature.name == "popularity"]
    assert isinstance(feature, NumberFeature)
    log, train = prepared.log, prepared.split.train
    seen = [
        np.log1p(sum(log.items[p] == log.items[q] and log.timestamps_s[q] < log.timestamps_s[p] for q in train))
        for p in train
    ]
    assert feature.mean == pytest.approx(np.mean(seen))
    assert feature.std == pytest.approx(np.std(seen))


def test_a_step_looks_at_items_as_of_its_interactions(world: Path, timely: Configure) -> None:
    """Ages and counts at the end would give another loss; chunks do not."""
    changes: dict[str, Any] = {
        "model__dropout": 0.0,
        "training__uniform_negatives": 70,
        "training__hard_negatives": 2,
        "training__hard_negatives_ranks": [1, 7],
    }
    figures, gradients = take_steps(timely(**changes), world)
    in_chunks, same = take_steps(timely(**changes, training__chunk_size=7), world)
    assert in_chunks.loss == pytest.approx(figures.loss, rel=1e-5)
    for name, gradient in same.items():
        torch.testing.assert_close(gradient, gradients[name], atol=1e-6, rtol=1e-4)
    at_end = timely(**changes)
    at_end = at_end.model_copy(update={"training": at_end.training.model_copy(update={"items_as_of": "end"})})
    assert abs(take_steps(at_end, world)[0].loss - figures.loss) > 1e-3


def test_a_published_popularity_is_evaluated_on_what_the_log_counts(world: Path, tmp_path: Path) -> None:
    feature = "\n".join(f'{key} = "{value}"' for key, value in POPULARITY.items())
    content = (world / "toy.toml").read_text().replace("[model]", f"[[features]]\n{feature}\n\n[model]")
    content = content.replace("epochs = 4", 'epochs = 1\nitems_as_of = "interaction"')
    (world / "toy.toml").write_text(content)
    store = str(tmp_path / "store")
    report = train(world / "toy.toml", store=store, resume=False, console=Console(quiet=True))
    assert report is not None
    evaluation = evaluate_version(CheckpointStore(Store(store)), report.version, world)
    figures = evaluation.comparison.figures[TOWERS]
    assert figures["recall_at_10"].value == pytest.approx(report.metrics["test.recall_at_10"], abs=1e-6)


# Mistakes.


@pytest.mark.parametrize(
    ("training", "expected"),
    [
        ("", "items_as_of: feature 'popularity' counted at the end"),
        ('items_as_of = "interaction"\nnegatives = "all"', 'negatives = "all" has no moment'),
        ('items_as_of = "interaction"\nhistory_share = 0.5', "history_share has no moment"),
    ],
)
def test_settings_that_know_no_moment_are_refused(world: Path, training: str, expected: str) -> None:
    feature = "\n".join(f'{key} = "{value}"' for key, value in POPULARITY.items())
    content = (world / "toy.toml").read_text().replace("[model]", f"[[features]]\n{feature}\n\n[model]")
    (world / "toy.toml").write_text(content.replace("[training]", f"[training]\n{training}"))
    with pytest.raises(InvalidInputError) as caught:
        read_config(world / "toy.toml")
    [line] = str(caught.value).splitlines()
    assert expected in line


def test_nothing_that_changes_is_refused(world: Path) -> None:
    content = (world / "toy.toml").read_text().replace('kind = "timestamp"', 'kind = "number"')
    (world / "toy.toml").write_text(content.replace("[training]", '[training]\nitems_as_of = "interaction"'))
    with pytest.raises(InvalidInputError, match="no item feature is a timestamp or a popularity"):
        read_config(world / "toy.toml")


def test_popularity_needs_a_column_of_its_own(world: Path, timely: Configure) -> None:
    config = timely()
    config = config.model_copy(update={"features": (*config.features, {**POPULARITY, "name": "p", "column": "price"})})
    with pytest.raises(InvalidInputError, match="feature 'p': its column 'price' is another feature's"):
        prepare(config, world)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"kind": "categorical", "scaling": None}, "source 'popularity' counts"),
        ({"source": "items", "window_days": 3}, "window_days: nothing reads it"),
        ({"owner": "query"}, "source 'popularity' cannot feed the query tower"),
        ({"window_days": 0}, "'popularity', window_days"),
    ],
)
def test_mistakes_in_declarations(change: dict[str, Any], expected: str) -> None:
    declaration = {key: value for key, value in {**POPULARITY, **change}.items() if value is not None}
    user = {"name": "user_id", "owner": "query", "kind": "categorical"}
    item = {"name": "item_id", "owner": "item", "kind": "categorical"}
    with pytest.raises(InvalidSchemaError, match=expected):
        parse_schema([user, item, declaration])
