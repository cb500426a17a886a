"""Items from files into the catalogue."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_outcome import Twotower

from cli.catalog import read_items
from towers.catalogue import Catalogue
from towers.errors import InvalidInputError
from towers.store import Store


def write(folder: Path, text: str) -> Path:
    path = folder / "items.csv"
    path.write_text(text)
    return path


def test_parquet_duplicates_and_another_load(twotower: Twotower, tmp_path: Path) -> None:
    path, store = tmp_path / "items.parquet", str(tmp_path / "store")
    pq.write_table(pa.table({"item_id": ["b", "a", "b"], "title": ["old", "A", "new"]}), path)
    outcome = twotower("catalog", "load", str(path), "--store", store)
    assert (outcome.exit_code, outcome.err) == (0, "")
    assert "3 rows read, 2 items upserted, 1 duplicate ids (the last row wins)" in outcome.out
    pq.write_table(pa.table({"item_id": ["c", "a"], "title": ["C", "AA"]}), path)
    assert (
        "2 rows read, 2 items upserted, 0 duplicate ids" in twotower("catalog", "load", str(path), "--store", store).out
    )
    assert Catalogue(Store(store)).read().items.to_pylist() == [
        {"item_id": "a", "title": "AA"},
        {"item_id": "b", "title": "new"},
        {"item_id": "c", "title": "C"},
    ]


def test_another_id_column(twotower: Twotower, tmp_path: Path) -> None:
    path, store = tmp_path / "items.parquet", str(tmp_path / "store")
    pq.write_table(pa.table({"movie": [7, 8], "title": ["G", "H"]}), path)
    assert twotower("catalog", "load", str(path), "--store", store, "--id-column", "movie").exit_code == 0
    assert Catalogue(Store(store)).read().items["item_id"].to_pylist() == ["7", "8"]


def test_csv_keeps_what_is_written(tmp_path: Path) -> None:
    path = write(
        tmp_path, 'item_id,zip,year,price,title\n007,01234,1995,1.5,"a, b"\n10,99999,,2,"two\nlines"\n11,,1996,,\n'
    )
    assert read_items(path).to_pylist() == [
        {"item_id": "007", "zip": "01234", "year": 1995, "price": 1.5, "title": "a, b"},
        {"item_id": "10", "zip": "99999", "year": None, "price": 2.0, "title": "two\nlines"},
        {"item_id": "11", "zip": None, "year": 1996, "price": None, "title": None},
    ]


def test_csv_with_another_separator(twotower: Twotower, tmp_path: Path) -> None:
    path, store = write(tmp_path, "id|title\n1|A\n"), str(tmp_path / "store")
    outcome = twotower("catalog", "load", str(path), "--store", store, "--id-column", "id", "--separator", "|")
    assert outcome.exit_code == 0, outcome.err
    assert Catalogue(Store(store)).read().items.to_pylist() == [{"item_id": "1", "title": "A"}]


@pytest.mark.parametrize(
    ("text", "id_column", "separator", "words"),
    [
        ("", "item_id", ",", "it cannot be read: Empty CSV file"),
        ("id,title\n1,A\n", "item_id", ",", "there is no column 'item_id'; name the one with the ids by --id-column"),
        ("id,item_id\n1,2\n", "id", ",", "beside 'id' there is a column 'item_id'"),
        ("item_id,title\n1,A,B\n", "item_id", ",", "it cannot be read: CSV parse error"),
        ("item_id\n1\n", "item_id", ",,", "--separator ',,': give one character"),
    ],
)
def test_csv_that_cannot_be_read(tmp_path: Path, text: str, id_column: str, separator: str, words: str) -> None:
    with pytest.raises(InvalidInputError) as failure:
        read_items(write(tmp_path, text), id_column, separator)
    assert words in str(failure.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("item_id,title\n", "no rows"),
        ("item_id,title\n1,A\n,B\n", "row 1: the id is null"),
    ],
)
def test_what_the_catalogue_refuses_is_one_line(twotower: Twotower, tmp_path: Path, text: str, words: str) -> None:
    outcome = twotower("catalog", "load", str(write(tmp_path, text)), "--store", str(tmp_path / "store"))
    assert (outcome.exit_code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert words in outcome.err


def test_damaged_parquet(twotower: Twotower, tmp_path: Path) -> None:
    path = tmp_path / "items.parquet"
    path.write_bytes(b"PAR1 not really PAR1")
    outcome = twotower("catalog", "load", str(path), "--store", str(tmp_path / "store"))
    assert (outcome.exit_code, outcome.err.count("\n")) == (2, 1)
    assert f"error: {path}: it cannot be read: " in outcome.err


def test_compact_keeps_the_catalogue_and_says_so(twotower: Twotower, tmp_path: Path) -> None:
    path, store = write(tmp_path, "item_id,title\na,A\nb,B\n"), str(tmp_path / "store")
    twotower("catalog", "load", str(path), "--store", store)
    before = Catalogue(Store(store)).read()
    outcome = twotower("catalog", "compact", "--store", store)
    assert (outcome.exit_code, outcome.out) == (0, f"catalogue version {before.version} is one snapshot now\n")
    assert Catalogue(Store(store)).read() == before


def test_compact_of_nothing_says_what_to_do(twotower: Twotower, tmp_path: Path) -> None:
    outcome = twotower("catalog", "compact", "--store", str(tmp_path / "store"))
    assert outcome.exit_code == 1
    assert "twotower catalog load" in outcome.err
