from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from towers.errors import InvalidInputError
from towers.schema import parse_schema
from trainer import data, files
from trainer.config import DataConfig
from trainer.data import TrainingData

USER = {"name": "user_id", "owner": "query", "kind": "categorical"}
ITEM = {"name": "item_id", "owner": "item", "kind": "categorical"}
FILES = {"interactions": "interactions.parquet", "items": "items.parquet", "users": "users.parquet"}

Read = Callable[..., TrainingData]


@pytest.fixture
def read(world: Path) -> Read:
    """Reads the toy world with changed tables, settings and features."""

    def reading(features: Sequence[dict[str, Any]] = (), **changes: Any) -> TrainingData:
        settings = {**FILES, **{name: value for name, value in changes.items() if not isinstance(value, pa.Table)}}
        for name, table in changes.items():
            if isinstance(table, pa.Table):
                pq.write_table(table, world / f"{name}.parquet")
        return data.read_data(DataConfig(**settings), parse_schema([USER, ITEM, *features]), world)

    return reading


def interactions(rows: Sequence[tuple[Any, Any, Any]]) -> pa.Table:
    users, items, timestamps = zip(*rows, strict=True)
    return pa.table({"user_id": users, "item_id": items, "timestamp": timestamps})


def changed(world: Path, table: str, column: str, values: Any) -> pa.Table:
    content = pq.read_table(world / f"{table}.parquet")
    return content.set_column(content.schema.get_field_index(column), column, values)


# Order and split.


def test_each_users_last_is_test_and_the_one_before_validation(read: Read) -> None:
    table = interactions([(1, 10, 5), (2, 11, 1), (1, 12, 3), (1, 13, 9), (2, 10, 2), (1, 11, 4), (2, 12, 0)])
    read_world = read(
        interactions=table, users=pa.table({"user_id": [1, 2]}), items=pa.table({"item_id": [10, 11, 12, 13]})
    )
    log, split = read_world.log, read_world.split

    def ids(positions: Any) -> list[tuple[str, str]]:
        return [(read_world.users.ids[log.users[p]], read_world.items.ids[log.items[p]]) for p in positions]

    assert ids(split.train) == [("1", "12"), ("1", "11"), ("2", "12")]
    assert ids(split.validation) == [("1", "10"), ("2", "11")]
    assert ids(split.test) == [("1", "13"), ("2", "10")]
    for user, position in enumerate(split.test):
        history = log.items[log.starts[position] : position]
        assert [read_world.items.ids[item] for item in history] == [["12", "11", "10"], ["12", "11"]][user]
    first, last = data.data_window(log, split.train)
    assert (first, last) == (datetime.fromtimestamp(0, UTC), datetime.fromtimestamp(4, UTC))


def test_interactions_of_one_moment_stay_in_the_order_of_the_file() -> None:
    log = data.order_by_time(np.array([0, 0, 0, 0]), np.array([3, 1, 2, 0]), np.array([1.0, 1.0, 1.0, 0.0]))
    assert log.items.tolist() == [0, 3, 1, 2]


def test_users_with_fewer_than_three_interactions_are_train_only() -> None:
    log = data.order_by_time(np.array([0, 0, 1, 1, 1, 2]), np.arange(6), np.arange(6.0))
    split = data.split_by_time(log)
    assert split.train.tolist() == [0, 1, 2, 5]
    assert split.validation.tolist() == [3]
    assert split.test.tolist() == [4]


def test_split_equals_a_naive_loop() -> None:
    random = np.random.default_rng(3)
    users, moments = random.integers(0, 30, 200), random.integers(0, 20, 200).astype(float)
    log = data.order_by_time(users, np.arange(200), moments)
    split = data.split_by_time(log)
    train, validation, test = [], [], []
    for user in range(30):
        own = sorted((row for row in range(200) if users[row] == user), key=lambda row: (moments[row], row))
        if len(own) >= 3:
            test.append(own[-1])
            validation.append(own[-2])
            own = own[:-2]
        train += own
    assert log.items[split.train].tolist() == train
    assert log.items[split.validation].tolist() == validation
    assert log.items[split.test].tolist() == test


