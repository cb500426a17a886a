"""Scientific claims to the abstracts that speak of them: `python -m benchmarks.quality.scifact`.

The protocol of BEIR: 300 test claims, 5,183 abstracts, title and text. Adapters are trained on the training claims
alone, over the abstracts that these need; settings and epoch are chosen by some of them that are held out. All towers
are asked by exact search and through a running service. Deliberately does not know how towers are trained.
"""

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console

import trainer
from benchmarks.quality import runs
from benchmarks.quality.runs import Rows, Settings
from cli.evaluate import asking
from cli.local_stack import LocalStack
from retrieval_client import RetrievalClient
from towers.catalogue import Catalogue
from towers.checkpoint import CheckpointStore
from towers.schema import TextFeature
from towers.text import TextTokenizer
from trainer import export
from trainer.beir import read_documents
from trainer.bm25 import Texts, bm25_scores
from trainer.comparison import TOWERS, Comparison
from trainer.config import parse_config
from trainer.data import data_window
from trainer.judge import evaluate_version
from trainer.live import LIVE
from trainer.model import TwoTowers
from trainer.run import code_revision, prepare, publish
from trainer.text import read_tokenizer

METRICS = ("ndcg_at_10", "recall_at_100", "mrr_at_10")
PUBLISHED = {
    "BM25, Lucene (published)": (0.679,),
    "all-MiniLM-L6-v2 (published)": (0.6451,),
    "gte-small (published)": (0.7269,),
}
"""NDCG@10."""
CONFIG = Path(trainer.__file__).parent / "configs" / "scifact.toml"
DATA = {"folder": ".", "items": "corpus.parquet", "users": "queries.parquet", "interactions": "qrels_*.parquet"}
"""Where the data are, instead of what the configuration says."""
MOST_LOST = 0.005
"""Of a metric, by the service's index."""
_NUM_CHECKED = 16
"""Texts of each side on which the untrained towers are compared with torch."""
_READY_S = 3600.0
"""Shards embed all abstracts before they are ready."""
_TIMEOUT_S = 60.0
_ALL_TOKENS = 1_000_000
_NUM_VALIDATION = 80
_NUM_STAND_INS = 8
"""Training claims in the place of the test claims, which training is not to see."""
_NUM_DISTRACTORS = 10
"""Abstracts that BM25 finds for each claim held out: what makes the choice among fewer abstracts a hard one."""


def write_tables(scifact: Path, folder: Path) -> None:
    """What is trained on: the training claims, some of them to validate, and the abstracts that they need.

    Args:
        scifact: Folder of the data set.
        folder: Gets the files.
    """
    corpus, queries = pq.read_table(scifact / "corpus.parquet"), pq.read_table(scifact / "queries.parquet")
    pairs = pq.read_table(scifact / "qrels_train.parquet")
    is_test = pc.equal(queries["split"].cast(pa.string()), "test")
    asked_in_test = {_normalised(text) for text in queries.filter(is_test)["text"].to_pylist()}
    training = queries.filter(pc.invert(is_test))
    texts = dict(zip(training["query_id"].to_pylist(), training["text"].to_pylist(), strict=True))
    claims = [
        claim
        for claim in sorted(texts, key=lambda claim: hashlib.sha256(_normalised(texts[claim]).encode()).digest())
        if _normalised(texts[claim]) not in asked_in_test
    ]
    num_held_out = _NUM_STAND_INS + _NUM_VALIDATION
    parts = {
        "test": claims[:_NUM_STAND_INS],
        "dev": claims[_NUM_STAND_INS:num_held_out],
        "train": claims[num_held_out:],
    }
    for part, chosen in parts.items():
        pq.write_table(_of(pairs, "query_id", chosen), folder / f"qrels_{part}.parquet")
    relevant = _of(pairs, "query_id", claims)["doc_id"].to_pylist()
    distractors = _distractors(corpus, [texts[claim] for claim in claims[:num_held_out]])
    pq.write_table(_of(corpus, "doc_id", sorted({*relevant, *distractors})), folder / "corpus.parquet")
    pq.write_table(_of(queries, "query_id", claims), folder / "queries.parquet")


def untrained(settings: Settings, tables: Path, folder: Path, console: Console) -> int:
    """Publishes the encoder as it is: the towers before the first step, exported as trained ones are.

    Args:
        settings: The configuration.
        tables: Folder of what would be trained on.
        folder: Of the run; what an earlier one published there is used again.
        console: Gets a line if another publishes there.

    Returns:
        The version.
    """
    checkpoints = CheckpointStore(runs.store_of(folder))
    if checkpoints.versions():
        return checkpoints.versions()[-1]
    config = parse_config(settings, CONFIG)
    prepared = prepare(config, tables)
    encoder = prepared.encoder
    model = TwoTowers(prepared.fitted.schema, encoder.query, encoder.item, config.model)
    exported = export.export_towers(
        model,
        prepared.fitted,
        {"query": encoder.query, "item": encoder.item},
        {
            "query": encoder.raw_queries(prepared.split.validation[:_NUM_CHECKED].tolist()),
            "item": encoder.raw_items(range(_NUM_CHECKED)),
        },
    )
    draft = export.draft_checkpoint(
        exported,
        prepared.fitted,
        {},
        config.model_dump(mode="json"),
        data_window(prepared.log, prepared.split.train),
        code_revision(),
        forced=None,
    )
    return publish(checkpoints, draft, console)


