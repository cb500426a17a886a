import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from taken_steps import take_steps
from torch import Tensor
from torch.nn import functional

from towers.checkpoint import CheckpointStore
from towers.store import Store
from trainer.config import TrainerConfig
from trainer.data import read_data
from trainer.evaluate import evaluate
from trainer.judge import evaluate_version
from trainer.matryoshka import prefix
from trainer.model import TwoTowers
from trainer.published import open_published
from trainer.questions import Questions, ask
from trainer.run import TrainingReport, prepare, train

NUM_KINDS, OF_EACH_KIND, NUM_USERS, NUM_LIKED = 16, 15, 320, 8
CONFIG = """
run_folder = "run"

[data]
interactions = "interactions.parquet"
items = "items.parquet"

[[features]]
name = "user_id"
owner = "query"
kind = "categorical"

[[features]]
name = "item_id"
owner = "item"
kind = "categorical"

[model]
dim = 16
embedding_dim = 16

[training]
batch_size = 256
epochs = 10
learning_rate = 0.02
negatives = "all"
"""


@pytest.fixture
def kinds(tmp_path: Path) -> Path:
    """A world of as many kinds as embeddings have dimensions: a few dimensions tell them apart only if they must."""
    random = np.random.default_rng(7)
    num_items = NUM_KINDS * OF_EACH_KIND
    own = [np.arange(user % NUM_KINDS, num_items, NUM_KINDS) for user in range(NUM_USERS)]
    table = {
        "user_id": np.repeat(np.arange(NUM_USERS), NUM_LIKED),
        "item_id": np.concatenate([random.choice(items, NUM_LIKED, replace=False) for items in own]),
        "timestamp": np.tile(np.arange(NUM_LIKED), NUM_USERS),
    }
    pq.write_table(pa.table(table), tmp_path / "interactions.parquet")
    pq.write_table(pa.table({"item_id": np.arange(num_items)}), tmp_path / "items.parquet")
    return tmp_path


def trained(folder: Path, model: str, export: str = "", resume: bool = False) -> TrainingReport:
    config = CONFIG.replace("dim = 16\n", f"dim = 16\n{model}\n", 1)
    (folder / "kinds.toml").write_text(f"{config}\n[export]\n{export}\n")
    console = Console(file=io.StringIO())
    report = train(folder / "kinds.toml", store=str(folder / "store"), resume=resume, console=console)
    assert report is not None
    return report


def embeddings(folder: Path, version: int) -> tuple[Questions, Tensor, Tensor]:
    """What is asked at the end, and the published embeddings of queries and items."""
    towers = open_published(CheckpointStore(Store(str(folder / "store"))), version)
    tables = read_data(towers.config().data, towers.fitted.schema, folder)
    questions = ask(tables.log, tables.split.test, exclude_seen=True)
    return questions, *towers.embed(tables, questions.positions)


def recall_of_prefix(folder: Path, version: int, width: int) -> float:
    questions, queries, items = embeddings(folder, version)
    scores = functional.normalize(queries[:, :width]) @ functional.normalize(items[:, :width]).T
    figures = evaluate(lambda start, stop: scores[start:stop], questions.targets, questions.excluded, [10])
    return figures["recall_at_10"]


def test_a_prefix_is_as_long_as_the_whole() -> None:
    embeddings = torch.tensor([[0.6, 0.0, 0.8], [0.0, 0.0, 1.0]])
    assert prefix(embeddings, 3) is embeddings
    torch.testing.assert_close(prefix(embeddings, 2), torch.tensor([[1.0, 0.0], [0.0, 0.0]]))


def test_towers_that_are_cut_give_the_prefix(world: Path, configure: Callable[..., TrainerConfig]) -> None:
    config = configure()
    prepared = prepare(config, world)
    model = TwoTowers(prepared.fitted.schema, prepared.encoder.query, prepared.encoder.item, config.model).eval()
    whole = model.item(prepared.items)
    before = model.item.projection[-1].weight
    model.item.cut(5)
    torch.testing.assert_close(model.item(prepared.items), prefix(whole, 5))
    assert before.shape[0] == 12


def test_the_loss_is_the_mean_over_all_widths(world: Path, configure: Callable[..., TrainerConfig]) -> None:
    changes = {"model__dropout": 0.0, "training__negatives": "all", "training__mask_known_positives": False}
    config = configure(**changes, model__matryoshka_dims=[2, 7])
    figures, _ = take_steps(config, world, num_rows=20, num_steps=1)
    prepared = prepare(config, world)
    torch.manual_seed(0)
    model = TwoTowers(prepared.fitted.schema, prepared.encoder.query, prepared.encoder.item, config.model)
    with torch.no_grad():
        queries, items = model.query(prepared.examples.queries.batch(torch.arange(20))), model.item(prepared.items)
    losses = [
        functional.cross_entropy(
            functional.normalize(queries[:, :width]) @ functional.normalize(items[:, :width]).T / 0.1,
            prepared.examples.positives[:20],
        )
        for width in (2, 7, 12)
    ]
    assert figures.loss == pytest.approx(float(sum(losses)) / 3, rel=1e-5)


def test_few_dimensions_find_what_they_are_trained_to_find(kinds: Path) -> None:
    """Then the same run is published once more at that size, without training."""
    plain = trained(kinds, "")
    assert recall_of_prefix(kinds, plain.version, 4) < 0.5
    nested = trained(kinds, "matryoshka_dims = [4]")
    assert nested.metrics["test.two_towers_first_4_recall_at_10"] > 0.9
    assert nested.metrics["test.two_towers_first_4_recall_at_10"] == recall_of_prefix(kinds, nested.version, 4)
    assert nested.metrics["test.recall_at_10"] > plain.metrics["test.recall_at_10"] - 0.05
    judged = evaluate_version(CheckpointStore(Store(str(kinds / "store"))), nested.version, kinds).comparison
    for name in ("two_towers", "two_towers_first_4"):
        key = f"test.{name}_recall_at_10".replace("two_towers_recall", "recall")
        assert judged.figures[name]["recall_at_10"].value == nested.metrics[key]

    small = trained(kinds, "matryoshka_dims = [4]", "dim = 4", resume=True)
    assert small.version == nested.version + 1
    assert CheckpointStore(Store(str(kinds / "store"))).manifest(small.version).dim == 4
    for whole, cut in zip(embeddings(kinds, nested.version)[1:], embeddings(kinds, small.version)[1:], strict=True):
        torch.testing.assert_close(cut, functional.normalize(whole[:, :4]))
    assert small.metrics["test.recall_at_10"] == nested.metrics["test.two_towers_first_4_recall_at_10"]
    assert not any("first" in name for name in small.metrics)
    assert trained(kinds, "matryoshka_dims = [4]", "dim = 4", resume=True).version == small.version