def test_a_given_split_comes_in_the_order_of_its_parts(read: Read) -> None:
    rows = [
        (1, 10, 9, "train"),
        (1, 11, 1, "test"),
        (1, 12, 2, "validation"),
        (1, 13, 5, "train"),
        (1, 10, 3, "history"),
        (2, 12, 1, "test"),
        (2, 11, 2, "train"),
        (3, 13, 1, "history"),
    ]
    table = interactions([row[:3] for row in rows]).append_column("split", [[row[3] for row in rows]])
    read_world = read(interactions=table, items=pa.table({"item_id": [10, 11, 12, 13]}), split_column="split")
    log, split = read_world.log, read_world.split

    def ids(positions: Any) -> list[str]:
        return [read_world.items.ids[log.items[position]] for position in positions]

    assert ids(split.train) == ["13", "10", "11"]
    assert ids(split.validation) == ["12"]
    assert ids(split.test) == ["11", "12"]
    histories = [ids(range(log.starts[position], position)) for position in (*split.validation, *split.test)]
    assert histories == [["13", "10", "10"], ["13", "10", "10", "12"], ["11"]]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train", "test", "Train"], r"1 of 3 rows hold another value such as 'Train'; each must say one of \['train'"),
        (["train", "test", None], r"1 of 3 rows hold another value such as None"),
        (["history", "train", "validation"], r"\[data\] split_column\): no row says 'test'"),
        (["test", "validation", "test"], r"\[data\] split_column\): no row says 'train'"),
    ],
)
def test_a_given_split_that_is_none_is_refused(read: Read, names: list[str], message: str) -> None:
    table = interactions([(1, 10, 1), (1, 11, 2), (2, 10, 3)]).append_column("split", [names])
    with pytest.raises(InvalidInputError, match=message):
        read(interactions=table, items=pa.table({"item_id": [10, 11]}), split_column="split")


# What is read.


def test_parquet_and_csv_give_the_same(read: Read, world: Path) -> None:
    features = [
        {"name": "age", "owner": "query", "kind": "number"},
        {"name": "segment", "owner": "query", "kind": "categorical"},
        {"name": "price", "owner": "item", "kind": "number"},
        {"name": "added", "owner": "item", "kind": "timestamp"},
        {"name": "title", "owner": "item", "kind": "text"},
    ]
    parquet = read(features)
    for name in FILES:
        table = pq.read_table(world / FILES[name])
        flat = [column for column in table.column_names if not pa.types.is_nested(table.schema.field(column).type)]
        pacsv.write_csv(
            table.select(flat).rename_columns([column.upper() for column in flat]),
            world / f"{name}.csv",
            pacsv.WriteOptions(delimiter=";", quoting_style="needed"),
        )
    upper = [{**feature, "column": feature["name"].upper()} for feature in features]
    text = read(
        upper,
        **{name: f"{name}.csv" for name in FILES},
        csv_separator=";",
        user_id_column="USER_ID",
        item_id_column="ITEM_ID",
        timestamp_column="TIMESTAMP",
    )
    assert text.users.ids == parquet.users.ids
    assert text.items.ids == parquet.items.ids
    assert text.items.columns["item_id"] == parquet.items.ids
    assert text.log.items.tolist() == parquet.log.items.tolist()
    assert text.log.timestamps_s.tolist() == parquet.log.timestamps_s.tolist()
    for name in ("price", "added"):
        assert text.items.columns[name.upper()] == parquet.items.columns[name]
    assert text.users.columns["AGE"] == parquet.users.columns["age"]
    assert parquet.users.columns["age"][4] is None
    # A CSV file cannot tell an empty string from none; both are missing to the encoder.
    assert [value or None for value in text.items.columns["TITLE"]] == parquet.items.columns["title"]
    assert [value or None for value in text.users.columns["SEGMENT"]] == parquet.users.columns["segment"]


