"""Several writers of one catalogue: other tools, at once, in one commit, and killed in the middle."""

import datetime
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest
from catalogue_rows import rows_by_id
from child_process import tied_python
from deltalake import DeltaTable, write_deltalake
from toy_checkpoint import toy_items

from towers.catalogue import Catalogue, Delete, DeleteReport, Upsert, UpsertReport
from towers.errors import (
    ConflictError,
    CorruptArtefactError,
    InvalidInputError,
    NotFoundError,
)
from towers.store import Store


def test_a_foreign_writer_may_rewrite_items(store_url: str) -> None:
    catalogue = Catalogue(Store(store_url))
    catalogue.upsert(pa.table({"item_id": ["1", "2"], "title": ["a", "b"]}))
    catalogue.compact()
    compacted = catalogue.read()
    url = f"{store_url}/catalog/items"
    write_deltalake(url, pa.table({"item_id": ["2", "3"], "title": ["B", "C"]}), mode="overwrite")
    assert catalogue.version() != compacted.version
    assert rows_by_id(catalogue) == {"2": {"title": "B"}, "3": {"title": "C"}}
    catalogue.upsert(pa.table({"item_id": ["3"], "title": ["c"]}))
    state = catalogue.read()
    assert rows_by_id(catalogue) == {"2": {"title": "B"}, "3": {"title": "c"}}
    catalogue.compact()
    assert catalogue.read().items.equals(state.items)
    assert catalogue.version() == state.version
    assert catalogue.read(compacted.version).items.equals(compacted.items)
    # The states between two edits of items have no mixtures that never were.
    items_edit, changes_edit = state.version.split(".")
    with pytest.raises(NotFoundError):
        catalogue.read(f"{items_edit}.{int(changes_edit) + 1}")
    assert Catalogue(Store(store_url)).version() == state.version


def test_a_foreign_writer_may_create_items(folder_url: str) -> None:
    numbers = pa.array([2, 1, 2], pa.int32())
    write_deltalake(f"{folder_url}/catalog/items", pa.table({"item_id": numbers, "year": [1, 2, 3]}))
    catalogue = Catalogue(Store(folder_url))
    first = catalogue.version()
    assert first is not None
    assert rows_by_id(catalogue) == {"1": {"year": 2}, "2": {"year": 3}}
    catalogue.upsert(pa.table({"item_id": ["3"], "year": [4]}))
    assert rows_by_id(catalogue) == {"1": {"year": 2}, "2": {"year": 3}, "3": {"year": 4}}
    assert rows_by_id(catalogue, first) == {"1": {"year": 2}, "2": {"year": 3}}
    catalogue.compact()
    assert rows_by_id(catalogue) == {"1": {"year": 2}, "2": {"year": 3}, "3": {"year": 4}}


def test_a_foreign_writer_may_append_changes(folder_url: str) -> None:
    catalogue = Catalogue(Store(folder_url))
    catalogue.upsert(pa.table({"item_id": ["1", "2"], "title": ["a", "b"]}))
    version = catalogue.version()
    rows = {
        "_op": ["upsert"] * 2 + ["delete"],
        "_row": [2, 1, 0],
        "item_id": ["1", "1", "2"],
        "title": ["A", "B", None],
    }
    write_deltalake(f"{folder_url}/catalog/changes", pa.table(rows), mode="append")
    assert catalogue.version() != version
    assert rows_by_id(catalogue) == {"1": {"title": "A"}}, "in the order of _row"
    rows = {"_op": ["replace"], "_row": [0], "item_id": ["1"], "title": ["A"]}
    write_deltalake(f"{folder_url}/catalog/changes", pa.table(rows), mode="append")
    with pytest.raises(CorruptArtefactError, match="_op must be"):
        catalogue.read()


