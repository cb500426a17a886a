from pathlib import Path

import numpy as np
import pytest
import torch

from towers.schema import NumberFeature, parse_schema
from trainer import data
from trainer.config import read_config
from trainer.data import Entities, Split, TrainingData
from trainer.encode import DataEncoder
from trainer.fit import FittedSchema, fit_schema, learn_statistics, learn_vocabulary


def small_world() -> tuple[TrainingData, Split]:
    """Two users, four items; item "d" is in no training interaction, user "v" sees "c" last."""
    columns = {
        "item_id": ["a", "b", "c", "d"],
        "tags": [["x", "y"], ["y"], [], ["z"]],
        "price": [1.0, 3.0, None, 1000.0],
        "added": [10.0, 20.0, 30.0, 40.0],
    }
    log = data.order_by_time(
        np.array([0, 0, 0, 0, 1, 1, 1]),
        np.array([0, 0, 1, 3, 0, 1, 2]),
        np.array([1.0, 2.0, 3.0, 9.0, 4.0, 5.0, 6.0]),
    )
    world = TrainingData(
        users=Entities(["u", "v"], {"user_id": ["u", "v"]}, "users.parquet"),
        items=Entities(columns["item_id"], columns, "items.parquet"),  # type: ignore[arg-type]
        log=log,
        split=data.split_by_time(log),
        notes=(),
    )
    return world, world.split


def fitted(features: list[dict[str, object]]) -> FittedSchema:
    world, split = small_world()
    user = {"name": "user_id", "owner": "query", "kind": "categorical"}
    return fit_schema(parse_schema([user, *features]), world, split)


def test_only_training_interactions_are_looked_at() -> None:
    """Training holds a twice for u and once for v: b, c and d are held out."""
    learned = fitted(
        [
            {"name": "item_id", "owner": "item", "kind": "categorical"},
            {"name": "tags", "owner": "item", "kind": "categorical_list"},
            {"name": "price", "owner": "item", "kind": "number"},
            {"name": "added", "owner": "item", "kind": "timestamp"},
        ]
    )
    assert learned.vocabularies == {"user_id": ["u", "v"], "item_id": ["a"], "tags": ["x", "y"]}
    price = learned.schema.features[3]
    assert isinstance(price, NumberFeature)
    assert (price.mean, price.std) == (1.0, 1.0)
    assert learned.schema.features[4].reference_time_s == 4.0  # type: ignore[union-attr]


def test_vocabulary_is_ordered_by_count_then_letters_and_leaves_out_the_rare() -> None:
    values = ["b", "a", "c", 7, None, ""]
    counts = np.array([2, 2, 5, 1, 9, 9])
    assert learn_vocabulary(values, counts, 1) == ["c", "a", "b", "7"]
    assert learn_vocabulary(values, counts, 2) == ["c", "a", "b"]
    assert learn_vocabulary(values, counts * 0, 1) == []
    lists = [["x", "x", "y"], ["y"], None]
    assert learn_vocabulary(lists, np.array([1, 1, 1]), 1) == ["y", "x"]


def test_statistics_weigh_each_value_by_its_interactions() -> None:
    feature = NumberFeature(name="price", owner="item")
    learned = learn_statistics(feature, [1.0, 4.0, None, 99.0], np.array([2, 1, 5, 0]))
    assert learned.mean == pytest.approx(2.0)
    assert learned.std == pytest.approx(np.std([1, 1, 4]))
    log = learn_statistics(feature.model_copy(update={"scaling": "log1p"}), [0.0, -np.expm1(2.0)], np.array([1, 1]))
    assert (log.mean, log.std) == (pytest.approx(-1.0), pytest.approx(1.0))


def test_statistics_of_constant_and_absent_values() -> None:
    feature = NumberFeature(name="price", owner="item")
    assert learn_statistics(feature, [5.0, 5.0], np.array([1, 1])).std == 1.0
    assert learn_statistics(feature, [None, None], np.array([1, 1])) == feature


def test_quantile_buckets_hold_equal_shares() -> None:
    feature = NumberFeature(name="price", owner="item", scaling="quantile", num_buckets=4)
    learned = learn_statistics(feature, [float(value) for value in range(101)], np.ones(101, dtype=int))
    assert learned.boundaries == (25.0, 50.0, 75.0)
    repeated = learn_statistics(feature, [1.0, 2.0], np.array([99, 1]))
    assert repeated.boundaries == (1.0,)


def test_the_same_data_gives_the_same_schema(world: Path) -> None:
    config = read_config(world / "toy.toml")
    tables = data.read_data(config.data, config.feature_schema(), world)
    split = tables.split
    first, second = (fit_schema(config.feature_schema(), tables, split) for _ in range(2))
    assert first == second
    assert first.schema.fingerprint == second.schema.fingerprint


def test_training_tensors_are_what_the_encoder_gives_for_raw_features(world: Path) -> None:
    """Including histories, which are stretches of the log: user by user, position by position, alone and together."""
    config = read_config(world / "toy.toml")
    tables = data.read_data(config.data, config.feature_schema(), world)
    split = tables.split
    learned = fit_schema(config.feature_schema(), tables, split)
    # Some items are rare and so unknown; a history must skip them and reach further back.
    assert 0 < len(learned.vocabularies["item_id"]) < len(tables.items.ids)
    encoder = DataEncoder(learned, tables)
    for positions in (split.train, split.test):
        queries = encoder.queries(positions)
        rows, raws = list(range(0, len(positions), 7)), []
        for row in rows:
            position, user = positions[row], tables.log.users[positions[row]]
            raw = {
                feature.name: tables.users.columns[feature.column][user]
                for feature in encoder.query.features
                if feature.name != "history"
            }
            past = tables.log.items[tables.log.starts[position] : position]
            raw["history"] = [tables.items.ids[item] for item in past]  # type: ignore[assignment]
            raws.append(raw)
            expected = encoder.query.encode_rows([raw])
            for name, found in queries.batch(torch.tensor([row])).items():
                array = expected[name]
                assert np.array_equal(found[:, : array.shape[1]] if array.ndim > 1 else found, array), name
                # What follows is padding, as long as the longest list of the others.
                assert array.ndim == 1 or not found[:, array.shape[1] :].any()
        together = encoder.query.encode_rows(raws)
        found = queries.batch(torch.tensor(rows))["history"]
        assert found.dtype == torch.int64
        assert np.array_equal(found, together["history"])
        assert queries.batch(torch.tensor([], dtype=torch.int64))["history"].shape == (0, 1)
    items = encoder.items()
    raw_items = encoder.raw_items(range(len(tables.items.ids)))
    for name, array in encoder.item.encode_rows(raw_items).items():
        assert np.array_equal(items[name].numpy(), array), name
