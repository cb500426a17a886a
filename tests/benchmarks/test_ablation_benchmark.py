import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from benchmarks.quality import ablation
from benchmarks.quality.ablation import AGAIN, FULL, METRICS, Length
from benchmarks.quality.runs import changed, read_settings
from trainer.config import parse_config

SETTINGS = read_settings(Path(ablation.__file__).with_suffix(".toml"))
NUM_USERS, NUM_ITEMS = 30, 24


@pytest.fixture
def films(tmp_path: Path) -> Path:
    """Tables like those of MovieLens-1M: odd users like odd films, the last users have no times."""
    folder = tmp_path / "films"
    folder.mkdir()
    random = np.random.default_rng(0)
    rows = [
        (user, int(item), None if user >= NUM_USERS - 5 else 100 * user + moment)
        for user in range(NUM_USERS)
        for moment, item in enumerate(2 * random.permutation(NUM_ITEMS // 2)[:9] + user % 2)
    ]
    users, items, moments = zip(*rows, strict=True)
    log = pa.table(
        {
            "user_id": pa.array(users, pa.int32()),
            "item_id": pa.array(items, pa.int32()),
            "timestamp": pa.array(moments, pa.int32()),
            "row": pa.array(range(len(rows)), pa.int32()),
        }
    )
    pq.write_table(log, folder / "interactions.parquet")
    pq.write_table(
        pa.table(
            {
                "item_id": range(NUM_ITEMS),
                "title": [f"Film {item}" for item in range(NUM_ITEMS)],
                "year": [1950 + item for item in range(NUM_ITEMS)],
                "genres": [["odd" if item % 2 else "even"] for item in range(NUM_ITEMS)],
            }
        ),
        folder / "items.parquet",
    )
    pq.write_table(
        pa.table(
            {
                "user_id": range(NUM_USERS),
                "gender": ["F" if user % 3 else "M" for user in range(NUM_USERS)],
                "age": [18 + user % 4 for user in range(NUM_USERS)],
                "occupation": [user % 5 for user in range(NUM_USERS)],
            }
        ),
        folder / "users.parquet",
    )
    return folder


def test_the_newest_of_some_users_are_kept(films: Path, tmp_path: Path) -> None:
    ablation.write_tables(films, Length(num_users=7, num_newest=4, epochs=1), tmp_path)
    kept = _of_users(tmp_path)
    whole = _of_users(films)
    assert len(kept) == 7
    for user, log in kept.items():
        assert log == whole[user][-4:], "in the order of their times"


def _of_users(folder: Path) -> dict[int, list[tuple[int, int]]]:
    """Time and item of each user's interactions, oldest first."""
    logs: dict[int, list[tuple[int, int]]] = {}
    for row in pq.read_table(folder / "interactions.parquet").to_pylist():
        if row["timestamp"] is not None:
            logs.setdefault(row["user_id"], []).append((row["timestamp"], row["item_id"]))
    return {user: sorted(log) for user, log in logs.items()}


def test_each_variant_is_everything_but_one_thing() -> None:
    found = ablation.variants(SETTINGS)
    whole = parse_config(found.pop(FULL), Path("all.toml"))
    assert len(found) == 11
    for name, settings in found.items():
        part = parse_config(settings, Path("part.toml"))
        assert (part.model, part.evaluation, part.data) == (whole.model, whole.evaluation, whole.data)
        differing = [key for key, value in part.training if value != getattr(whole.training, key)]
        assert len(differing) + (part.features != whole.features) == 1, name


def test_what_a_part_is_worth_is_told_with_an_interval() -> None:
    whole = np.column_stack([np.linspace(0, 1, 200), np.ones(200)])
    found = ablation.worth(whole, whole - [0.25, 0.0])
    assert list(found) == list(METRICS)
    assert found["ndcg_at_10"].lost == pytest.approx(0.25)
    assert found["ndcg_at_10"].low == pytest.approx(0.25)
    noise = np.random.default_rng(0).normal(size=(200, 2))
    uncertain = ablation.worth(whole, whole + noise)["recall_at_10"]
    assert uncertain.low < uncertain.lost < uncertain.high
    assert uncertain.value - 1 == pytest.approx(-uncertain.lost)


def test_parts_are_trained_and_told(films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whole and part in one process each; going on from what is there trains nothing again and finds the same."""
    tables = tmp_path / "tables"
    tables.mkdir()
    ablation.write_tables(films, Length(num_users=25, num_newest=9, epochs=1), tables)
    small = changed(
        SETTINGS,
        {
            "model": {"dim": 8, "embedding_dim": 8, "transformer_blocks": 1},
            "training": {
                **SETTINGS["training"],
                "epochs": 1,
                "batch_size": 32,
                "warmup_steps": 1,
                "uniform_negatives": 4,
                "memory": 8,
                "hard_negatives_ranks": [1, 5],
            },
        },
    )
    chosen = {name: ablation.variants(small)[name] for name in (FULL, "no item features")}
    console = Console(width=120)
    found = ablation.measure(chosen, [0], tables, tmp_path / "runs", console)
    assert list(found) == [FULL, "no item features", AGAIN]
    assert found[FULL]["recall_at_10"].lost == 0
    assert any(worth.lost != 0 for worth in found[AGAIN].values())
    assert "epoch   1" in capsys.readouterr().out
    assert ablation.measure(chosen, [0], tables, tmp_path / "runs", console) == found
    assert "epoch   1" not in capsys.readouterr().out
    console.print(ablation.shown(found))
    table = capsys.readouterr().out
    assert "no item features" in table
    assert json.loads(ablation.as_json(found))[FULL]["ndcg_at_10"]["lost"] == 0
