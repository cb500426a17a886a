"""The benchmark of SciFact on a few documents: what is trained on, the encoder as it is, the service, the peer."""

import json
import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from tiny_encoder import WIDTH, WORDS, write_tiny_encoder

from benchmarks.quality import runs, scifact, scifact_times
from trainer.config import parse_config
from trainer.run import prepare
from trainer.text import pretrained_texts

_DOCUMENTS, _CLAIMS, _TESTED = 150, 130, 12


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Documents of four words, and claims of two of a document's words; the last claim asks again what a test asks."""
    generator = np.random.default_rng(0)
    documents = [[WORDS[word] for word in generator.choice(len(WORDS), 4, replace=False)] for _ in range(_DOCUMENTS)]
    claims = [f"{words[0]} {words[2]} {number}" for number, words in enumerate(documents[:_CLAIMS])]
    claims.append(claims[0].upper())
    folder = tmp_path / "shared" / "scifact"
    folder.mkdir(parents=True)
    corpus = {
        "doc_id": np.arange(_DOCUMENTS),
        "title": [words[0] for words in documents],
        "text": [" ".join(words[1:]) for words in documents],
    }
    pq.write_table(pa.table(corpus), folder / "corpus.parquet")
    numbers = np.arange(len(claims))
    split = np.where(numbers < _TESTED, "test", "train")
    pq.write_table(pa.table({"query_id": numbers, "text": claims, "split": split}), folder / "queries.parquet")
    pairs = pa.table({"query_id": numbers, "doc_id": numbers % _CLAIMS, "relevance": np.ones(len(claims), dtype=int)})
    for part in ("train", "test"):
        pq.write_table(pairs.filter(pa.array(split == part)), folder / f"qrels_{part}.parquet")
    monkeypatch.setattr(runs, "SHARED", folder.parent)
    return folder


def test_no_test_claim_is_trained_on(shared: Path, tmp_path: Path) -> None:
    scifact.write_tables(shared, tmp_path, num_validation=80)
    parts = {part: pq.read_table(tmp_path / f"qrels_{part}.parquet") for part in ("train", "dev", "test")}
    asked = {part: set(pairs["query_id"].to_pylist()) for part, pairs in parts.items()}
    assert {part: len(claims) for part, claims in asked.items()} == {"train": 30, "dev": 80, "test": 8}
    assert set.union(*asked.values()) == set(range(_TESTED, _CLAIMS)), "not the one that a test claim asks too"
    needed = {document for pairs in parts.values() for document in pairs["doc_id"].to_pylist()}
    found = set(pq.read_table(tmp_path / "corpus.parquet")["doc_id"].to_pylist())
    assert needed < found, "and what BM25 finds for the claims held out"
    assert len(found) < _DOCUMENTS


def test_what_is_cut_off_is_counted(shared: Path, tmp_path: Path) -> None:
    settings = runs.read_settings(_settings(tmp_path, max_length=5))
    assert scifact.cut_off(settings, shared) == (
        "150 of 150 abstracts (100.0%) have more than 5 tokens; the rest is cut off, 16.7% of all tokens"
    ), "four words, and the tokens of start and end"


def test_a_sample_is_the_same_each_time_and_has_the_documents_that_it_needs(shared: Path, tmp_path: Path) -> None:
    for folder in (tmp_path / "once", tmp_path / "again"):
        folder.mkdir()
        scifact.write_sample(shared, folder, {"test": 5, "train": 20})
    files = sorted(path.name for path in (tmp_path / "once").iterdir())
    assert files == ["corpus.parquet", "qrels_test.parquet", "qrels_train.parquet", "queries.parquet"]
    for file in files:
        assert pq.read_table(tmp_path / "once" / file) == pq.read_table(tmp_path / "again" / file)
    queries = pq.read_table(tmp_path / "once" / "queries.parquet")
    assert queries["split"].to_pylist().count("test") == 5
    needed = {query_id % _CLAIMS for query_id in queries["query_id"].to_pylist()}
    assert set(pq.read_table(tmp_path / "once" / "corpus.parquet")["doc_id"].to_pylist()) == needed