def test_the_log_of_changes_cannot_be_rewritten(folder_url: str) -> None:
    catalogue = Catalogue(Store(folder_url))
    catalogue.upsert(toy_items(3))
    with pytest.raises(Exception, match="append-only"):
        DeltaTable(f"{folder_url}/catalog/changes").delete("item_id = '1'")
    DeltaTable(f"{folder_url}/catalog/changes").alter.set_table_properties({"delta.appendOnly": "false"})
    assert len(rows_by_id(catalogue)) == 3
    DeltaTable(f"{folder_url}/catalog/changes").delete("item_id = '1'")
    with pytest.raises(CorruptArtefactError, match="the log is append-only"):
        catalogue.read()


@pytest.mark.parametrize("table", ["changes", "items"])
def test_maintenance_by_other_tools_changes_no_version(folder_url: str, table: str) -> None:
    catalogue = Catalogue(Store(folder_url))
    catalogue.upsert(toy_items(5))
    catalogue.compact()
    for step in range(3):
        rows = pa.table({"item_id": [f"x{step}", "1"], "title": [str(step), str(step)]})
        catalogue.upsert(rows)
        write_deltalake(f"{folder_url}/catalog/items", rows, mode="append", schema_mode="merge")
    state = catalogue.read()
    delta = DeltaTable(f"{folder_url}/catalog/{table}")
    before = delta.version()
    delta.optimize.compact()
    delta.create_checkpoint()
    delta.alter.set_table_properties({"delta.checkpointInterval": "10"})
    assert DeltaTable(f"{folder_url}/catalog/{table}").version() >= before + 2
    for reader in (catalogue, Catalogue(Store(folder_url))):
        assert reader.version() == state.version
        assert reader.read().items.equals(state.items)
    catalogue.compact()
    assert catalogue.version() == state.version
    catalogue.upsert(pa.table({"item_id": ["1"], "title": ["new"]}))
    assert catalogue.version() != state.version
    assert rows_by_id(catalogue)["1"] == {"title": "new"}
    numbers = [int(number) for number in state.version.split(".")]
    numbers[["items", "changes"].index(table)] += 1
    with pytest.raises(NotFoundError):  # One name for one state.
        catalogue.read(f"{numbers[0]}.{numbers[1]}")


def test_checkpoints_of_the_log_keep_every_state(folder_url: str) -> None:
    catalogue = Catalogue(Store(folder_url))
    catalogue.upsert(pa.table({"item_id": ["1"], "n": [0]}))
    catalogue.compact()
    for table in ("changes", "items"):
        DeltaTable(f"{folder_url}/catalog/{table}").alter.set_table_properties({"delta.checkpointInterval": "5"})
    versions = []
    for n in range(1, 13):
        versions.append((catalogue.upsert(pa.table({"item_id": ["1"], "n": [n]})).catalogue_version, n))
        catalogue.compact()
    assert list(Path(folder_url, "catalog/items/_delta_log").glob("*.checkpoint.parquet"))
    fresh = Catalogue(Store(folder_url))
    assert fresh.version() == versions[-1][0]
    assert [rows_by_id(fresh, version)["1"]["n"] for version, _ in versions] == [n for _, n in versions]


def test_two_that_create_the_catalogue(folder_url: str) -> None:
    for race in range(20):
        url = f"{folder_url}/{race}"
        barrier = threading.Barrier(3)

        def create(writer: int, url: str = url, barrier: threading.Barrier = barrier) -> str:
            catalogue = Catalogue(Store(url))
            barrier.wait()
            return catalogue.upsert(pa.table({"item_id": [f"{writer}"], f"column{writer}": [writer]})).catalogue_version

        with ThreadPoolExecutor(3) as writers:
            assert sorted(writers.map(create, range(3))) == ["0.1", "0.2", "0.3"]
        assert rows_by_id(Catalogue(Store(url))) == {f"{writer}": {f"column{writer}": writer} for writer in range(3)}
        assert len(DeltaTable(f"{url}/catalog/changes").schema().fields) == 6