def assert_same(found: TrainingData, expected: TrainingData) -> None:
    assert found.users.ids == expected.users.ids
    assert found.items.ids == expected.items.ids
    for name in ("users", "items", "timestamps_s", "starts"):
        assert getattr(found.log, name).tolist() == getattr(expected.log, name).tolist()


def write_days(world: Path) -> None:
    """The toy interactions as a folder of four parts, one of them empty, as Spark lays them out."""
    table = pq.read_table(world / FILES["interactions"])
    for day, (start, stop) in enumerate([(0, 150), (150, 150), (150, 400), (400, 600)]):
        folder = world / "days" / f"day={day}"
        folder.mkdir(parents=True)
        # Each part has ids in an order of its own, and a narrower type than the last.
        part = table.slice(start, stop - start).set_column(0, "user_id", table["user_id"][start:stop].cast("int32"))
        pq.write_table(part if day == 2 else table.slice(start, stop - start), folder / "part-0.parquet")
    (world / "days" / "_SUCCESS").write_text("")
    (world / "days" / "_temporary").mkdir()
    (world / "days" / "_temporary" / "part-0.parquet").write_text("half written")


@pytest.mark.parametrize("name", ["days", "days/day=*/*.parquet", "days/**/part-[0-9].parquet"])
@pytest.mark.parametrize("rows_at_once", [7, 1 << 20])
def test_a_folder_of_parquet_files_is_one_table(
    read: Read, world: Path, monkeypatch: pytest.MonkeyPatch, name: str, rows_at_once: int
) -> None:
    expected = read()
    write_days(world)
    monkeypatch.setattr(files, "_ROWS_AT_ONCE", rows_at_once)
    assert_same(read(interactions=name), expected)


def test_a_folder_without_a_parquet_file(read: Read, world: Path) -> None:
    (world / "days").mkdir()
    assert f"{world}/days: there is no Parquet file; fix [data] interactions" in refusal(read, interactions="days")
    assert "days/*.parquet: there is no Parquet file" in refusal(read, interactions="days/*.parquet")
    pq.write_table(pq.read_table(world / FILES["interactions"]).slice(0, 0), world / "days" / "a.parquet")
    assert f"{world}/days: the file has no rows" in refusal(read, interactions="days")


def test_a_mistake_in_one_file_of_a_folder_names_that_file(read: Read, world: Path) -> None:
    write_days(world)
    part = world / "days" / "day=3" / "part-0.parquet"
    pq.write_table(pq.read_table(part, partitioning=None).drop(["timestamp"]), part)
    message = refusal(read, interactions="days")
    assert f"{part}: column 'timestamp' ([data] timestamp_column) is missing" in message


def test_the_digest_of_a_folder_changes_with_any_file(world: Path) -> None:
    write_days(world)
    before = data.digest_files({"interactions": world / "days"})
    part = world / "days" / "day=3" / "part-0.parquet"
    pq.write_table(pq.read_table(part, partitioning=None).slice(1), part)
    assert data.digest_files({"interactions": world / "days"}) != before
    assert data.digest_files({"interactions": part}) == data.digest_files({"interactions": world / "days/day=3/*"})


def test_weights_follow_their_interactions(read: Read, world: Path) -> None:
    table = pq.read_table(world / FILES["interactions"])
    unweighted = read()
    assert unweighted.log.weights is None
    # A weight that says which row it is of.
    weights = pa.array(table["user_id"].to_numpy() * 100 + table["item_id"].to_numpy())
    shuffled = np.random.default_rng(5).permutation(len(table))
    found = read(interactions=table.append_column("count", weights).take(shuffled), weight_column="count")
    assert_same(found, unweighted)
    assert found.log.weights is not None
    assert found.log.weights.tolist() == (found.log.users * 100 + found.log.items).tolist()


