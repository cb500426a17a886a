"""What `--auto` chooses, and what comes of it."""

import io
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from towers.checkpoint import CheckpointStore
from towers.errors import InvalidInputError
from towers.store import Store
from trainer import gates
from trainer.auto import Shape, choose, completed, shape_of
from trainer.chosen import write_chosen
from trainer.config import parse_config
from trainer.data import Entities, TrainingData, order_by_time, read_data, split_by_time
from trainer.evaluate import Ranking
from trainer.published import open_published
from trainer.questions import ask
from trainer.run import TrainingReport, train

DATA: dict[str, Any] = {"data": {"interactions": "interactions.parquet", "items": "items.parquet"}}
FILMS = Shape(
    num_users=6000,
    num_items=3400,
    num_examples=980_000,
    typical_history=90,
    long_history=550,
    repeat_share=0.0,
    tie_share=0.5,
    targets_per_query=1.0,
    num_validation=500,
)
PLACES = replace(FILMS, num_users=30_000, num_items=41_000, tie_share=1.0, targets_per_query=7.3, num_validation=0)
SHOP = replace(FILMS, num_items=2_000_000, num_examples=300_000_000, typical_history=3, repeat_share=0.2)
TOY = replace(FILMS, num_items=40, num_examples=480, typical_history=8, long_history=10)


def chosen(shape: Shape, settings: dict[str, Any] | None = None, has_encoder: bool = True) -> dict[str, Any]:
    """Place, joined by points, to value."""
    return {".".join(choice.place): choice.value for choice in choose(shape, settings or DATA, has_encoder)}


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (
            FILMS,
            {
                "features.history.pooling": "transformer",
                "features.history.max_length": 200,
                "model.dim": 64,
                "training.batch_size": 4096,
                "training.epochs": 20,
                "training.negatives": "all",
                "training.mask_known_positives": False,
                "training.learning_rate": 0.001,
                "training.table_learning_rate": 0.003,
                "training.learn_temperature": True,
                "training.schedule": "cosine",
            },
        ),
        (
            PLACES,
            {
                "features.history.pooling": "mean",
                "features.history.max_length": 550,
                "training.negatives": "all",
                "training.history_share": 0.5,
                "training.learning_rate": 0.01,
                "training.schedule": "linear",
            },
        ),
        (
            SHOP,
            {
                "features.history.pooling": "mean",
                "model.dim": 128,
                "training.batch_size": 4096,
                "training.epochs": 5,
                "training.negatives": "batch",
                "training.uniform_negatives": 4096,
                "training.logq": "counts",
                "evaluation.exclude_seen": False,
            },
        ),
        (
            TOY,
            {
                "features.history.max_length": 10,
                "model.dim": 32,
                "model.embedding_dim": 32,
                "training.batch_size": 64,
                "training.epochs": 50,
                "training.warmup_steps": 20,
            },
        ),
    ],
)
def test_the_shape_of_the_data_decides(shape: Shape, expected: dict[str, Any]) -> None:
    found = chosen(shape)
    assert {name: found.get(name) for name in expected} == expected


def test_whom_it_asks_decides_what_towers_read() -> None:
    def names(shape: Shape, settings: dict[str, Any], has_encoder: bool = True) -> list[tuple[str, str | None]]:
        declared = chosen(shape, settings, has_encoder)["features"]
        return [(feature["name"], feature.get("encoder")) for feature in declared]

    assert names(FILMS, DATA) == [("history", None), ("item_id", None)]
    assert names(PLACES, DATA) == [("history", None), ("item_id", None)]
    texts = {"data": {**DATA["data"], "layout": "beir", "users": "queries.jsonl"}}
    assert names(PLACES, texts) == [("text", "all-MiniLM-L6-v2"), ("document", "all-MiniLM-L6-v2")]
    assert names(PLACES, texts, has_encoder=False) == [("text", None), ("document", None)]
    assert chosen(PLACES, texts)["model.dim"] == 384
    assert chosen(PLACES, texts)["training.chunk_size"] == 16


def test_few_interactions_are_not_to_be_known_by_heart() -> None:
    """A transformer has dropout of its own."""
    assert chosen(TOY).get("model.dropout") is None
    assert chosen(replace(TOY, tie_share=1.0))["model.dropout"] == 0.3
    assert chosen(replace(TOY, tie_share=1.0, num_examples=20_000)).get("model.dropout") is None