def test_concurrent_writers_lose_nothing(store_url: str) -> None:
    num_writers, num_rounds = 3, 3
    barrier = threading.Barrier(num_writers)

    def write(writer: int) -> list[str]:
        catalogue = Catalogue(Store(store_url))
        barrier.wait()
        # Each adds a column of its own, so that the schemas collide too; nobody has created the tables yet.
        return [
            catalogue.upsert(
                pa.table({"item_id": [f"{writer}-{step}", "shared"], f"column{writer}": [step, writer]})
            ).catalogue_version
            for step in range(num_rounds)
        ]

    with ThreadPoolExecutor(num_writers) as writers:
        versions = [version for own in writers.map(write, range(num_writers)) for version in own]
    assert sorted(versions) == sorted(f"0.{n}" for n in range(1, num_writers * num_rounds + 1))
    catalogue = Catalogue(Store(store_url))
    rows = rows_by_id(catalogue)
    assert len(rows) == num_writers * num_rounds + 1
    for writer in range(num_writers):
        for step in range(num_rounds):
            assert rows[f"{writer}-{step}"] == {f"column{writer}": step}
    last_writer = [f"{writer}" for writer in range(num_writers) if rows["shared"] == {f"column{writer}": writer}]
    assert len(last_writer) == 1, "the shared item is one writer's, not a mixture"


def test_compaction_under_writers_loses_nothing(folder_url: str) -> None:
    catalogue = Catalogue(Store(folder_url))
    catalogue.upsert(pa.table({"item_id": ["0"], "n": [0]}))
    done = threading.Event()

    def compact() -> int:
        count = 0
        mine = Catalogue(Store(folder_url))
        while not done.is_set():
            try:
                mine.compact()
                count += 1
            except ConflictError:
                pass
        return count

    with ThreadPoolExecutor(2) as compactors:
        counts = [compactors.submit(compact) for _ in range(2)]
        try:
            for n in range(1, 21):
                catalogue.upsert(pa.table({"item_id": [str(n), "0"], "n": [n, n]}))
                assert len(catalogue.read().items) == n + 1
        finally:
            done.set()
    assert sum(count.result() for count in counts) > 0
    assert rows_by_id(catalogue) == {"0": {"n": 20}, **{str(n): {"n": n} for n in range(1, 21)}}