def test_ids_in_csv_files_stay_as_they_are_written(read: Read, world: Path) -> None:
    rows = [f"00{user},0{item},{item}" for user in (1, 2) for item in (1, 2, 3)]
    (world / "i.csv").write_text("\n".join(["user_id,item_id,timestamp", *rows]))
    (world / "n.csv").write_text("item_id\n01\n02\n03\n")
    found = read(interactions="i.csv", items="n.csv", users=None)
    assert found.users.ids == ["001", "002"]
    assert found.items.ids == ["01", "02", "03"]
    assert found.users.columns == {"user_id": ["001", "002"]}


def test_integers_and_whole_floats_are_the_same_id(read: Read, world: Path) -> None:
    table = changed(
        world, "interactions", "user_id", pq.read_table(world / FILES["interactions"])["user_id"].cast("double")
    )
    assert read(interactions=table).users.ids[:3] == ["0", "1", "2"]


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "UTC"])
def test_dates_and_times_become_unix_seconds(read: Read, world: Path, unit: str, zone: str | None) -> None:
    before = read().log.timestamps_s
    seconds = pq.read_table(world / FILES["interactions"])["timestamp"]
    moments = seconds.cast(pa.timestamp("s")).cast(pa.timestamp(unit)).cast(pa.timestamp(unit, zone))
    after = read(interactions=changed(world, "interactions", "timestamp", moments)).log.timestamps_s
    assert after.tolist() == before.tolist()


def test_repeated_items_and_users_are_counted_and_the_last_is_kept(read: Read, world: Path) -> None:
    items = pq.read_table(world / FILES["items"])
    again = items.slice(5, 2).set_column(items.schema.get_field_index("price"), "price", pa.array([1.5, 2.5]))
    found = read([{"name": "price", "owner": "item", "kind": "number"}], items=pa.concat_tables([items, again]))
    assert found.items.ids == [str(item) for item in range(40)]
    assert found.items.columns["price"][4:8] == [14.0, 1.5, 2.5, 17.0]
    [note] = found.notes
    assert "items.parquet: column 'item_id': 2 rows repeat an id" in note


def test_interactions_with_unlisted_items_are_counted_and_dropped(read: Read, world: Path) -> None:
    items = pq.read_table(world / FILES["items"]).slice(1)
    num_before = len(read().log.items)
    num_of_item_0 = pq.read_table(world / FILES["interactions"])["item_id"].to_pylist().count(0)
    found = read(items=items)
    assert len(found.log.items) == num_before - num_of_item_0
    [note] = found.notes
    assert f"{num_of_item_0} interactions with 1 items" in note
    assert "items.parquet" in note
    assert "'0'" in note


def test_unlisted_users_stay_with_missing_features(read: Read, world: Path) -> None:
    features = [{"name": "age", "owner": "query", "kind": "number"}]
    found = read(features, users=pq.read_table(world / FILES["users"]).slice(2))
    assert found.users.ids[-2:] == ["0", "1"]
    assert found.users.columns["age"][-2:] == [None, None]
    assert found.users.columns["user_id"] == found.users.ids
    assert {found.users.ids[user] for user in found.log.users} == {str(user) for user in range(60)}
    [note] = found.notes
    assert "column 'user_id': 2 users" in note


# Bad data: the message names the file, the column and the fix.


def refusal(read: Read, *arguments: Any, **changes: Any) -> str:
    with pytest.raises(InvalidInputError) as caught:
        read(*arguments, **changes)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("table", ["interactions", "items", "users"])
def test_missing_file(read: Read, world: Path, table: str) -> None:
    message = refusal(read, **{table: "absent.parquet"})
    assert message == f"{world}/absent.parquet: no such file; fix [data] {table} or folder"


@pytest.mark.parametrize("name", ["empty.parquet", "empty.csv"])
@pytest.mark.parametrize("table", ["interactions", "items", "users"])
def test_empty_file(read: Read, world: Path, table: str, name: str) -> None:
    (world / name).write_bytes(b"")
    message = refusal(read, **{table: name})
    assert f"{world}/{name}: the file is empty; [data] {table} needs" in message