def judged(folder: Path, version: int, scifact: Path) -> Comparison:
    """The test claims, by exact search and by shards and a query service with the default settings.

    Args:
        folder: Of the run, which has published nothing newer: what is newest goes live.
        version: The checkpoint.
        scifact: Folder of the data set.
    """
    store = runs.store_of(folder)
    catalogue = Catalogue(store)
    if catalogue.version() is None:
        catalogue.upsert(read_documents(scifact / DATA["items"]))
    with (
        tempfile.TemporaryDirectory(prefix="scifact-") as logs,
        LocalStack(store=store.url, folder=Path(logs), query_port=0) as stack,
    ):
        stack.wait_ready(_READY_S)
        with RetrievalClient(stack.query_address, timeout_s=_TIMEOUT_S) as client:
            ask_live = asking(client, stack.query_address, version)
            return evaluate_version(CheckpointStore(store), version, scifact, ask_live).comparison


def rows_of(name: str, comparison: Comparison) -> Rows:
    """Of some towers: by exact search, and through the service."""
    return {
        name: [comparison.figures[TOWERS][metric].value for metric in METRICS],
        f"{name}, live service": [comparison.figures[LIVE][metric].value for metric in METRICS],
    }


def cut_off(settings: Settings, scifact: Path) -> str:
    """What the item tower does not read of the abstracts.

    Args:
        settings: The configuration.
        scifact: Folder of the data set.
    """
    (feature,) = parse_config(settings, CONFIG).feature_schema().of("item")
    assert isinstance(feature, TextFeature)
    tokenizer = TextTokenizer(read_tokenizer(feature), _ALL_TOKENS)
    documents = read_documents(scifact / DATA["items"])[feature.column].to_pylist()
    lengths = np.array([len(tokenizer.ids(document)) for document in documents])
    over = np.maximum(lengths - feature.max_length, 0)
    return (
        f"{int((over > 0).sum()):,} of {len(over):,} abstracts ({(over > 0).mean():.1%}) have more than "
        f"{feature.max_length} tokens; the rest is cut off, {over.sum() / lengths.sum():.1%} of all tokens"
    )


def lost(comparisons: Mapping[str, Comparison]) -> str:
    """What the service's index takes from exact search."""
    largest = max(
        abs(comparison.figures[TOWERS][metric].value - comparison.figures[LIVE][metric].value)
        for comparison in comparisons.values()
        for metric in METRICS
    )
    verdict = "reached" if largest <= MOST_LOST else "missed"
    return f"the service differs from exact search by {largest:.4f} at most, {MOST_LOST} asked: {verdict}"


def _distractors(corpus: pa.Table, claims: Sequence[str]) -> list[int]:
    documents = [
        f"{title} {text}" for title, text in zip(corpus["title"].to_pylist(), corpus["text"].to_pylist(), strict=True)
    ]
    scores = bm25_scores(Texts(claims, documents), np.arange(len(claims)))(0, len(claims))
    found: list[int] = corpus["doc_id"].take(scores.topk(_NUM_DISTRACTORS).indices.flatten().numpy()).to_pylist()
    return found


def _of(table: pa.Table, column: str, values: Sequence[int]) -> pa.Table:
    return table.filter(pc.is_in(table[column], pa.array(values, table[column].type)))


def _normalised(text: str) -> str:
    return " ".join(text.casefold().split())


def main() -> None:
    """Judges, trains and prints the table."""
    parser = runs.command_line(__doc__, "nothing is trained")
    parser.set_defaults(seeds=1)
    arguments = parser.parse_args()
    console = Console()
    scifact, tables = runs.folder_of("scifact"), arguments.runs / "scifact-data"
    tables.mkdir(parents=True, exist_ok=True)
    write_tables(scifact, tables)
    settings = runs.changed(runs.read_settings(CONFIG), {"data": DATA})
    console.print(cut_off(settings, scifact), highlight=False)
    folder = arguments.runs / "scifact" / "untrained"
    found = {"zero-shot": judged(folder, untrained(settings, tables, folder, console), scifact)}
    for seed in range(0 if arguments.quick else arguments.seeds):
        folder = arguments.runs / "scifact" / str(seed)
        _, version = runs.published(runs.changed(settings, {"training": {"seed": seed}}), folder, tables, console)
        found[f"LoRA, seed {seed}"] = judged(folder, version, scifact)
    bm25 = found["zero-shot"].figures["bm25"]
    rows: Rows = {**PUBLISHED, "BM25": [bm25[metric].value for metric in METRICS]}
    for name, comparison in found.items():
        rows |= rows_of(name, comparison)
    table = runs.shown("SciFact; test", METRICS, rows)
    table.caption = lost(found)
    console.print(table)
    if arguments.json:
        runs.write(arguments.json, {name: [comparison] for name, comparison in found.items()})


if __name__ == "__main__":
    main()
