"""Scientific claims to the abstracts that speak of them: `python -m benchmarks.quality.scifact`.

The protocol of BEIR: 300 test claims, 5,183 abstracts, title and text. Adapters are trained on the training claims
alone, over the abstracts that these need; settings and epoch are chosen by some of them that are held out. All towers
are asked by exact search and through a running service. sentence-transformers takes as many steps by the same batches,
and what it makes of the encoder is judged by the same exact search. `--quick` takes a sample of the claims, and the
abstracts that these need alone. Deliberately does not know how towers are trained.

sentence-transformers and peft may have an environment of their own, whose Python `--peer-python` names:

    python -m venv peer && peer/bin/pip install sentence-transformers peft

On a machine that does other work, have torch's threads sleep while they wait, on both sides: `OMP_WAIT_POLICY=passive`
in the environment.
"""

import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from rich.console import Console

import trainer
from benchmarks.process import Process
from benchmarks.quality import runs, scifact_times
from benchmarks.quality.runs import Rows, Settings
from benchmarks.quality.scifact_times import OurSteps, Ratio, Step
from cli.evaluate import asking
from cli.local_stack import LocalStack
from retrieval_client import RetrievalClient
from towers.catalogue import Catalogue
from towers.checkpoint import CheckpointStore
from towers.schema import Owner, TextFeature
from towers.text import TextTokenizer
from trainer import export
from trainer.beir import read_documents
from trainer.bm25 import Texts, bm25_scores
from trainer.comparison import TOWERS, Comparison, as_json
from trainer.config import TrainerConfig, parse_config
from trainer.data import data_window
from trainer.judge import evaluate_version
from trainer.live import LIVE
from trainer.model import TwoTowers
from trainer.run import Prepared, code_revision, prepare, publish
from trainer.text import encoder_folder, read_tokenizer

_ENCODER = "all-MiniLM-L6-v2"
METRICS = ("ndcg_at_10", "recall_at_100", "mrr_at_10")
PUBLISHED = {
    "BM25, Lucene (published)": (0.679,),
    f"{_ENCODER} (published)": (0.6451,),
    "gte-small (published)": (0.7269,),
}
"""NDCG@10."""
MOST_FROM_PUBLISHED = 0.003
"""Of the encoder as it is, by exact search."""
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
_NUM_STAND_INS = 8
"""Training claims in the place of the test claims, which training is not to see."""
_NUM_DISTRACTORS = 10
"""Abstracts that BM25 finds for each claim held out: what makes the choice among fewer abstracts a hard one."""
_PEER = "sentence-transformers"
_PEER_SCRIPT = Path(__file__).with_name("sentence_transformers_steps.py")


@dataclass(frozen=True)
class Length:
    """How much is done."""

    num_validation: int
    """Training claims that are held out."""
    query_rounds: int
    step_rounds: int
    num_claims: Mapping[str, int] = field(default_factory=dict)
    """Of each split; all where it is not named."""
    epochs: int | None = None
    """Those of the configuration where it is left out."""


FULL = Length(num_validation=80, query_rounds=200, step_rounds=8)
QUICK = Length(
    num_validation=12,
    query_rounds=50,
    step_rounds=3,
    num_claims={"test": 40, "train": 52},
    epochs=1,
)


def write_sample(scifact: Path, folder: Path, num_claims: Mapping[str, int]) -> None:
    """A fixed sample of the claims, and the abstracts that these need alone, in the layout of the whole.

    Args:
        scifact: Folder of the data set.
        folder: Gets the files.
        num_claims: Of each split.
    """
    corpus, queries = pq.read_table(scifact / "corpus.parquet"), pq.read_table(scifact / "queries.parquet")
    chosen: list[int] = []
    needed: list[int] = []
    for split, count in num_claims.items():
        texts = _texts(queries.filter(pc.equal(queries["split"].cast(pa.string()), split)))
        claims = _in_fixed_order(texts)[:count]
        pairs = _of(pq.read_table(scifact / f"qrels_{split}.parquet"), "query_id", claims)
        pq.write_table(pairs, folder / f"qrels_{split}.parquet")
        chosen += claims
        needed += pairs["doc_id"].to_pylist()
    pq.write_table(_of(queries, "query_id", chosen), folder / "queries.parquet")
    pq.write_table(_of(corpus, "doc_id", sorted(set(needed))), folder / "corpus.parquet")


