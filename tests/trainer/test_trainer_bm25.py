from pathlib import Path

import numpy as np
import pytest

from towers.schema import parse_schema
from trainer import data
from trainer.baselines import baselines
from trainer.bm25 import Texts, bm25_scores, texts_of
from trainer.config import DataConfig
from trainer.evaluate import evaluate
from trainer.questions import ask

SCIFACT = Path(__file__).parents[3] / "shared" / "data" / "scifact"
CLAIM = {"name": "text", "owner": "query", "kind": "text"}
DOCUMENT = {"name": "document", "owner": "item", "kind": "text"}
ITEM = {"name": "item_id", "owner": "item", "kind": "categorical"}
FILES = DataConfig(layout="beir", interactions="qrels_*.parquet", items="corpus.parquet", users="queries.parquet")


def test_scores_are_those_of_the_formula() -> None:
    texts = Texts(users=["running cats", "the", "horse"], items=["a cat runs", "dog runs and runs home", "fish"])
    scores = bm25_scores(texts, np.array([0, 1, 2]))(0, 3).numpy()
    words = [["cat", "run"], ["dog", "run", "run", "home"], ["fish"]]
    mean_length = np.mean([len(document) for document in words])
    for item, document in enumerate(words):
        expected = 0.0
        for word in ("run", "cat"):
            holders = sum(word in other for other in words)
            count = document.count(word)
            norm = 0.9 * (1 - 0.4 + 0.4 * len(document) / mean_length)
            expected += np.log(1 + (3 - holders + 0.5) / (holders + 0.5)) * count / (count + norm)
        assert scores[0, item] == pytest.approx(expected, abs=1e-6)
    assert not scores[1:].any()


def test_without_text_on_both_sides_there_is_nothing_to_search(tmp_path: Path) -> None:
    users = data.Entities(["a"], {"text": ["x"]}, "users")
    items = data.Entities(["i", "j"], {"document": ["y", None], "item_id": ["i", "j"]}, "items")
    log = data.order_by_time(np.zeros(2, dtype=np.int64), np.arange(2), np.zeros(2))
    tables = data.TrainingData(users, items, log, data.split_by_time(log), ())
    assert texts_of(tables, parse_schema([CLAIM, DOCUMENT])) == Texts(["x"], ["y", ""])
    assert texts_of(tables, parse_schema([CLAIM, ITEM])) is None


@pytest.mark.skipif(not SCIFACT.exists(), reason="needs the SciFact files in ../shared")
def test_scifact_is_as_published() -> None:
    schema = parse_schema([CLAIM, DOCUMENT])
    found = data.read_data(FILES, schema, SCIFACT)
    questions = ask(found.log, found.split.test, exclude_seen=True)
    scores = baselines(found.log, found.split.train, questions.positions, 5183, texts_of(found, schema))["bm25"]
    figures = evaluate(scores, questions.targets, questions.excluded, [10])
    assert figures["ndcg_at_10"] == pytest.approx(0.676, abs=0.003)