def test_the_encoder_as_it_is_served_and_timed(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scifact, "CONFIG", _settings(tmp_path, max_length=16))
    file, folder, nowhere = tmp_path / "figures.json", tmp_path / "runs", str(tmp_path / "nowhere")
    options = ["--quick", "--seeds", "0", "--json", str(file), "--runs", str(folder), "--peer-python", nowhere]
    monkeypatch.setattr(sys, "argv", ["scifact", *options])
    scifact.main()
    out = " ".join(capsys.readouterr().out.split())
    assert "0 of 63 abstracts (0.0%) have more than 16 tokens" in out
    assert re.search(r"all-MiniLM-L6-v2 \(published\) │ 0\.6451", out)
    assert "differs from exact search by 0.0000 at most, 0.005 asked: reached" in out
    assert "sentence-transformers: left out, [Errno 2]" in out
    found = json.loads(file.read_text())
    (zero_shot,) = found["models"].values()
    assert (zero_shot["num_queries"], zero_shot["num_targets"]) == (_TESTED, _TESTED)
    assert set(zero_shot["models"]) >= {"two_towers", "live_service", "bm25"}
    held, *of_threads = found["ratios"]
    assert (held["name"], held["other"]) == ("Retrieve, 16 tokens, embedding held", "not held")
    assert len(of_threads) == torch.get_num_threads()
    assert all(ratio["seconds"] > 0 and ratio["ratio"] > 0 for ratio in found["ratios"])


def test_sentence_transformers_takes_the_same_steps(shared: Path, tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers", reason="pip install sentence-transformers")
    path = _settings(tmp_path, max_length=16)
    settings = runs.changed(runs.read_settings(path), {"data": scifact.DATA})
    config, tables = parse_config(settings, path), tmp_path / "tables"
    tables.mkdir()
    scifact.write_tables(shared, tables, num_validation=16)
    prepared = prepare(config, tables)
    steps = scifact_times.steps_of(config, len(prepared.split.train))
    assert torch.cat([step.rows for step in steps]).sort().values.tolist() == list(range(len(prepared.split.train)))
    order = scifact.peer_order(config, prepared)
    with scifact.peer_started(Path(sys.executable), order) as (peer, about_peer):
        assert peer is not None, about_peer
        assert "sentence_transformers" in about_peer
        peer.ask(seed=0)
        scifact.take_peer_step(peer, replace(steps[0], learning_rate=0.0))
        peer.ask(folder=str(tmp_path / "as it was"))
        before, after = (
            load_file(folder / "model.safetensors") for folder in (tmp_path / "encoder", tmp_path / "as it was")
        )
        assert all(torch.equal(before[name], value) for name, value in after.items()), (
            "nothing learned, nothing changed"
        )
        theirs = partial(scifact.take_peer_step, peer)
        peer.ask(seed=0)
        ratio = scifact_times.steps_beside(scifact_times.OurSteps(config, prepared), theirs, "peer", steps, rounds=1)
        assert ratio.seconds > 0
        assert ratio.other_seconds > 0
        scifact.train_by_peer(peer, config, len(prepared.split.train), tmp_path / "trained")
    learned = load_file(tmp_path / "trained" / "model.safetensors")
    assert any(not torch.equal(before[name], value) for name, value in learned.items())
    features = [{**feature, "encoder": str(tmp_path / "trained")} for feature in settings["features"]]
    encoders = pretrained_texts(parse_config({**settings, "features": features}, path).feature_schema())
    assert set(encoders) == {"text", "document"}, "what they wrote is read"


def _settings(folder: Path, max_length: int) -> Path:
    """The configuration with a tiny encoder and one epoch."""
    text = scifact.CONFIG.read_text().replace(
        '"all-MiniLM-L6-v2"', f'"{write_tiny_encoder(folder / "encoder", num_layers=1)}"'
    )
    text = re.sub(r"max_length = \d+", f"max_length = {max_length}", text).replace("dim = 384", f"dim = {WIDTH}")
    (folder / "scifact.toml").write_text(re.sub(r"epochs = \d+", "epochs = 1", text))
    return folder / "scifact.toml"
