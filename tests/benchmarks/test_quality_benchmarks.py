"""The benchmarks of quality on tables of a few users: split, training, going on, the table, the file."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from benchmarks.quality import gowalla, ml1m_sequences, runs

_USERS, _ITEMS, _LENGTH = 40, 30, 12


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data sets, small: users like the items of their own half."""
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(_USERS), _LENGTH)
    items = np.concatenate([rng.permutation(np.arange(user % 2, _ITEMS, 2))[:_LENGTH] for user in range(_USERS)])
    places = np.tile(np.arange(_LENGTH), _USERS)
    folder = tmp_path / "shared"
    for name in ("gowalla", "movielens-1m-sequences", "movielens-1m"):
        (folder / name).mkdir(parents=True)
    pairs = pa.table({"user": users.astype(np.int32), "item": items.astype(np.int32)})
    pq.write_table(pairs.filter(places < _LENGTH - 2), folder / "gowalla" / "train.parquet")
    pq.write_table(pairs.filter(places >= _LENGTH - 2), folder / "gowalla" / "test.parquet")
    split = np.select(
        [places == _LENGTH - 1, (places == _LENGTH - 2) & (users < 5), places == _LENGTH - 2],
        ["test", "validation", "unused"],
        "train",
    )
    sequences = pa.table({"user_id": users, "item_id": items, "position": places, "split": split})
    pq.write_table(sequences, folder / "movielens-1m-sequences" / "sequences.parquet")
    films = {
        "item_id": np.arange(_ITEMS + 1),  # one that nobody saw
        "title": [f"Film {item}" for item in range(_ITEMS + 1)],
        "year": np.arange(1960, 1960 + _ITEMS + 1),
        "genres": [["Drama", "War"][item % 2 :][:1] for item in range(_ITEMS + 1)],
    }
    pq.write_table(pa.table(films), folder / "movielens-1m" / "items.parquet")
    viewers = {
        "user_id": np.arange(_USERS),
        "gender": ["F", "M"] * (_USERS // 2),
        "age": np.full(_USERS, 25),
        "occupation": np.arange(_USERS) % 4,
    }
    pq.write_table(pa.table(viewers), folder / "movielens-1m" / "users.parquet")
    monkeypatch.setattr(runs, "SHARED", folder)
    return folder


def test_gowalla_prints_peers_and_published_rows(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, folder = tmp_path / "figures.json", tmp_path / "runs"
    monkeypatch.setattr(sys, "argv", ["gowalla", "--quick", "--json", str(file), "--runs", str(folder)])
    gowalla.main()
    out = capsys.readouterr().out
    assert re.search(r"SimpleX \(published\) +│ +0\.1872 │ +0\.1557", out)
    for model in ("popularity", "item_knn", "two towers"):
        assert f"\n│ {model} " in out
    (found,) = json.loads(file.read_text())["two towers"]
    assert found["num_targets"] == pq.read_metadata(shared / "gowalla" / "test.parquet").num_rows

    gowalla.main()
    assert "This run is already published as checkpoint 1" in capsys.readouterr().out


def test_gowallas_validation_does_not_know_the_test_interactions(shared: Path, tmp_path: Path) -> None:
    gowalla.write_tables(shared / "gowalla", tmp_path, validate=True)
    asked = pq.read_table(tmp_path / "interactions.parquet")
    assert asked.select(["user_id", "item_id"]).rename_columns(["user", "item"]) == pq.read_table(
        shared / "gowalla" / "train.parquet"
    )
    assert set(asked["split"].to_pylist()) == {"train", "test"}


def test_a_random_split_differs_from_place_to_place_as_by_chance() -> None:
    random = np.random.default_rng(0)
    items = random.integers(2_000, size=100_000)
    is_test = random.random(len(items)) < 0.2
    said = gowalla.drift(items[~is_test], items[is_test])
    assert said.startswith("of all interactions 20."), said
    assert re.search(r"differs (0\.9|1\.0|1\.1) times", said), said
    # Places that came up late are test ones more often.
    is_test = random.random(len(items)) < np.where(items < 200, 0.4, 0.1)
    assert re.search(r"differs [3-9]\.\d times", gowalla.drift(items[~is_test], items[is_test]))


def test_bpr_tells_the_halves_apart(shared: Path, tmp_path: Path) -> None:
    pytest.importorskip("implicit", reason="a peer that is not installed")
    gowalla.write_tables(shared / "gowalla", tmp_path, validate=False)
    recall, _ = gowalla.bpr(tmp_path, 0)
    assert recall > 0.9, "20 of the items are shown, and 10 of them are of the other half"


def test_ml1m_trains_with_and_without_features(shared: Path, tmp_path: Path) -> None:
    ml1m_sequences.write_tables(shared / "movielens-1m-sequences", shared / "movielens-1m", tmp_path)
    assert "unused" not in pq.read_table(tmp_path / "interactions.parquet")["split"].to_pylist()
    assert pq.read_table(tmp_path / "items.parquet").num_rows == _ITEMS
    settings = runs.changed(
        runs.read_settings(Path(ml1m_sequences.__file__).with_suffix(".toml")),
        {
            "model": {"dim": 8, "embedding_dim": 8, "transformer_blocks": 1},
            "training": {"epochs": 1, "batch_size": 64, "warmup_steps": 1},
        },
    )
    found = ml1m_sequences.measure(settings, [3], tmp_path, tmp_path / "runs", Console(quiet=True))
    assert list(found) == ["history alone", "with features"]
    for comparisons in found.values():
        assert [comparison.num_queries for comparison in comparisons] == [_USERS]
    trained = (tmp_path / "runs" / "ml1m-sequences" / "with-features-3" / "config.toml").read_text()
    assert "seed = 3" in trained
    assert 'name = "occupation"' in trained


def test_seeds_are_shown_as_mean_and_spread() -> None:
    assert runs.mean_and_spread([0.1]) == "0.1000"
    assert runs.mean_and_spread([0.1, 0.2, 0.3]) == "0.2000 ± 0.1000"


def test_settings_change_and_leave_out() -> None:
    settings = {"training": {"epochs": 3, "seed": 1}, "model": {"dim": 4}}
    assert runs.changed(settings, {"training": {"seed": None, "epochs": 9}, "export": {"int8": True}}) == {
        "training": {"epochs": 9},
        "model": {"dim": 4},
        "export": {"int8": True},
    }


def test_data_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "SHARED", tmp_path)
    with pytest.raises(SystemExit, match="gowalla: not there"):
        runs.folder_of("gowalla")