def test_two_histories_are_not_read_by_transformers() -> None:
    """Beside another one each interaction would go through it by itself."""
    names = ("history", "clicks")
    features = [{"name": "item_id", "owner": "item", "kind": "categorical"}]
    features += [{"name": name, "owner": "query", "kind": "sequence", "items": "item_id"} for name in names]
    found = chosen(FILMS, {**DATA, "features": features})
    assert [found[f"features.{name}.pooling"] for name in names] == ["mean", "mean"]


GIVEN: list[dict[str, Any]] = [
    {},
    {"model": {"dim": 8, "matryoshka_dims": [2, 4]}},
    {"model": {"matryoshka_dims": [64, 100]}},
    {"model": {"dim": 9}},
    {"model": {"embedding_dim": 23}, "evaluation": {"metric": "recall_at_20"}},
    {"evaluation": {"ks": [5]}},
    {"training": {"symmetric": True}},
    {"training": {"score_margin": 0.1, "batch_size": 100}},
    {"training": {"mask_known_positives": False, "epochs": 2}},
    {"training": {"mask_known_positives": True}},
    {"training": {"history_share": 0.7}},
    {"training": {"negatives": "all"}},
    {"training": {"negatives": "batch"}},
    {"training": {"memory": 100}},
    {"training": {"hard_negatives": 2}},
    {"training": {"uniform_negatives": 7, "logq": "none"}},
    {"training": {"logq": "streaming"}},
]


@pytest.mark.parametrize("shape", [FILMS, PLACES, SHOP, TOY])
@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("layout", [{}, {"layout": "beir", "users": "queries.jsonl"}])
def test_what_is_given_stays_and_the_rest_goes_with_it(
    shape: Shape, given: dict[str, Any], layout: dict[str, str]
) -> None:
    settings = {"data": {**DATA["data"], **layout}, **given}
    whole = completed(settings, choose(shape, settings, has_encoder=True))
    parse_config(whole, Path("some.toml"))
    for table, values in given.items():
        assert values.items() <= whole[table].items()


def test_impressions_asked_for_are_drawn_beside_a_batch() -> None:
    """Against all items they would be refused."""
    settings = {"data": {**DATA["data"], "label_column": "label"}, "training": {"shown_negatives": 2}}
    whole = completed(settings, choose(FILMS, settings, has_encoder=True))
    assert (whole["training"]["negatives"], whole["training"]["shown_negatives"]) == ("batch", 2)
    parse_config(whole, Path("some.toml"))


def test_a_shape_is_counted() -> None:
    log = order_by_time(
        np.array([0, 0, 0, 0, 0, 1, 1, 1, 2]),
        np.array([4, 3, 4, 2, 1, 0, 1, 2, 3]),
        np.array([1.0, 1.0, 2.0, 3.0, 4.0, 5.0, 5.0, 5.0, 9.0]),
    )
    entities = Entities(["a", "b", "c", "d", "e", "f"], {}, "some")
    assert shape_of(TrainingData(entities, entities, log, split_by_time(log), ())) == Shape(
        num_users=3,
        num_items=6,
        num_examples=5,
        typical_history=1,
        long_history=5,
        repeat_share=pytest.approx(1 / 9),
        tie_share=0.5,
        targets_per_query=1.0,
        num_validation=2,
    )


def write_world(folder: Path, users: list[int], items: list[int], moments: list[int], num_items: int) -> None:
    table = pa.table({"user_id": users, "item_id": items, "timestamp": moments})
    pq.write_table(table, folder / "interactions.parquet")
    pq.write_table(pa.table({"item_id": range(num_items)}), folder / "items.parquet")


@pytest.fixture
def chains(tmp_path: Path) -> Path:
    """80 users who go through 40 items along one circle, and leap elsewhere now and then."""
    random = np.random.default_rng(0)
    following = random.permutation(40)
    users, items, moments = [], [], []
    for user in range(80):
        item, seen = int(random.integers(40)), set[int]()
        for moment in range(12):
            while item in seen:
                item = int(random.integers(40))
            seen.add(item)
            users.append(user)
            items.append(item)
            moments.append(moment)
            item = int(following[item] if random.random() < 0.85 else random.integers(40))
    write_world(tmp_path, users, items, moments, 40)
    return tmp_path


