"""From documents and pairs to a running service by one configuration file, and what the service returns, judged."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from command_outcome import Twotower
from quick_stack import quick_stack

CONFIG = """
run_folder = "run"
[data]
layout = "beir"
items = "documents"
users = "queries.jsonl"
interactions = "qrels/*.tsv"
[[features]]
name = "text"
owner = "query"
kind = "text"
hash_buckets = 500
[[features]]
name = "document"
owner = "item"
kind = "text"
hash_buckets = 500
[model]
dim = 16
[training]
batch_size = 16
epochs = 3
learning_rate = 0.01
[evaluation]
ks = [5, 20]
metric = "ndcg_at_5"
"""
WORDS = ["red", "green", "blue", "apple", "leaf", "sky", "fruit", "tree", "cloud", "ripe", "tall", "wide"]


@pytest.fixture
def search(tmp_path: Path) -> Path:
    """Forty documents of four words, and sixty queries of two of a document's words."""
    generator = np.random.default_rng(0)
    texts = [[WORDS[word] for word in generator.choice(len(WORDS), 4, replace=False)] for _ in range(40)]
    (tmp_path / "documents").mkdir()
    for number, words in enumerate(texts):
        (tmp_path / "documents" / f"{number}.txt").write_text(f"Number {number}\n\n{' '.join(words)}\n")
    queries = [{"_id": f"q{i}", "text": " ".join(generator.permutation(texts[i % 40])[:2])} for i in range(60)]
    (tmp_path / "queries.jsonl").write_text("".join(json.dumps(query) + "\n" for query in queries))
    (tmp_path / "qrels").mkdir()
    for name, part in (("train", range(40)), ("dev", range(40, 50)), ("test", range(50, 60))):
        rows = "".join(f"q{i}\t{i % 40}.txt\t1\n" for i in part)
        (tmp_path / "qrels" / f"{name}.tsv").write_text(f"query-id\tcorpus-id\tscore\n{rows}")
    (tmp_path / "search.toml").write_text(CONFIG)
    return tmp_path


def test_one_configuration_to_a_running_service_that_is_judged(search: Path, twotower: Twotower) -> None:
    config, store, figures = str(search / "search.toml"), str(search / "store"), search / "figures.json"
    assert twotower("train", config, "--store", store).exit_code == 0
    assert twotower("catalog", "load", config, "--store", store).exit_code == 0
    evaluate = ("evaluate", "1", str(search), "--store", store)
    with quick_stack(store, search) as stack:
        stack.wait_ready(timeout_s=60)
        outcome = twotower(*evaluate, "--live", stack.query_address, "--json", str(figures))
        assert outcome.err == ""
        assert "live service" in outcome.out
        models = json.loads(figures.read_text())["models"]
        # Forty items are searched exactly, so whatever differs is a mistake.
        assert models["live_service"] == models["two_towers"]
        assert models["live_service"]["ndcg_at_5"]["value"] > 0

        answer = twotower("retrieve", "text=red apple", "-k", "3", "--address", stack.query_address)
        assert "Number " in answer.out

        # What the catalogue lost, the service no longer finds; the exact ranking of the data does.
        found = [line.split("\t")[1] for line in (search / "qrels" / "test.tsv").read_text().splitlines()[1:]]
        assert twotower("catalog", "delete", *found, "--store", store).exit_code == 0
        stack.end("shard-0")
        stack.end("shard-1")
        stack.restart("shard-0")
        stack.restart("shard-1")
        stack.wait_ready(timeout_s=60)
        assert twotower(*evaluate, "--live", stack.query_address, "--json", str(figures)).exit_code == 0
        models = json.loads(figures.read_text())["models"]
        assert models["live_service"]["recall_at_20"]["value"] == 0 < models["two_towers"]["recall_at_20"]["value"]

        other = str(search / "other")
        shutil.copytree(store, other)
        assert twotower("train", config, "--store", other, "--force", "another version").exit_code == 0
        outcome = twotower("evaluate", "2", str(search), "--store", other, "--live", stack.query_address)
        assert outcome.exit_code == 1
        assert outcome.err == (
            f"error: {stack.query_address} serves version 1 and not 2; evaluate that one, or promote this one first\n"
        )
    outcome = twotower(*evaluate, "--live", stack.query_address)
    assert outcome.exit_code == 1
    assert f"error: the query service at {stack.query_address} is unavailable" in outcome.err
