"""The rule of two towers, before training and at export."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from towers.checkpoint import CheckpointStore
from towers.errors import CrossTowerFeatureError, InvalidInputError
from towers.features import RawValue
from towers.schema import NumberFeature
from towers.store import Store
from trainer import export, run
from trainer.config import TrainerConfig, read_config
from trainer.encode import DataEncoder
from trainer.model import TwoTowers
from trainer.separation import differing_rows

Configure = Callable[..., TrainerConfig]


def rewritten(world: Path, table: str, **columns: Any) -> None:
    """Adds columns to a table, or replaces them."""
    path = world / f"{table}.parquet"
    content = pq.read_table(path)
    for name, values in columns.items():
        at = content.schema.get_field_index(name)
        array = values if isinstance(values, pa.ChunkedArray) else pa.array(values)
        content = content.append_column(name, array) if at < 0 else content.set_column(at, name, array)
    pq.write_table(content, path)


def interactions(world: Path) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = pq.read_table(world / "interactions.parquet").to_pydict()
    return columns


# Two rows that differ.


def test_differing_rows_against_a_naive_search() -> None:
    random = np.random.default_rng(1)
    for _ in range(200):
        owners, moments, others, values = random.integers(0, 3, (4, 12))
        values = values - 1  # Some are missing.
        expected = {
            pair
            for pair in itertools.permutations(range(12), 2)
            if all(
                (
                    owners[pair[0]] == owners[pair[1]],
                    moments[pair[0]] == moments[pair[1]],
                    others[pair[0]] != others[pair[1]],
                    values[pair[0]] != values[pair[1]],
                    values[pair[0]] >= 0,
                    values[pair[1]] >= 0,
                )
            )
        }
        found = differing_rows(owners, moments, others, values)
        assert found in expected if expected else found is None


# Before training.


@pytest.mark.parametrize("as_csv", [False, True])
def test_an_item_column_that_differs_between_users_is_refused(world: Path, configure: Configure, as_csv: bool) -> None:
    log = interactions(world)
    log["timestamp"] = [1_700_000_000 + 3600 * (row % 10) for row in range(len(log["user_id"]))]
    price = [100.0 * user + item for user, item in zip(log["user_id"], log["item_id"], strict=True)]
    table = pa.table({**log, "price": price})
    config = configure()
    if as_csv:
        pacsv.write_csv(table, world / "interactions.csv")
        config = configure(data__interactions="interactions.csv")
    else:
        pq.write_table(table, world / "interactions.parquet")
    with pytest.raises(CrossTowerFeatureError) as caught:
        run.prepare(config, world)
    [line] = str(caught.value).splitlines()
    for part in ("interactions", "'price'", "differs between users", "item '", "with user '", "at 17000", "reranker"):
        assert part in line


def test_a_user_column_that_differs_between_items_is_refused(world: Path, configure: Configure) -> None:
    log = interactions(world)
    moments = [1_700_000_000 + row // 2 for row in range(len(log["user_id"]))]
    rewritten(world, "interactions", timestamp=moments, age=log["item_id"])
    with pytest.raises(CrossTowerFeatureError, match=r"'age'.*differs between items: user '.*with item '"):
        run.prepare(configure(), world)


def test_what_changes_with_time_alone_is_allowed(world: Path, configure: Configure) -> None:
    """Prices of a moment are the same for all users, and ages of a moment for all items."""
    log = interactions(world)
    moments = [1_700_000_000 + row // 3 for row in range(len(log["user_id"]))]
    price = [item + moment % 7 for item, moment in zip(log["item_id"], moments, strict=True)]
    age = [user + moment % 5 for user, moment in zip(log["user_id"], moments, strict=True)]
    rewritten(world, "interactions", timestamp=moments, price=price, age=age)
    assert run.prepare(configure(), world).num_users == 60


def test_a_table_of_pairs_is_no_table_of_items(world: Path, configure: Configure) -> None:
    items = pq.read_table(world / "items.parquet")
    of_users = [items.append_column("user_id", pa.array([user] * len(items))) for user in (1, 2)]
    pq.write_table(pa.concat_tables(of_users), world / "items.parquet")
    assert run.prepare(configure(), world).notes[0].endswith("the last of each was kept")
    at = items.schema.get_field_index("tags")
    of_users[1] = of_users[1].set_column(at, "tags", pa.array([["for two"]] * len(items)))
    pq.write_table(pa.concat_tables(of_users), world / "items.parquet")
    with pytest.raises(
        CrossTowerFeatureError,
        match=r"items\.parquet.*'tags'.*item '0' has \['calm.*with user '1' and \['for two'\] with user '2'",
    ):
        run.prepare(configure(), world)
    # Where the rows are of other moments, the item changed.
    moved = [table.append_column("timestamp", pa.array([i] * len(items))) for i, table in enumerate(of_users)]
    pq.write_table(pa.concat_tables(moved), world / "items.parquet")
    assert run.prepare(configure(), world).num_users == 60


# What the reranker is left.


def test_features_of_the_reranker_are_in_no_tower_and_in_the_manifest(world: Path, tmp_path: Path) -> None:
    content = (world / "toy.toml").read_text().replace("epochs = 4", "epochs = 1")
    extra = '[[features]]\nname = "price_gap"\nowner = "reranker"\nkind = "number"\nsource = "interactions"\n\n[model]'
    (world / "toy.toml").write_text(content.replace("[model]", extra))
    config = read_config(world / "toy.toml")
    assert config.reranker_features() == ("price_gap",)
    assert "price_gap" not in {feature.name for feature in config.feature_schema().features}
    report = run.train(world / "toy.toml", store=str(tmp_path / "store"), resume=False, console=Console(quiet=True))
    assert report is not None
    manifest = CheckpointStore(Store(str(tmp_path / "store"))).manifest(report.version)
    assert manifest.reranker_features == ("price_gap",)


@pytest.mark.parametrize(
    ("declaration", "expected"),
    [
        ('name = "gap"\nhash_buckets = 5', "feature 'gap', hash_buckets"),
        ('name = "gap"\nsource = "history"', "feature 'gap', source"),
        ('kind = "number"', "feature None, name"),
        ('name = "title"', "feature 'title': its name is repeated"),
    ],
)
def test_mistakes_in_features_of_the_reranker(world: Path, declaration: str, expected: str) -> None:
    content = (world / "toy.toml").read_text()
    extra = f'[[features]]\nowner = "reranker"\n{declaration}\n\n[model]'
    (world / "toy.toml").write_text(content.replace("[model]", extra))
    with pytest.raises(InvalidInputError) as caught:
        read_config(world / "toy.toml")
    [line] = str(caught.value).splitlines()
    assert expected in line


# At export.


@dataclasses.dataclass(frozen=True)
class _Exporting:
    prepared: run.Prepared
    model: TwoTowers
    positions: Any


@pytest.fixture
def exporting(world: Path, configure: Configure) -> _Exporting:
    prepared = run.prepare(configure(), world)
    model = TwoTowers(prepared.fitted.schema, prepared.encoder.query, prepared.encoder.item, configure().model)
    return _Exporting(prepared, model, prepared.test.questions.positions)


def exported(exporting: _Exporting, encoder: DataEncoder) -> export.ExportedTowers:
    prepared = exporting.prepared
    return export.export_towers(
        exporting.model,
        prepared.fitted,
        {"query": prepared.encoder.query, "item": prepared.encoder.item},
        {
            "query": prepared.encoder.raw_queries(exporting.positions.tolist()),
            "item": prepared.encoder.raw_items([0, 1]),
        },
        pairs=run.paired(encoder, prepared.log, exporting.positions),
    )


def test_pairs_change_nothing(exporting: _Exporting) -> None:
    encoder, log = exporting.prepared.encoder, exporting.prepared.log
    pairs = run.paired(encoder, log, exporting.positions)
    assert pairs["query"].rows == encoder.raw_queries(exporting.positions.tolist())
    assert pairs["item"].rows == encoder.raw_items(log.items[exporting.positions].tolist())
    towers = exported(exporting, encoder)
    assert towers.onnx.keys() == {"query", "item"}
    assert towers.validation_queries is None


class _SeesTheTarget(DataEncoder):
    """A mistake of one place: the history holds the very item that is asked for."""

    def raw_queries(self, positions: Any) -> list[dict[str, RawValue]]:
        targets = self.raw_items(self._data.log.items[positions].tolist())
        rows = zip(super().raw_queries(positions), targets, strict=True)
        return [{**row, "history": [*row["history"], target["item_id"]]} for row, target in rows]


class _SeesTheUser(DataEncoder):
    """Prices for the user that asks."""

    def raw_pairs(self, positions: Any) -> Any:
        pairs = super().raw_pairs(positions)
        users = self._data.log.users[positions].tolist()
        priced = [{**row, "price": float(user)} for row, user in zip(pairs["item"], users, strict=True)]
        return {**pairs, "item": priced}


@pytest.mark.parametrize(
    ("leaking", "expected"),
    [
        (_SeesTheTarget, "the query tower is not apart.*'history'"),
        (_SeesTheUser, "the item tower is not apart.*'price'"),
    ],
)
def test_a_leak_through_the_data_is_caught(exporting: _Exporting, leaking: type[DataEncoder], expected: str) -> None:
    encoder = exporting.prepared.encoder
    leak = leaking.__new__(leaking)
    leak.__dict__.update(encoder.__dict__)
    with pytest.raises(CrossTowerFeatureError, match=expected):
        exported(exporting, leak)


def test_a_tower_that_reads_the_other_side_is_caught(exporting: _Exporting) -> None:
    network = exporting.model.query
    network.features = (*network.features, NumberFeature(name="price", owner="item"))
    with pytest.raises(CrossTowerFeatureError, match=r"the query tower reads \['price'\]"):
        exported(exporting, exporting.prepared.encoder)