def write_tables(scifact: Path, folder: Path, num_validation: int) -> None:
    """What is trained on: the training claims, some of them to validate, and the abstracts that they need.

    Args:
        scifact: Folder of the data set.
        folder: Gets the files.
        num_validation: Claims that are held out.
    """
    corpus, queries = pq.read_table(scifact / "corpus.parquet"), pq.read_table(scifact / "queries.parquet")
    pairs = pq.read_table(scifact / "qrels_train.parquet")
    is_test = pc.equal(queries["split"].cast(pa.string()), "test")
    asked_in_test = {_normalised(text) for text in queries.filter(is_test)["text"].to_pylist()}
    texts = _texts(queries.filter(pc.invert(is_test)))
    claims = [claim for claim in _in_fixed_order(texts) if _normalised(texts[claim]) not in asked_in_test]
    num_held_out = _NUM_STAND_INS + num_validation
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


def untrained(config: TrainerConfig, prepared: Prepared, folder: Path, console: Console) -> int:
    """Publishes an encoder as it is: the towers before the first step, exported as trained ones are.

    Args:
        config: The configuration.
        prepared: What would be trained on.
        folder: Of the run; what an earlier one published there is used again.
        console: Gets a line if another publishes there.

    Returns:
        The version.
    """
    checkpoints = CheckpointStore(runs.store_of(folder))
    if checkpoints.versions():
        return checkpoints.versions()[-1]
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


