import datetime
import decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from catalogue_rows import rows_by_id
from deltalake import DeltaTable, write_deltalake
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_checkpoint import toy_items

from towers.catalogue import Catalogue, partition
from towers.errors import (
    CorruptArtefactError,
    InvalidInputError,
    NotFoundError,
    StoreUnavailableError,
)
from towers.placement import shard_of
from towers.store import Store


def test_load_update_delete_compact(store_url: str) -> None:
    catalogue = Catalogue(Store(store_url))
    assert catalogue.version() is None
    report = catalogue.upsert(toy_items(50))
    assert (report.num_rows, report.num_items, report.num_duplicates) == (50, 50, 0)
    assert report.catalogue_version == catalogue.version()
    first = catalogue.read()
    assert first.version == report.catalogue_version
    assert first.items["item_id"].to_pylist() == sorted(str(number) for number in range(1, 51))
    expected = {row["item_id"]: row for row in toy_items(50).to_pylist()}
    assert {row["item_id"]: row for row in first.items.to_pylist()} == expected

    changed = pa.table({"item_id": ["7", "new", "7"], "title": ["lost", "New", "Seven"], "price": [1.0, 2.0, 3.0]})
    report = catalogue.upsert(changed)
    assert (report.num_rows, report.num_items, report.num_duplicates) == (3, 2, 1)
    assert report.catalogue_version == catalogue.version() != first.version
    assert catalogue.delete(["8", "9", "8", "absent"]) == 3

    state = catalogue.read()
    rows = rows_by_id(catalogue)
    assert rows["7"] == {"title": "Seven", "price": 3.0}, "an upsert replaces the item, attributes left out are null"
    assert rows["new"] == {"title": "New", "price": 2.0}
    assert len(rows) == 49
    assert not {"8", "9", "absent"} & rows.keys()

    catalogue.compact()
    assert catalogue.version() == state.version
    assert catalogue.read().items.equals(state.items)
    catalogue.upsert(pa.table({"item_id": ["8"], "title": ["Back"]}))
    assert rows_by_id(catalogue) == {**rows, "8": {"title": "Back"}}, "changes apply on top of a compacted snapshot"
    assert catalogue.read(state.version).items.equals(state.items)
    assert catalogue.read(first.version).items.equals(first.items)
    fresh = Catalogue(Store(store_url))
    assert fresh.version() == catalogue.version()
    assert fresh.read().items.equals(catalogue.read().items)


def test_every_state_stays_readable_over_compactions(store_url: str) -> None:
    catalogue = Catalogue(Store(store_url))
    states = {}
    for step in range(4):
        catalogue.upsert(pa.table({"item_id": ["same", f"item{step}"], "step": [step, step]}))
        if step == 2:
            catalogue.delete([f"item{step - 1}"])
        version = catalogue.version()
        assert version is not None
        states[version] = catalogue.read().items
        if step % 2:
            catalogue.compact()
            assert catalogue.version() == version
    assert len(states) == 4
    for reader in (catalogue, Catalogue(Store(store_url))):
        for version, items in states.items():
            assert reader.read(version).items.equals(items)


def test_compacting_twice_writes_once(folder_url: str) -> None:
    catalogue = Catalogue(Store(folder_url))
    catalogue.upsert(toy_items(5))
    catalogue.compact()
    catalogue.compact()
    assert DeltaTable(f"{folder_url}/catalog/items").version() == 0


