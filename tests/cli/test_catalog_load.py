"""Items from files into the catalogue."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_outcome import Twotower

import trainer
from cli.catalog import read_items
from towers.catalogue import Catalogue
from towers.errors import InvalidInputError
from towers.store import Store

CONFIGS = Path(trainer.__file__).parent / "configs"


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


def documents(folder: Path) -> Path:
    """Two documents and files that are none."""
    (folder / "guides" / ".cache").mkdir(parents=True)
    (folder / "guides" / "cats.md").write_text("# Cats\n\nThey purr.\nThey sleep.\n")
    (folder / "dogs.txt").write_text("Dogs")
    for name in ("picture.png", "guides/.cache/old.md"):
        (folder / name).write_bytes(b"\xff")
    return folder


def loaded(store: str) -> list[dict[str, str]]:
    return Catalogue(Store(store)).read().items.to_pylist()


CATS_AND_DOGS = [
    {"item_id": "dogs.txt", "title": "Dogs", "text": "", "document": "Dogs"},
    {
        "item_id": "guides/cats.md",
        "title": "Cats",
        "text": "They purr.\nThey sleep.",
        "document": "Cats They purr.\nThey sleep.",
    },
]


def test_a_folder_of_documents(twotower: Twotower, tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    outcome = twotower("catalog", "load", str(documents(tmp_path / "documents")), "--store", store)
    assert (outcome.exit_code, outcome.err) == (0, "")
    assert loaded(store) == CATS_AND_DOGS


def test_a_corpus_and_the_configuration_that_names_it(twotower: Twotower, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"_id": "d1", "title": "Cats", "text": "They purr.", "metadata": {}}\n')
    assert twotower("catalog", "load", str(corpus), "--store", str(tmp_path / "first")).exit_code == 0
    expected = [{"item_id": "d1", "title": "Cats", "text": "They purr.", "document": "Cats They purr."}]
    assert loaded(str(tmp_path / "first")) == expected

    config = CONFIGS / "scifact.toml"
    options = ("--data", str(tmp_path), "--store", str(tmp_path / "second"))
    outcome = twotower("catalog", "load", str(config), *options)
    assert (outcome.exit_code, outcome.err) == (0, "")
    assert loaded(str(tmp_path / "second")) == expected


def test_the_items_of_a_configuration(twotower: Twotower, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "films.csv").write_text("film;title\n7;G\n")
    config = tmp_path / "films.toml"
    config.write_text(
        '[data]\nfolder = "data"\ninteractions = "seen.csv"\nitems = "films.csv"\nitem_id_column = "film"\n'
        'csv_separator = ";"\n[[features]]\nname = "film"\nowner = "item"\nkind = "categorical"\n'
        '[[features]]\nname = "user_id"\nowner = "query"\nkind = "categorical"\n[model]\ndim = 4\n'
    )
    store = str(tmp_path / "store")
    outcome = twotower("catalog", "load", str(config), "--store", store)
    assert (outcome.exit_code, outcome.err) == (0, "")
    assert loaded(store) == [{"item_id": "7", "title": "G"}]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("corpus.jsonl",), "corpus.jsonl: line 1: field 'text' is missing; give a string"),
        (("empty",), "no file in it ends in .txt or .md"),
        (("empty", "--id-column", "x"), "it says by itself what its columns are; leave out --id-column"),
        (("items.csv", "--data", "x"), "leave --data out, or give a CONFIG.toml"),
        (("missing.toml",), "cannot be read"),
        (("items.xml",), "items are read from .parquet, .csv and .jsonl files"),
    ],
)
def test_documents_that_cannot_be_read(
    twotower: Twotower, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("corpus.jsonl").write_text('{"_id": "d1", "title": "Cats"}\n')
    outcome = twotower("catalog", "load", *arguments, "--store", "store")
    assert (outcome.exit_code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert words in outcome.err
