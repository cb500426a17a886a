"""Deleting items and looking at the catalogue."""

from pathlib import Path

import pyarrow as pa
import pytest
from command_outcome import Twotower

from towers.catalogue import Catalogue
from towers.store import Store


@pytest.fixture
def store(tmp_path: Path) -> str:
    """A catalogue of four items, three commits after its last compaction."""
    url = str(tmp_path / "store")
    catalogue = Catalogue(Store(url))
    catalogue.upsert(pa.table({"item_id": ["a", "b", "c"], "price": [1.5, 2.0, None]}))
    catalogue.compact()
    catalogue.upsert(pa.table({"item_id": ["d", "é"], "tags": [["x", "y"], None]}))
    catalogue.delete(["c"])
    catalogue.upsert(pa.table({"item_id": ["a"], "price": [9.0]}))
    return url


def test_delete_by_name_and_from_a_file(twotower: Twotower, store: str, tmp_path: Path) -> None:
    outcome = twotower("catalog", "delete", "a", "b", "a", "nothing", "--store", store)
    assert (outcome.exit_code, outcome.err) == (0, "")
    assert outcome.out == f"3 different ids deleted; catalogue version {version_of(store)}\n"
    ids = tmp_path / "ids.txt"
    ids.write_text("d\n\né", encoding="utf-8")
    outcome = twotower("catalog", "delete", "--file", str(ids), "--store", store)
    assert outcome.exit_code == 0, outcome.err
    assert Catalogue(Store(store)).read().items.num_rows == 0


def version_of(store: str) -> str | None:
    return Catalogue(Store(store)).version()


@pytest.mark.parametrize(
    ("arguments", "exit_code", "words"),
    [
        (["delete"], 2, "name the items to be deleted, or a file with their ids"),
        (["delete", "--file", "no.txt"], 2, "no.txt: it cannot be read"),
        (["delete", "a", ""], 2, "the id is empty"),
        (["show", "c"], 1, "has no item 'c'"),
    ],
)
def test_what_is_wrong_is_one_line(
    twotower: Twotower, store: str, arguments: list[str], exit_code: int, words: str
) -> None:
    before = version_of(store)
    outcome = twotower("catalog", *arguments, "--store", store)
    assert (outcome.exit_code, outcome.out, outcome.err.count("\n")) == (exit_code, "", 1)
    assert words in outcome.err
    assert version_of(store) == before


def test_nothing_loaded(twotower: Twotower, tmp_path: Path) -> None:
    for arguments in (["show"], ["show", "a"], ["delete", "a"]):
        outcome = twotower("catalog", *arguments, "--store", str(tmp_path / "store"))
        assert outcome.exit_code == 1
        assert "twotower catalog load" in outcome.err


def test_show_the_catalogue(twotower: Twotower, store: str) -> None:
    shown = twotower("catalog", "show", "--json", "--store", store).json
    assert shown["catalogue_version"] == version_of(store)
    assert shown["num_items"] == 4
    assert shown["attributes"] == {"price": "double", "tags": "list<item: string>"}
    assert shown["commits_since_compaction"] == 3
    changes = [(change["upserts"], change["deletes"]) for change in shown["last_changes"]]
    assert changes == [(1, 0), (0, 1), (2, 0), (3, 0)]
    assert all(change["created"].endswith("+00:00") for change in shown["last_changes"])
    outcome = twotower("catalog", "show", "--store", store)
    assert outcome.exit_code == 0, outcome.err
    for words in (f"catalogue version {version_of(store)}: 4 items", "3 commits since the last", "price", "double"):
        assert words in outcome.out


def test_show_an_item(twotower: Twotower, store: str) -> None:
    assert twotower("catalog", "show", "a", "--json", "--store", store).json == {
        "item_id": "a",
        "price": 9.0,
        "tags": None,
    }
    outcome = twotower("catalog", "show", "d", "--store", store)
    assert outcome.exit_code == 0, outcome.err
    assert "x, y" in outcome.out