@contextmanager
def served(folder: Path, scifact: Path) -> Iterator[tuple[RetrievalClient, str]]:
    """A client, and the address, of a service with the default settings that holds all abstracts.

    Args:
        folder: Of the run: what it published last goes live.
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
            yield client, stack.query_address


def of_untrained(
    config: TrainerConfig, prepared: Prepared, folder: Path, scifact: Path, rounds: int, console: Console
) -> tuple[Comparison, list[Ratio]]:
    """The encoder as it is: the test claims, by exact search and through the service, and what a query costs.

    Args:
        config: The configuration.
        prepared: What would be trained on.
        folder: Of the run.
        scifact: Folder of the data set.
        rounds: In which queries are timed.
        console: Gets a line if another publishes there.
    """
    version, checkpoints = untrained(config, prepared, folder, console), CheckpointStore(runs.store_of(folder))
    texts = scifact_times.typed_queries(read_tokenizer(_text_of(config, "query")), rounds + 2)
    with served(folder, scifact) as (client, address):
        comparison = evaluate_version(checkpoints, version, scifact, asking(client, address, version)).comparison
        held = scifact_times.cached_query(client, _text_of(config, "query").name, texts, rounds)
    encoder = prepared.encoder
    model = TwoTowers(prepared.fitted.schema, encoder.query, encoder.item, config.model)
    threads = range(1, torch.get_num_threads() + 1)
    return comparison, [
        held,
        *(scifact_times.tower_beside_torch(checkpoints, version, model, texts[0], n, rounds) for n in threads),
    ]


def of_trained(settings: Settings, tables: Path, folder: Path, scifact: Path, console: Console) -> Comparison:
    """The test claims after a training, by exact search and through the service.

    Args:
        settings: The configuration.
        tables: Folder of what is trained on.
        folder: Of the run; what is there goes on.
        scifact: Folder of the data set.
        console: Gets the progress.
    """
    checkpoints, version = runs.published(settings, folder, tables, console)
    with served(folder, scifact) as (client, address):
        return evaluate_version(checkpoints, version, scifact, asking(client, address, version)).comparison


def peer_order(config: TrainerConfig, prepared: Prepared) -> dict[str, Any]:
    """What sentence-transformers is to train: the same adapters on the same encoder, by the same pairs."""
    feature = _text_of(config, "item")
    sides = prepared.encoder.raw_pairs(prepared.split.train)
    texts = [[value for row in sides[owner] for value in row.values()] for owner in ("query", "item")]
    return {
        "encoder": str(encoder_folder(feature)),
        "pairs": list(zip(*texts, strict=True)),
        "adapters": {
            "r": feature.lora_rank,
            "lora_alpha": feature.lora_alpha,
            "lora_dropout": feature.lora_dropout,
            "target_modules": list(feature.lora_targets),
        },
        "max_length": feature.max_length,
        "temperature": config.training.temperature,
        "weight_decay": config.training.weight_decay,
        "threads": torch.get_num_threads(),
    }


@contextmanager
def peer_started(python: Path, order: Mapping[str, Any]) -> Iterator[tuple[Process | None, str]]:
    """sentence-transformers, which waits to be asked for steps, and its version; None, and why, where it is not there.

    Args:
        python: That has it.
        order: As `peer_order` gives it.
    """
    with tempfile.TemporaryDirectory(prefix="peer-") as folder:
        file = Path(folder) / "order.json"
        file.write_text(json.dumps(order), encoding="utf-8")
        try:
            peer = Process([str(python), str(_PEER_SCRIPT), str(file)], {})
        except (OSError, RuntimeError) as error:
            yield None, f"{_PEER}: left out, {error}"
            return
        with peer:
            yield peer, peer.version


def take_peer_step(peer: Process, step: Step) -> None:
    """A step of sentence-transformers."""
    peer.ask(rows=step.rows.tolist(), learning_rate=step.learning_rate)


def train_by_peer(peer: Process, config: TrainerConfig, num_pairs: int, encoder: Path) -> None:
    """Has sentence-transformers take the steps of a training, and write the encoder that comes out.

    Args:
        peer: Was told what to train by `peer_order`.
        config: The configuration.
        num_pairs: That are trained on.
        encoder: Folder that gets it.
    """
    peer.ask(seed=config.training.seed)
    for step in scifact_times.steps_of(config, num_pairs):
        take_peer_step(peer, step)
    peer.ask(folder=str(encoder))


def of_peer(
    peer: Process, settings: Settings, tables: Path, folder: Path, scifact: Path, console: Console
) -> Comparison:
    """The test claims after a training by sentence-transformers, whose encoder is exported as it is, by exact search.

    Args:
        peer: Was told what to train by `peer_order`.
        settings: The configuration.
        tables: Folder of what is trained on.
        folder: Of the run; what an earlier one published there is used again.
        scifact: Folder of the data set.
        console: Gets a line if another publishes there.
    """
    config, encoder = parse_config(settings, CONFIG), (folder / "encoder").resolve()
    checkpoints = CheckpointStore(runs.store_of(folder))
    if not checkpoints.versions():
        train_by_peer(peer, config, len(prepare(config, tables).split.train), encoder)
    features = [{**feature, "encoder": str(encoder)} for feature in settings["features"]]
    config = parse_config({**settings, "features": features}, CONFIG)
    version = untrained(config, prepare(config, tables), folder, console)
    return evaluate_version(checkpoints, version, scifact).comparison


def rows_of(name: str, comparison: Comparison) -> Rows:
    """Of some towers: by exact search, and through the service if they were served."""
    models = {TOWERS: name, LIVE: f"{name}, live service"}
    return {
        row: [comparison.figures[model][metric].value for metric in METRICS]
        for model, row in models.items()
        if model in comparison.figures
    }


def cut_off(settings: Settings, scifact: Path) -> str:
    """What the item tower does not read of the abstracts.

    Args:
        settings: The configuration.
        scifact: Folder of the data set.
    """
    feature = _text_of(parse_config(settings, CONFIG), "item")
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
        if LIVE in comparison.figures
        for metric in METRICS
    )
    verdict = "reached" if largest <= MOST_LOST else "missed"
    return f"the service differs from exact search by {largest:.4f} at most, {MOST_LOST} asked: {verdict}"


def from_published(zero_shot: Comparison) -> str:
    """How far the encoder as it is comes from what is published of it."""
    (published,) = PUBLISHED[f"{_ENCODER} (published)"]
    found = zero_shot.figures[TOWERS][METRICS[0]].value
    verdict = "reached" if abs(found - published) <= MOST_FROM_PUBLISHED else "missed"
    return f"{_ENCODER} as it is has an NDCG@10 of {found:.4f}, {published} ± {MOST_FROM_PUBLISHED} asked: {verdict}"


def _distractors(corpus: pa.Table, claims: Sequence[str]) -> list[int]:
    documents = [
        f"{title} {text}" for title, text in zip(corpus["title"].to_pylist(), corpus["text"].to_pylist(), strict=True)
    ]
    scores = bm25_scores(Texts(claims, documents), np.arange(len(claims)))(0, len(claims))
    found: list[int] = corpus["doc_id"].take(scores.topk(_NUM_DISTRACTORS).indices.flatten().numpy()).to_pylist()
    return found


def _of(table: pa.Table, column: str, values: Sequence[int]) -> pa.Table:
    return table.filter(pc.is_in(table[column], pa.array(values, table[column].type)))


def _text_of(config: TrainerConfig, owner: Owner) -> TextFeature:
    (feature,) = config.feature_schema().of(owner)
    assert isinstance(feature, TextFeature)
    return feature


def _texts(queries: pa.Table) -> dict[int, str]:
    return dict(zip(queries["query_id"].to_pylist(), queries["text"].to_pylist(), strict=True))


def _in_fixed_order(texts: Mapping[int, str]) -> list[int]:
    return sorted(texts, key=lambda claim: hashlib.sha256(_normalised(texts[claim]).encode()).digest())


def _normalised(text: str) -> str:
    return " ".join(text.casefold().split())


def main() -> None:
    """Judges, trains, measures and prints the tables."""
    parser = runs.command_line(__doc__, "a sample of the claims, few steps, few rounds")
    parser.set_defaults(seeds=1)
    parser.add_argument(
        "--peer-python",
        type=Path,
        default=Path(sys.executable),
        help="a Python that has sentence-transformers and peft; else the one that runs this",
    )
    arguments = parser.parse_args()
    console, length = Console(), QUICK if arguments.quick else FULL
    scifact, folder = runs.folder_of("scifact"), arguments.runs / ("scifact-quick" if arguments.quick else "scifact")
    tables = folder / "data"
    tables.mkdir(parents=True, exist_ok=True)
    if length.num_claims:
        (folder / "sample").mkdir(exist_ok=True)
        write_sample(scifact, folder / "sample", length.num_claims)
        scifact = folder / "sample"
    write_tables(scifact, tables, length.num_validation)
    settings = runs.changed(
        runs.read_settings(CONFIG),
        {"data": DATA, "training": {"epochs": length.epochs} if length.epochs else {}},
    )
    console.print(cut_off(settings, scifact), highlight=False)
    config = parse_config(settings, CONFIG)
    prepared = prepare(config, tables)
    zero_shot, ratios = of_untrained(config, prepared, folder / "untrained", scifact, length.query_rounds, console)
    found = {"zero-shot": zero_shot}
    with peer_started(arguments.peer_python, peer_order(config, prepared)) as (peer, about_peer):
        if peer is not None:
            peer.ask(seed=0)
            steps = scifact_times.steps_of(config, len(prepared.split.train))
            ours, theirs = OurSteps(config, prepared), partial(take_peer_step, peer)
            ratios.append(scifact_times.steps_beside(ours, theirs, _PEER, steps, length.step_rounds))
        for seed in range(arguments.seeds):
            seeded = runs.changed(settings, {"training": {"seed": seed}})
            found[f"LoRA, seed {seed}"] = of_trained(seeded, tables, folder / str(seed), scifact, console)
            if peer is not None:
                found[f"{_PEER}, seed {seed}"] = of_peer(
                    peer, seeded, tables, folder / f"{_PEER}-{seed}", scifact, console
                )

    bm25 = zero_shot.figures["bm25"]
    rows: Rows = {**PUBLISHED, "BM25": [bm25[metric].value for metric in METRICS]}
    for name, comparison in found.items():
        rows |= rows_of(name, comparison)
    claims = (
        f"{zero_shot.num_queries:,} of the test claims, no published row is of them" if length.num_claims else "test"
    )
    table = runs.shown(f"SciFact; {claims}", METRICS, rows)
    table.caption = "\n".join([*([] if length.num_claims else [from_published(zero_shot)]), lost(found), about_peer])
    console.print(table)
    console.print(scifact_times.shown(ratios))
    if arguments.json:
        figures = {
            "models": {name: as_json(comparison) for name, comparison in found.items()},
            "ratios": [{**asdict(ratio), "ratio": ratio.ratio} for ratio in ratios],
            "peer": about_peer,
        }
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