class CountingStore(Store):
    """Counts what is asked of it."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.num_gets = 0

    def get(self, path: str) -> bytes:
        self.num_gets += 1
        return super().get(path)


def test_following_costs_two_small_reads(folder_url: str) -> None:
    store = CountingStore(folder_url)
    catalogue = Catalogue(store)
    for _ in range(5):
        catalogue.upsert(toy_items(3))
    catalogue.compact()
    version = catalogue.version()
    store.num_gets = 0
    assert catalogue.version() == version
    assert store.num_gets == 2


def test_appending_costs_the_same_however_long_the_log_is(folder_url: str) -> None:
    store = CountingStore(folder_url)
    catalogue = Catalogue(store)
    catalogue.upsert(toy_items(3))
    catalogue.compact()
    counts = []
    for _ in range(120):
        store.num_gets = 0
        catalogue.upsert(toy_items(3))
        counts.append(store.num_gets)
    assert counts[5] == counts[-5] <= 10
    assert list(Path(folder_url, "catalog/changes/_delta_log").glob("*.checkpoint.parquet")), (
        "opening it stays fast too"
    )
    assert len(catalogue.read().items) == 3


def test_before_the_first_load(store_url: str) -> None:
    catalogue = Catalogue(Store(store_url))
    for act in (catalogue.read, catalogue.compact, lambda: catalogue.delete(["1"])):
        with pytest.raises(NotFoundError, match="load items first"):
            act()
    assert catalogue.delete([]) == 0
    assert catalogue.version() is None


@pytest.mark.parametrize("version", ["", "1", "x.y", "0.0", "0.2", "1.1", "0.1.0", "-1.1", "0." + "9" * 30])
def test_versions_that_never_were(folder_url: str, version: str) -> None:
    catalogue = Catalogue(Store(folder_url))
    catalogue.upsert(toy_items(3))
    with pytest.raises(NotFoundError, match="no version"):
        catalogue.read(version)


def test_the_last_item_can_go(folder_url: str) -> None:
    catalogue = Catalogue(Store(folder_url))
    catalogue.upsert(toy_items(2))
    catalogue.delete(["1", "2"])
    assert catalogue.version() is not None
    assert catalogue.read().items.num_rows == 0
    catalogue.compact()
    assert catalogue.read().items.num_rows == 0
    catalogue.upsert(toy_items(1))
    assert list(rows_by_id(catalogue)) == ["1"]


@pytest.mark.parametrize(
    ("ids", "reason"),
    [
        (pa.array(["a", None]), "row 1: the id is null"),
        (pa.array(["a", "b", ""]), "row 2: the id is empty"),
        (pa.array(["nul\0"]), "row 0: the id contains a NUL"),
        (pa.array(["ok", "é" * 513]), "row 1: the id is longer than 1024 bytes"),
        (pa.array([1.0]), "expected strings or integers, got double"),
        (pa.array([b"a"]), "expected strings or integers, got binary"),
        (pa.array([True]), "expected strings or integers, got bool"),
        (pa.array([None], pa.null()), "expected strings or integers, got null"),
        (pa.array([], pa.string()), "no rows"),
    ],
)
def test_ids_that_are_refused(folder_url: str, ids: pa.Array, reason: str) -> None:
    catalogue = Catalogue(Store(folder_url))
    with pytest.raises(InvalidInputError, match=reason):
        catalogue.upsert(pa.table({"item_id": ids}))
    assert catalogue.version() is None


def test_deleted_ids_are_checked_too(folder_url: str) -> None:
    catalogue = Catalogue(Store(folder_url))
    catalogue.upsert(toy_items(1))
    with pytest.raises(InvalidInputError, match="is empty"):
        catalogue.delete(["1", ""])
    assert list(rows_by_id(catalogue)) == ["1"]


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["title"], "exactly one column 'item_id'"),
        (["item_id", "item_id"], "exactly one column 'item_id'"),
        (["item_id", "_op"], "'_op': names that start with '_' are reserved"),
        (["item_id", "_commit_version"], "'_commit_version'"),
        (["item_id", ""], "column ''"),
        (["item_id", "movie title"], "'movie title'"),
        (["item_id", "Title", "title"], "'title': another column"),
        (["item_id", "ITEM_ID"], "'ITEM_ID': another column"),
    ],
)
def test_columns_that_are_refused(folder_url: str, names: list[str], reason: str) -> None:
    catalogue = Catalogue(Store(folder_url))
    with pytest.raises(InvalidInputError, match=reason):
        catalogue.upsert(pa.Table.from_arrays([pa.array(["a"])] * len(names), names=names))
    assert catalogue.version() is None


def test_columns_named_like_our_own_words_are_kept(folder_url: str) -> None:
    catalogue = Catalogue(Store(folder_url))
    row = {"op": "delete", "row": 7, "commit": "c", "version": 1, "a.b": "dot", "größe": 2}
    catalogue.upsert(pa.table({"item_id": ["1"], **{name: [value] for name, value in row.items()}}))
    assert rows_by_id(catalogue) == {"1": row}
    catalogue.compact()
    assert rows_by_id(catalogue) == {"1": row}


@pytest.mark.parametrize("is_compacted", [False, True])
@pytest.mark.parametrize(
    ("given", "types"),
    [
        (pa.array(["1995"]), "its type is string, in the catalogue it is int64"),
        (pa.array([1995.5]), "its type is double, in the catalogue it is int64"),
        (pa.array([[1995]]), "its type is list<item: int64>, in the catalogue it is int64"),
    ],
)
def test_a_conflicting_type_is_refused(folder_url: str, given: pa.Array, types: str, is_compacted: bool) -> None:
    catalogue = Catalogue(Store(folder_url))
    catalogue.upsert(pa.table({"item_id": ["1"], "year": [1994]}))
    if is_compacted:
        catalogue.compact()
    version = catalogue.version()
    with pytest.raises(InvalidInputError, match=f"column 'year': {types}"):
        catalogue.upsert(pa.table({"item_id": ["2"], "year": given}))
    with pytest.raises(InvalidInputError, match="spells it 'year'"):
        catalogue.upsert(pa.table({"item_id": ["2"], "Year": [1]}))
    assert catalogue.version() == version


def test_a_type_that_cannot_be_stored_is_refused(folder_url: str) -> None:
    catalogue = Catalogue(Store(folder_url))
    for value, type_ in ((datetime.time(1), "time64"), ({"x": 1}, "struct"), (datetime.timedelta(1), "duration")):
        with pytest.raises(InvalidInputError, match=f"column 'x': type {type_}"):
            catalogue.upsert(pa.table({"item_id": ["1"], "x": [value]}))


def test_values_come_back_as_they_were(store_url: str) -> None:
    catalogue = Catalogue(Store(store_url))
    moment = datetime.datetime(2024, 2, 29, 12, 30, 15, 123456, tzinfo=datetime.UTC)
    given = {
        "item_id": pa.array([10, 9], pa.uint16()),
        "text": pa.array(["ünïcode 🎬 \n\t\"'", ""], pa.large_string()),
        "category": pa.array(["a", "b"]).dictionary_encode(),
        "tags": pa.array([["x", "y"], []], pa.large_list(pa.large_string())),
        "tag_codes": pa.array([["x"], None], pa.list_(pa.dictionary(pa.int8(), pa.string()))),
        "vector": pa.array([[1.5, 2.5], [3.5, 4.5]], pa.list_(pa.float32(), 2)),
        "half": pa.array([np.float16(0.5), np.float16(2)], pa.float16()),
        "small": pa.array([1, None], pa.int8()),
        "wide": pa.array([2**63 - 1, -(2**63)], pa.int64()),
        "price": pa.array([None, decimal.Decimal("9.50")], pa.decimal128(10, 2)),
        "flag": pa.array([True, False]),
        "released": pa.array([datetime.date(1995, 1, 1), None]),
        "seen": pa.array([moment, None], pa.timestamp("ns", "Europe/Berlin")),
        "local": pa.array([moment.replace(tzinfo=None), None], pa.timestamp("ms")),
        "nothing": pa.array([None, None], pa.null()),
        "no_tags": pa.array([[], None], pa.list_(pa.null())),
    }
    catalogue.upsert(pa.table(given))
    for _ in range(2):
        items = catalogue.read().items
        assert items["item_id"].to_pylist() == ["10", "9"]
        assert items.schema.field("item_id").type == pa.string()
        for name in ("text", "category", "tags", "tag_codes", "vector", "half", "small", "wide", "price", "flag"):
            assert items[name].to_pylist() == given[name].to_pylist(), name
        assert items["released"].to_pylist() == [datetime.date(1995, 1, 1), None]
        assert items["seen"].to_pylist() == [moment, None]
        assert items["local"].to_pylist() == [moment.replace(microsecond=123000), None]
        assert not {"nothing", "no_tags"} & set(items.column_names)
        assert items.schema.field("vector").type == pa.list_(pa.float32())
        catalogue.compact()
    # Columns known by now: nulls and narrower numbers are no conflict.
    catalogue.upsert(
        pa.table(
            {
                "item_id": ["11"],
                "tags": pa.array([[]], pa.list_(pa.null())),
                "price": pa.array([3], pa.int32()),
                "wide": pa.array([4.0]),
                "text": pa.array([None], pa.null()),
            }
        )
    )
    assert rows_by_id(catalogue)["11"] == {"tags": [], "price": 3.0, "wide": 4}


@settings(max_examples=15)
@given(
    ids=st.lists(
        st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), min_size=1, max_size=40),
        min_size=1,
        max_size=8,
        unique=True,
    )
)
def test_any_id_round_trips(tmp_path_factory: pytest.TempPathFactory, ids: list[str]) -> None:
    catalogue = Catalogue(Store(str(tmp_path_factory.mktemp("store"))))
    catalogue.upsert(pa.table({"item_id": ids, "position": list(range(len(ids)))}))
    assert rows_by_id(catalogue) == {item_id: {"position": position} for position, item_id in enumerate(ids)}
    assert catalogue.read().items["item_id"].to_pylist() == sorted(ids, key=str.encode)
    catalogue.compact()
    catalogue.delete(ids[:1])
    assert rows_by_id(catalogue).keys() == set(ids[1:])


def test_a_folder_with_an_odd_name(tmp_path: Path) -> None:
    catalogue = Catalogue(Store(str(tmp_path / "odd näme 100% #1?")))
    catalogue.upsert(toy_items(3))
    catalogue.compact()
    catalogue.upsert(toy_items(4))
    assert len(rows_by_id(catalogue)) == 4
    with pytest.raises(InvalidInputError, match="rename the folder"):
        Catalogue(Store(str(tmp_path / "a%20b")))


def test_a_damaged_log_is_told_apart_from_an_empty_one(folder_url: str) -> None:
    catalogue = Catalogue(Store(folder_url))
    catalogue.upsert(toy_items(3))
    commit = Path(folder_url, "catalog/changes/_delta_log", f"{1:020}.json")
    commit.write_text("{garbage")
    for reader in (catalogue, Catalogue(Store(folder_url))):
        with pytest.raises(CorruptArtefactError):
            reader.version()
    commit.unlink()
    data = next(Path(folder_url, "catalog/changes").glob("*.parquet"))
    content = data.read_bytes()
    data.write_bytes(content[:100])
    with pytest.raises(CorruptArtefactError, match=data.name):
        catalogue.read()
    data.unlink()
    with pytest.raises(NotFoundError, match=data.name):
        catalogue.read()


def test_a_vacuumed_snapshot_is_not_found(folder_url: str) -> None:
    catalogue = Catalogue(Store(folder_url))
    url = f"{folder_url}/catalog/items"
    write_deltalake(url, pa.table({"item_id": ["1"]}))
    old = catalogue.version()
    write_deltalake(url, pa.table({"item_id": ["2"]}), mode="overwrite")
    DeltaTable(url).vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=False)
    assert list(rows_by_id(catalogue)) == ["2"]
    with pytest.raises(NotFoundError, match="a file is gone"):
        catalogue.read(old)


def test_an_item_without_an_id_is_refused(folder_url: str) -> None:
    write_deltalake(f"{folder_url}/catalog/items", pa.table({"item_id": ["1", None]}))
    with pytest.raises(CorruptArtefactError, match="1 rows without item_id"):
        Catalogue(Store(folder_url)).read()


def test_items_without_ids_are_refused(folder_url: str) -> None:
    write_deltalake(f"{folder_url}/catalog/items", pa.table({"title": ["1"]}))
    with pytest.raises(CorruptArtefactError, match="no column 'item_id'"):
        Catalogue(Store(folder_url)).read()


def test_tables_that_disagree_are_refused(folder_url: str) -> None:
    catalogue = Catalogue(Store(folder_url))
    catalogue.upsert(pa.table({"item_id": ["1"], "year": ["old"]}))
    write_deltalake(f"{folder_url}/catalog/items", pa.table({"item_id": ["1"], "year": [1]}))
    with pytest.raises(CorruptArtefactError, match="'year' is int64 in one table and string in the other"):
        catalogue.read()


def test_a_store_that_is_down(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    catalogue = Catalogue(Store(s3_url))
    catalogue.upsert(toy_items(3))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    down = Catalogue(Store(s3_url))
    for act in (down.version, down.read, down.compact, lambda: down.upsert(toy_items(1)), lambda: down.delete(["1"])):
        with pytest.raises(StoreUnavailableError):
            act()


def test_shards_by_hand() -> None:
    assert shard_of("42", 5) == xxhash.xxh3_64_intdigest(b"42") % 5
    assert [shard_of(str(number), 3) for number in range(10)] == [
        xxhash.xxh3_64_intdigest(str(number).encode()) % 3 for number in range(10)
    ]


@given(
    ids=st.lists(st.text(st.characters(blacklist_categories=("Cs",)), min_size=1), unique=True), count=st.integers(1, 7)
)
def test_partitions_are_a_partition(ids: list[str], count: int) -> None:
    items = pa.table({"item_id": pa.array(ids, pa.string()), "position": pa.array(range(len(ids)), pa.int64())})
    parts = [partition(items, shard, count) for shard in range(count)]
    assert sorted(position for part in parts for position in part["position"].to_pylist()) == list(range(len(ids)))
    for shard, part in enumerate(parts):
        assert all(shard_of(item_id, count) == shard for item_id in part["item_id"].to_pylist())


@pytest.mark.parametrize(("shard", "count"), [(2, 2), (-1, 2), (0, 0)])
def test_a_shard_that_is_none(shard: int, count: int) -> None:
    with pytest.raises(InvalidInputError, match="shard"):
        partition(toy_items(3), shard, count)


def test_the_size_of_a_state_is_known_without_reading_an_item(store_url: str) -> None:
    catalogue = Catalogue(Store(store_url))
    first = catalogue.upsert(pa.table({"item_id": ["a", "b", "c"], "price": [1, 2, 3]})).catalogue_version
    assert catalogue.size(first).num_rows == 3
    catalogue.upsert(pa.table({"item_id": ["c", "d"], "price": [4, 5]}))
    catalogue.delete(["a"])
    newest = catalogue.version()
    assert newest is not None
    before = catalogue.size(newest)
    assert before.num_rows == 6, "an upper bound: changes count as well"
    assert before.stored_bytes > catalogue.size(first).stored_bytes > 100
    catalogue.compact()
    assert catalogue.size(newest).num_rows == 3
    assert 100 < catalogue.size(newest).stored_bytes < before.stored_bytes
    with pytest.raises(NotFoundError):
        catalogue.size("9.9")


def test_who_follows_the_log_knows_its_size_without_reading_it_again(folder_url: str) -> None:
    writer = Catalogue(Store(folder_url))
    first = writer.upsert(toy_items(3)).catalogue_version
    for _ in range(30):
        writer.upsert(toy_items(3))
    store = CountingStore(folder_url)
    reader = Catalogue(store)
    span = reader.commits_since(first)
    assert span is not None
    reader.commits(span.numbers)
    expected = writer.size(span.version)
    store.num_gets = 0
    assert reader.size(span.version) == expected
    assert store.num_gets < 10


def test_commits_read_together_are_those_read_one_by_one(folder_url: str) -> None:
    catalogue = Catalogue(Store(folder_url))
    catalogue.upsert(pa.table({"item_id": ["a", "b"], "price": [1.0, 2.0]}))
    catalogue.delete(["a"])
    catalogue.compact()
    catalogue.upsert(pa.table({"item_id": ["c"], "year": [1999]}))
    for number in range(10):
        catalogue.upsert(pa.table({"item_id": [f"{number}", "d"], "price": [1.5, number / 2]}))
    numbers = range(1, 14)
    together = catalogue.commits(numbers)
    assert [commit.number for commit in together] == list(numbers)
    for commit in together:
        (alone,) = catalogue.commits([commit.number])
        assert commit.rows.select(alone.rows.column_names).equals(alone.rows)
        others = set(commit.rows.column_names) - set(alone.rows.column_names)
        assert all(commit.rows[name].null_count == commit.rows.num_rows for name in others)
