import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from towers.errors import InvalidInputError
from towers.schema import parse_schema
from trainer import data
from trainer.columns import PARTS
from trainer.config import DataConfig, read_config
from trainer.data import TrainingData

SCIFACT = Path(__file__).parents[3] / "shared" / "data" / "scifact"
CONFIG = Path(data.__file__).parent / "configs" / "scifact.toml"
CLAIM = {"name": "text", "owner": "query", "kind": "text"}
DOCUMENT = {"name": "document", "owner": "item", "kind": "text"}
AS_WRITTEN = DataConfig(layout="beir", interactions="qrels/*.tsv", items="corpus.jsonl", users="queries.jsonl")
AS_PARQUET = DataConfig(layout="beir", interactions="qrels_*.parquet", items="corpus.parquet", users="queries.parquet")

DOCUMENTS = [("d1", "Cats", "They purr."), ("d2", "", "Dogs bark."), ("d3", "Birds", "They sing.")]
QUERIES = [(f"q{i}", f"question {i}") for i in range(20)]
TRAIN = [(f"q{i}", document, 1) for i in range(12) for document in ("d1", "d2")]
TEST = [("q18", "d3", 1), ("q18", "d1", 2), ("q19", "d2", 0), ("q19", "d3", 1)]


def write(
    folder: Path, queries: Sequence[tuple[str, str]] = QUERIES, **judgements: Sequence[tuple[str, str, int]]
) -> None:
    (folder / "qrels").mkdir(exist_ok=True)
    documents = [{"_id": name, "title": title, "text": text, "metadata": {}} for name, title, text in DOCUMENTS]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    lines = [json.dumps({"_id": name, "text": text}) + "\n" for name, text in queries]
    (folder / "queries.jsonl").write_text("".join(lines))
    for name, rows in judgements.items():
        lines = ["\t".join(map(str, row)) + "\n" for row in [("query-id", "corpus-id", "score"), *rows]]
        (folder / "qrels" / f"{name}.tsv").write_text("".join(lines))


def read(
    folder: Path, config: DataConfig = AS_WRITTEN, features: Sequence[dict[str, Any]] = (CLAIM, DOCUMENT)
) -> TrainingData:
    return data.read_data(config, parse_schema(list(features)), folder)


def pairs(found: TrainingData, part: str) -> set[tuple[str, str]]:
    positions = getattr(found.split, part)
    return {(found.users.ids[found.log.users[p]], found.items.ids[found.log.items[p]]) for p in positions}


def test_a_folder_of_documents_is_a_corpus(tmp_path: Path) -> None:
    write(tmp_path, train=TRAIN, test=TEST)
    folder = tmp_path / "documents"
    folder.mkdir()
    for name, title, text in DOCUMENTS:
        (folder / f"{name}.md").write_text(f"# {title}\n\n{text}\n" if title else f"{text}\n")
    for judgements in (tmp_path / "qrels").iterdir():
        judgements.write_text(re.sub(r"\bd([123])\b", r"d\1.md", judgements.read_text()))
    config = AS_WRITTEN.model_copy(update={"items": "documents"})
    found = read(tmp_path, config)
    assert found.items.ids == ["d1.md", "d2.md", "d3.md"]
    assert found.items.columns["document"] == ["Cats They purr.", "Dogs bark.", "Birds They sing."]
    assert pairs(found, "test") == {("q18", "d3.md"), ("q18", "d1.md"), ("q19", "d3.md")}

    digests = {data.digest_files(data.data_files(config, tmp_path))["items"]}
    (folder / "d3.md").rename(folder / "d4.md")
    digests.add(data.digest_files(data.data_files(config, tmp_path))["items"])
    (folder / "d4.md").write_text("Fish\n")
    digests.add(data.digest_files(data.data_files(config, tmp_path))["items"])
    assert len(digests) == 3


def test_documents_queries_and_judgements_become_items_users_and_interactions(tmp_path: Path) -> None:
    write(tmp_path, train=TRAIN, dev=[("q15", "d1", 1)], test=TEST)
    found = read(tmp_path)
    assert found.items.columns["document"] == ["Cats They purr.", "Dogs bark.", "Birds They sing."]
    assert found.users.columns["text"][3] == "question 3"
    assert pairs(found, "train") == {row[:2] for row in TRAIN}
    assert pairs(found, "validation") == {("q15", "d1")}
    assert pairs(found, "test") == {("q18", "d3"), ("q18", "d1"), ("q19", "d3")}
    assert found.notes == ("1 judgements of relevance 0 or less were left out",)


def test_parquet_says_the_same(tmp_path: Path) -> None:
    write(tmp_path, train=TRAIN, test=TEST)
    ids, titles, texts = zip(*DOCUMENTS, strict=True)
    pq.write_table(pa.table({"doc_id": ids, "title": titles, "text": texts}), tmp_path / "corpus.parquet")
    ids, texts = zip(*QUERIES, strict=True)
    pq.write_table(pa.table({"query_id": ids, "text": texts}), tmp_path / "queries.parquet")
    for name, rows in (("train", TRAIN), ("test", TEST)):
        query_ids, document_ids, relevance = zip(*rows, strict=True)
        table = pa.table({"query_id": query_ids, "doc_id": document_ids, "relevance": relevance})
        pq.write_table(table, tmp_path / f"qrels_{name}.parquet")
    as_written, as_parquet = read(tmp_path), read(tmp_path, AS_PARQUET)
    assert as_parquet.items.columns == as_written.items.columns
    assert as_parquet.users.columns == as_written.users.columns
    for part in ("train", "validation", "test"):
        assert pairs(as_parquet, part) == pairs(as_written, part)