def test_file_without_rows(read: Read, world: Path) -> None:
    (world / "header.csv").write_text("user_id,item_id,timestamp\n")
    assert "header.csv: the file has no rows" in refusal(read, interactions="header.csv")
    message = refusal(read, items=pq.read_table(world / FILES["items"]).slice(0, 0))
    assert "items.parquet: the file has no rows; [data] items needs at least one" in message


def test_not_what_its_ending_says(read: Read, world: Path) -> None:
    (world / "bad.parquet").write_bytes(b"this is not a Parquet file, though its name says so")
    message = refusal(read, interactions="bad.parquet")
    assert "bad.parquet: not a readable parquet file" in message
    assert "write it again" in message
    (world / "ragged.csv").write_text("user_id,item_id,timestamp\n1,2,3\n4,5\n")
    assert "ragged.csv: not a readable csv file" in refusal(read, interactions="ragged.csv")
    (world / "table.json").write_text("{}")
    message = refusal(read, interactions="table.json")
    assert "table.json: files ending in '.json' cannot be read; [data] interactions needs .parquet or .csv" in message


def test_missing_columns_are_named_with_those_that_are_there(read: Read, world: Path) -> None:
    message = refusal(read, interactions=pq.read_table(world / FILES["interactions"]).drop(["timestamp", "user_id"]))
    assert "interactions.parquet: column 'user_id' ([data] user_id_column) is missing" in message
    assert "column 'timestamp' ([data] timestamp_column) is missing" in message
    assert "The file has ['item_id']; name one of these, or add the column" in message


def test_missing_feature_column(read: Read) -> None:
    message = refusal(read, [{"name": "colour", "owner": "item", "kind": "categorical", "column": "color"}])
    assert "items.parquet: column 'color' (feature 'colour') is missing. The file has ['item_id', 'brand'" in message
    message = refusal(read, [{"name": "height", "owner": "query", "kind": "number"}])
    assert "users.parquet: column 'height' (feature 'height') is missing" in message


def test_wrong_separator_shows_in_the_columns(read: Read, world: Path) -> None:
    (world / "tabs.csv").write_text("user_id\titem_id\ttimestamp\n1\t2\t3\n")
    assert r"The file has ['user_id\titem_id\ttimestamp']" in refusal(read, interactions="tabs.csv")


def test_a_column_that_is_there_twice(read: Read, world: Path) -> None:
    (world / "twice.csv").write_text("user_id,item_id,timestamp,item_id\n1,2,3,4\n")
    assert "column 'item_id' ([data] item_id_column) is there twice" in refusal(read, interactions="twice.csv")


def test_user_feature_without_a_user_table(read: Read) -> None:
    message = refusal(read, [{"name": "age", "owner": "query", "kind": "number"}], users=None)
    assert "feature 'age': its column 'age' is one of a user table; name the file in [data] users" in message


