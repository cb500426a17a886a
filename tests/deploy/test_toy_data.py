import runpy
from pathlib import Path

import pyarrow.parquet as pq

from trainer.config import read_config

TOY = runpy.run_path(str(Path(__file__).parents[2] / "deploy" / "toy_data.py"))


def test_the_world_is_learnable_and_its_configurations_are_valid(tmp_path):
    TOY["write_toy_data"](tmp_path)
    interactions = pq.read_table(tmp_path / "interactions.parquet").to_pydict()
    items = pq.read_table(tmp_path / "items.parquet").to_pydict()
    genre_of = dict(zip(items["item_id"], items["genre"], strict=True))
    liked = [
        genre_of[item] == f"genre-{int(user.removeprefix('user-')) // TOY['USERS_PER_GENRE']}"
        for user, item in zip(interactions["user_id"], interactions["item_id"], strict=True)
    ]
    assert abs(sum(liked) / len(liked) - TOY["LOYALTY"]) < 0.05
    users = pq.read_table(tmp_path / "users.parquet").to_pydict()
    assert set(interactions["user_id"]) == set(users["user_id"])
    first, second = read_config(tmp_path / "first.toml"), read_config(tmp_path / "second.toml")
    assert first.model.dim != second.model.dim
    assert first.model.query_hidden != second.model.query_hidden
