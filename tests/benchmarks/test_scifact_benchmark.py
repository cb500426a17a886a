"""The benchmark of SciFact on a few documents: what is trained on, both sets of towers, the service, the file."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from tiny_encoder import WIDTH, WORDS, write_tiny_encoder

from benchmarks.quality import runs, scifact

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
    scifact.write_tables(shared, tmp_path)
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


def test_the_encoder_as_it_is_then_trained_and_both_served(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scifact, "CONFIG", _settings(tmp_path, max_length=16))
    file, folder = tmp_path / "figures.json", tmp_path / "runs"
    monkeypatch.setattr(sys, "argv", ["scifact", "--json", str(file), "--runs", str(folder)])
    scifact.main()
    out = capsys.readouterr().out
    assert "0 of 150 abstracts (0.0%) have more than 16 tokens" in out
    assert re.search(r"all-MiniLM-L6-v2 \(published\) +│ +0\.6451", out)
    assert "differs from exact search by 0.0000 at most, 0.005 asked: reached" in " ".join(out.split())
    found = json.loads(file.read_text())
    assert list(found) == ["zero-shot", "LoRA, seed 0"]
    untrained, trained = (comparisons[0]["models"] for comparisons in found.values())
    assert untrained["two_towers"] != trained["two_towers"]
    assert untrained["bm25"] == trained["bm25"]
    assert found["zero-shot"][0]["num_targets"] == _TESTED
    test = pq.read_table(shared / "queries.parquet").filter(pc.field("split") == "test")
    assert found["zero-shot"][0]["num_queries"] == test.num_rows


def _settings(folder: Path, max_length: int) -> Path:
    """The configuration with a tiny encoder and one epoch."""
    text = scifact.CONFIG.read_text().replace('"all-MiniLM-L6-v2"', f'"{write_tiny_encoder(folder / "encoder")}"')
    text = re.sub(r"max_length = \d+", f"max_length = {max_length}", text).replace("dim = 384", f"dim = {WIDTH}")
    (folder / "scifact.toml").write_text(re.sub(r"epochs = \d+", "epochs = 1", text))
    return folder / "scifact.toml"