@pytest.mark.parametrize(
    ("column", "values", "expected"),
    [
        ("timestamp", ["yesterday"] * 600, "is string; timestamps must be Unix seconds"),
        ("timestamp", [1_700_000_000_000] * 600, "is not a moment in Unix seconds; divide milliseconds by 1000"),
        ("timestamp", [None, 5] * 300, "300 of 600 rows have no timestamp; remove them"),
        ("timestamp", [float("nan"), 5.0] * 300, "300 of 600 rows have no timestamp; remove them"),
        ("user_id", [[1]] * 600, "is list<"),
        ("user_id", [1.5] * 600, "ids must be strings or integers"),
        ("user_id", ["", "a", "b"] * 200, "200 of 600 rows have no id; remove them"),
        ("item_id", [None, 1, 2] * 200, "200 of 600 rows have no id; remove them"),
        ("user_id", [7] * 600, "'7' is the only id; training needs at least two different ones"),
        ("item_id", ["x"] * 600, "'x' is the only id; training needs at least two different ones"),
        ("user_id", list(range(600)), "no user has 3 or more interactions"),
        ("item_id", [f"x{i}" for i in range(600)], "not one id, such as 'x0', is in"),
        ("item_id", [1] * 599 + [999], "only one item of the item table is left"),
    ],
)
def test_bad_interactions(read: Read, world: Path, column: str, values: list[Any], expected: str) -> None:
    message = refusal(read, interactions=changed(world, "interactions", column, pa.array(values)))
    assert f"{world}/interactions.parquet: column '{column}'" in message
    assert expected in message


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["much"] * 600, "is string; [data] weight_column must hold numbers"),
        ([1.0, -2.0] * 300, "300 of 600 rows have no weight or one such as -2.0; give finite numbers from 0 up"),
        ([1.0, None] * 300, "300 of 600 rows have no weight"),
        ([1.0, float("inf")] * 300, "300 of 600 rows have no weight"),
        ([0.0] * 600, "all interactions to train on weigh 0"),
    ],
)
def test_bad_weights(read: Read, world: Path, values: list[Any], expected: str) -> None:
    table = pq.read_table(world / FILES["interactions"]).append_column("count", pa.array(values))
    message = refusal(read, interactions=table, weight_column="count")
    assert f"{world}/interactions.parquet: " in message
    assert expected in message


def test_a_weight_column_that_is_not_there(read: Read) -> None:
    assert "column 'count' ([data] weight_column) is missing" in refusal(read, weight_column="count")


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        ("categorical", [["a"]] * 40, "strings or integers; change the column or the kind"),
        ("categorical", [1.5] * 40, "holds 1.5, but feature 'feature' of kind categorical needs strings or integers"),
        ("categorical", [datetime(2020, 1, 1)] * 40, "needs strings or integers"),
        ("categorical_list", ["a"] * 40, "needs a list of strings or integers"),
        ("categorical_list", [[1.5]] * 40, "needs a list of strings or integers"),
        ("number", ["a"] * 40, "is string, but feature 'feature' of kind number needs numbers"),
        ("number", [True] * 40, "needs numbers"),
        ("number", [float("inf"), 1.0] * 20, "20 values are infinite; leave them empty or give finite numbers"),
        ("timestamp", ["2020"] * 40, "needs Unix seconds or date and time"),
        ("text", [5] * 40, "needs strings"),
        ("vector", [1.0] * 40, "needs a list of numbers"),
        ("vector", [["a"]] * 40, "needs a list of numbers"),
    ],
)
def test_wrong_type_of_a_feature(read: Read, world: Path, kind: str, values: list[Any], expected: str) -> None:
    feature = {"name": "feature", "owner": "item", "kind": kind, "column": "brand"}
    if kind == "vector":
        feature["size"] = 1  # type: ignore[assignment]
    message = refusal(read, [feature], items=changed(world, "items", "brand", pa.array(values)))
    assert f"{world}/items.parquet: column 'brand'" in message
    assert "feature 'feature'" in message
    assert expected in message


def test_lists_in_csv_files(read: Read, world: Path) -> None:
    (world / "items.csv").write_text("item_id,tags\n" + "".join(f"{item},a|b\n" for item in range(40)))
    message = refusal(read, [{"name": "tags", "owner": "item", "kind": "categorical_list"}], items="items.csv")
    assert "CSV files cannot hold lists, use Parquet" in message


def test_ids_are_categories(read: Read) -> None:
    message = refusal(read, [{"name": "number", "owner": "item", "kind": "number", "column": "item_id"}])
    assert "items.parquet: feature 'number' reads the ids in 'item_id' as number; use kind = 'categorical'" in message


def test_digests_name_a_file_that_is_not_there(world: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"absent\.parquet: no such file; fix \[data\] items"):
        data.digest_files({"items": world / "absent.parquet"})