def test_without_a_dev_file_whole_queries_are_held_out(tmp_path: Path) -> None:
    write(tmp_path, train=TRAIN, test=TEST)
    found = read(tmp_path)
    held_out = {query_id for query_id, _ in pairs(found, "validation")}
    assert len(held_out) == 2  # A tenth of 12, rounded up.
    assert not held_out & {query_id for query_id, _ in pairs(found, "train")}
    assert pairs(found, "train") | pairs(found, "validation") == {row[:2] for row in TRAIN}
    write(tmp_path, train=TRAIN[::-1], test=TEST)
    assert pairs(read(tmp_path), "validation") == pairs(found, "validation")
    assert found.notes[-1] == "there is no file named 'dev': 2 queries of training validate it instead"


def test_a_text_that_is_tested_is_not_trained_on(tmp_path: Path) -> None:
    queries = [*QUERIES[:-1], ("q19", "Question  4")]
    write(tmp_path, queries, train=[*TRAIN, ("q18", "d2", 1)], dev=[("q5", "d3", 1)], test=TEST)
    found = read(tmp_path)
    trained = {query_id for query_id, _ in pairs(found, "train")}
    assert trained == {f"q{i}" for i in range(12)} - {"q4", "q5"}
    assert pairs(found, "test") == {("q18", "d3"), ("q18", "d1"), ("q19", "d3")}
    assert "5 pairs were left out, as their query's text is asked in a later part too" in found.notes


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("corpus.jsonl", '{"_id": "d1", "text": "x"}\n{"_id": "d2"}\n', "line 2: field 'text' is missing"),
        ("corpus.jsonl", '{"_id": "d1", "text": 3}\n', "line 1: field 'text' is 3; give a string"),
        ("corpus.jsonl", "", "has no records"),
        ("queries.jsonl", '\n{"text": "x"}\n', "line 2: field '_id' is missing"),
        ("queries.jsonl", "{\n", "line 1 is not JSON"),
        ("queries.jsonl", "[1]\n", "line 1 is not a JSON object"),
        ("qrels/train.tsv", "q1 d1 1\n", "line 1 has 1 fields, not 3: write query-id, corpus-id, score"),
        ("qrels/train.tsv", "q1\td1\tyes\n", "line 1: field 'score' is 'yes'; give a number"),
        ("qrels/train.tsv", "q1\td1\t1\nq77\td1\t1\n", "line 2: query 'q77' is not in the file of [data] users"),
        ("qrels/train.tsv", "q1\td1\t0\n", "no relevant pair is for train"),
        ("qrels/other.tsv", "q1\td1\t1\n", "the name does not say what its pairs are for"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path: Path, file: str, content: str, message: str) -> None:
    write(tmp_path, train=TRAIN, test=TEST)
    (tmp_path / file).write_text(content)
    with pytest.raises(InvalidInputError) as caught:
        read(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert message in str(caught.value)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    write(tmp_path, train=TRAIN, test=TEST)
    with pytest.raises(InvalidInputError, match=r"column 'body' \(feature 'body'\) is missing"):
        read(tmp_path, features=(CLAIM, {**DOCUMENT, "name": "body"}))
    (tmp_path / "queries.jsonl").unlink()
    with pytest.raises(InvalidInputError, match=r"queries.jsonl: no such file; fix \[data\] users or folder"):
        read(tmp_path)


def test_columns_that_the_layout_fixes_are_refused() -> None:
    with pytest.raises(ValueError, match="leave out csv_separator and split_column"):
        DataConfig(
            **AS_WRITTEN.model_dump(include={"layout", "interactions", "items", "users"}),
            split_column="part",
            csv_separator=";",
        )
    with pytest.raises(ValueError, match="needs the file of the queries"):
        DataConfig(layout="beir", interactions="qrels/*.tsv", items="corpus.jsonl")


@pytest.mark.skipif(not SCIFACT.exists(), reason="needs the SciFact files in ../shared")
def test_scifact() -> None:
    found = read(SCIFACT, AS_PARQUET)
    assert len(found.items.ids) == 5183
    tested = {query_id for query_id, _ in pairs(found, "test")}
    assert (len(tested), len(pairs(found, "test"))) == (300, 339)
    trained = {query_id for query_id, _ in pairs(found, "train")}
    validated = {query_id for query_id, _ in pairs(found, "validation")}
    texts = dict(zip(found.users.ids, found.users.columns["text"], strict=True))
    # Two of the 809 training claims are tested too, by the same text.
    assert len(trained) + len(validated) == 807
    assert len({str(texts[name]).casefold() for name in validated}) == 81
    assert not {texts[name] for name in trained | validated} & {texts[name] for name in tested}
    assert PARTS[found.log.parts[found.split.test[0]]] == "test"  # type: ignore[index]


def test_the_configuration_of_scifact_reads_claims_and_documents(tmp_path: Path) -> None:
    config = read_config(CONFIG)
    write(tmp_path, train=TRAIN, test=TEST)
    found = data.read_data(config.data, config.feature_schema(), tmp_path)
    assert found.items.columns.keys() == {"item_id", "document"}
    assert found.users.columns.keys() == {"user_id", "text"}