def test_compaction_gives_way_to_a_foreign_writer(folder_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    catalogue = Catalogue(Store(folder_url))
    catalogue.upsert(pa.table({"item_id": ["1"], "n": [1]}))
    catalogue.compact()
    catalogue.upsert(pa.table({"item_id": ["2"], "n": [2]}))
    url = f"{folder_url}/catalog/items"
    read = catalogue.read

    def read_then_foreign_write() -> object:
        snapshot = read()
        write_deltalake(url, pa.table({"item_id": ["3"], "n": [3]}), mode="append")
        return snapshot

    monkeypatch.setattr(catalogue, "read", read_then_foreign_write)
    with pytest.raises(ConflictError, match="changed by somebody else"):
        catalogue.compact()
    monkeypatch.undo()
    assert rows_by_id(catalogue) == {"1": {"n": 1}, "2": {"n": 2}, "3": {"n": 3}}


def test_several_edits_in_one_commit_keep_their_order(store_url: str) -> None:
    catalogue = Catalogue(Store(store_url))
    outcomes = catalogue.commit(
        [
            Delete(["early"]),
            Upsert(pa.table({"item_id": ["a", "b", "a", "c"], "n": [1, 1, 2, 1]})),
            Delete(["b", "b", "x"]),
            Upsert(pa.table({"item_id": ["c", "d"], "n": ["text", "text"]})),
            Delete(["", "a"]),
            Upsert(pa.table({"item_id": ["b", "e"], "n": [3, 3], "m": ["new", None]})),
            Delete(["c"]),
        ]
    )
    early, first, second, wrong_type, wrong_id, third, last = outcomes
    assert isinstance(early, NotFoundError)
    assert first == UpsertReport(4, 3, 1, "0.1")
    assert second == DeleteReport(2, "0.1")
    assert isinstance(wrong_type, InvalidInputError)
    assert "column 'n': its type is string, in the catalogue it is int64" in str(wrong_type)
    assert isinstance(wrong_id, InvalidInputError)
    assert "row 0: the id is empty" in str(wrong_id)
    assert third == UpsertReport(2, 2, 0, "0.1")
    assert last == DeleteReport(1, "0.1")
    assert rows_by_id(catalogue) == {"a": {"n": 2}, "b": {"n": 3, "m": "new"}, "e": {"n": 3}}
    assert catalogue.attribute_types() == {"n": pa.int64(), "m": pa.string()}
    assert catalogue.commit([Delete([""])])[0].__class__ is InvalidInputError
    assert catalogue.version() == "0.1", "nothing was right, so nothing was written"


def test_other_tools_read_what_is_appended(store_url: str) -> None:
    store = Store(store_url)
    catalogue = Catalogue(store)
    moment = datetime.datetime(2020, 1, 2, tzinfo=datetime.UTC)
    rows = {"item_id": ["a", "b"], "n": [1, None], "tags": [["x"], []], "at": [moment, None]}
    for _ in range(3):
        catalogue.upsert(pa.table(rows))
    catalogue.delete(["b"])
    changes = DeltaTable(f"{store_url}/catalog/changes", storage_options=store.storage_options)
    assert changes.version() == 3
    rows_read = pa.table(changes.scan()).to_pylist()
    assert len(rows_read) == 7
    deletion = {"_op": "delete", "_row": 0, "item_id": "b", "n": None, "tags": None, "at": None}
    assert [row for row in rows_read if row["_op"] == "delete"] == [deletion]
    assert [row["at"] for row in rows_read if row["item_id"] == "a"] == [moment] * 3
    assert len(changes.file_uris()) == 4


def test_a_writer_sees_columns_that_another_one_added(folder_url: str) -> None:
    first, second = Catalogue(Store(folder_url)), Catalogue(Store(folder_url))
    first.upsert(pa.table({"item_id": ["a"], "n": [1]}))
    second.upsert(pa.table({"item_id": ["b"], "n": [1]}))
    first.upsert(pa.table({"item_id": ["c"], "m": [1.5]}))
    with pytest.raises(InvalidInputError, match="column 'm': its type is string, in the catalogue it is double"):
        second.upsert(pa.table({"item_id": ["d"], "m": ["x"]}))
    second.upsert(pa.table({"item_id": ["d"], "m": [2]}))
    assert rows_by_id(first) == {"a": {"n": 1}, "b": {"n": 1}, "c": {"m": 1.5}, "d": {"m": 2.0}}


def test_a_table_that_asks_more_of_its_writers(folder_url: str) -> None:
    catalogue = Catalogue(Store(folder_url))
    catalogue.upsert(pa.table({"item_id": ["a"], "n": [1]}))
    DeltaTable(f"{folder_url}/catalog/changes").alter.add_constraint({"small": "n < 10"})
    catalogue.upsert(pa.table({"item_id": ["b"], "n": [2]}))
    with pytest.raises(Exception, match="validation"):
        catalogue.upsert(pa.table({"item_id": ["c"], "n": [20]}))
    assert rows_by_id(catalogue) == {"a": {"n": 1}, "b": {"n": 2}}


_KILLED_WRITER = """
import os, sys
import pyarrow as pa
from towers.catalogue import Catalogue
from towers.store import Store

catalogue = Catalogue(Store(sys.argv[1]))
print("ready", flush=True)
step = 0
while True:
    catalogue.upsert(pa.table({"item_id": [f"{step}-{part}" for part in range(50)], "step": [step] * 50}))
    if step % 3 == 0:
        catalogue.compact()
    step += 1
"""


@pytest.mark.parametrize("delay_s", [0.05, 0.15, 0.25])
def test_kill_9_leaves_whole_commits(folder_url: str, delay_s: float) -> None:
    with subprocess.Popen(tied_python(_KILLED_WRITER, folder_url), stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
        threading.Event().wait(delay_s)
        writer.kill()
    catalogue = Catalogue(Store(folder_url))
    version = catalogue.version()
    if version is not None:
        items = catalogue.read().items
        steps = sorted(set(items["step"].to_pylist()))
        assert steps == list(range(len(steps)))
        assert items.num_rows == 50 * len(steps)
    catalogue.upsert(toy_items(3))
    catalogue.compact()
    assert {"1", "2", "3"} <= rows_by_id(catalogue).keys()