def trained(folder: Path, path: Path) -> TrainingReport:
    report = train(path, store=str(folder / "store"), resume=False, console=Console(file=io.StringIO()))
    assert report is not None
    return report


def test_a_log_in_order_is_learned_from_its_tables_alone(chains: Path) -> None:
    """Better than the neighbours of what users had. What is chosen is a file: to read, to edit, to train again."""
    config = chains / "chains.toml"
    config.write_text(
        'run_folder = "run"\n\n[data]  # Of the toy.\ninteractions = "interactions.parquet"\nitems = "items.parquet"\n'
        "\n[training]\nepochs = 20\n"
    )
    screen = io.StringIO()
    path = write_chosen(config, None, Console(file=screen, width=160))
    assert path == chains / "chains.auto.toml"
    written = path.read_text()
    assert "[data]  # Of the toy." in written
    assert 'negatives = "all" # 40 items: a step can afford the exact softmax' in written
    settings = tomllib.loads(written)
    assert settings["training"]["epochs"] == 20
    assert [feature["name"] for feature in settings["features"]] == ["history", "item_id"]
    [line] = [line for line in screen.getvalue().splitlines() if "[training] negatives" in line]
    assert '"all"' in line
    assert "a step can afford the exact softmax" in line

    report = trained(chains, path)
    for baseline in ("popularity", "item_knn"):
        assert report.metrics["test.recall_at_10"] > report.metrics[f"test.{baseline}_recall_at_10"] + 0.05

    assert write_chosen(config, None, Console(file=screen)).read_text() == written
    path.write_text(written.replace("dim = 32", "dim = 16"))
    with pytest.raises(InvalidInputError, match=r"chains\.auto\.toml: is there and differs .* train it as it is"):
        write_chosen(config, None, Console(file=screen))
    assert "dim = 16" in path.read_text()


def test_a_log_without_order_is_learned_as_well_as_by_hand(world: Path) -> None:
    table = pq.read_table(world / "interactions.parquet")
    pq.write_table(
        table.set_column(2, "timestamp", pa.array([1_700_000_000] * len(table))), world / "interactions.parquet"
    )
    by_hand = (world / "toy.toml").read_text()
    (world / "auto.toml").write_text(by_hand[: by_hand.index("[model]")].replace('"run"', '"auto"', 1))
    path = write_chosen(world / "auto.toml", None, Console(file=io.StringIO()))
    assert tomllib.loads(path.read_text())["training"]["history_share"] == 0.5
    versions = [trained(world, world / "toy.toml").version, trained(world, path).version]
    new, former = (ranking(world, version) for version in reversed(versions))
    [judgement] = gates.judge(new, former, "recall_at_10", 0.0, [], {})
    assert judgement.high >= 0, judgement
    assert judgement.value > 0.8


def ranking(folder: Path, version: int) -> Ranking:
    towers = open_published(CheckpointStore(Store(str(folder / "store"))), version)
    config = towers.config()
    tables = read_data(config.data, towers.fitted.schema, folder)
    questions = ask(tables.log, tables.split.test, exclude_seen=True)
    return gates.live_ranking(towers, config.data, folder, questions, [10])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[data]\nitems = 'items.parquet'", ["[data] interactions: missing"]),
        ("[data]\nitems = 'items.parquet'\ninteractions = 'none.parquet'", ["none.parquet: no such file"]),
        (
            "model = 3\n[data]\nitems = 'items.parquet'\ninteractions = 'i'",
            ["some.toml: [model]", "should be an object"],
        ),
        (
            "[data]\nitems = 'items.parquet'\ninteractions = 'interactions.parquet'\n[training]\nepoch = 3",
            ["some.toml: [training] epoch: unknown key; did you mean 'epochs'?"],
        ),
    ],
)
def test_mistakes_are_said_of_the_users_own_file(chains: Path, text: str, told: list[str]) -> None:
    (chains / "some.toml").write_text(text)
    with pytest.raises(InvalidInputError) as refusal:
        write_chosen(chains / "some.toml", None, Console(file=io.StringIO()))
    for words in told:
        assert words in str(refusal.value)
    assert not (chains / "some.auto.toml").exists()
