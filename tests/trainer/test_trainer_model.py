from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from towers.features import FeatureEncoder
from towers.schema import parse_schema
from trainer import losses
from trainer.config import ModelConfig
from trainer.model import TwoTowers, normalised
from trainer.state import parameters_of

SHARED_DIM = 16
RANDOM_DIM = 16


def build(
    features: Sequence[Mapping[str, Any]], vocabularies: Mapping[str, Sequence[str]], config: ModelConfig
) -> tuple[TwoTowers, FeatureEncoder, FeatureEncoder]:
    schema = parse_schema(features)
    query, item = (FeatureEncoder(schema, owner, vocabularies) for owner in ("query", "item"))
    torch.manual_seed(0)
    return TwoTowers(schema, query, item, config), query, item


HISTORY = {"name": "history", "owner": "query", "kind": "sequence", "items": "item_id"}
ITEM = {"name": "item_id", "owner": "item", "kind": "categorical"}


def test_paired_features_are_told_apart() -> None:
    """Each pair shares 16 numbers up to noise of 0.1, the others are random: the towers must learn which to compare."""
    width = SHARED_DIM + RANDOM_DIM
    features = [
        {"name": name, "owner": owner, "kind": "vector", "size": width}
        for name, owner in (("query_vector", "query"), ("item_vector", "item"))
    ]
    model, _, _ = build(features, {}, ModelConfig(dim=32, query_hidden=(64,), item_hidden=(64,)))
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.003, fused=True)
    generator = torch.Generator().manual_seed(0)

    def random(dim: int) -> torch.Tensor:
        return torch.randn(64, dim, generator=generator)

    ids = torch.arange(64)
    log_q = torch.full((64,), -float(np.log(64)))
    recalls = []
    for _ in range(500):
        shared = random(SHARED_DIM)
        query = torch.cat([shared + 0.1 * random(SHARED_DIM), random(RANDOM_DIM)], dim=1)
        item = torch.cat([random(RANDOM_DIM), shared + 0.1 * random(SHARED_DIM)], dim=1)
        queries, items = model.query({"query_vector": query}), model.item({"item_vector": item})
        recalls.append(float(((queries @ items.T).argmax(dim=1) == ids).float().mean()))
        loss = losses.softmax_loss(queries, items, log_q, ids, losses.accidental_hits(ids, ids), 0.05)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    assert recalls[0] < 0.2
    assert max(recalls) == 1.0
    assert np.mean(recalls[-20:]) > 0.98


def test_normalised_vectors_have_length_one_and_zero_stays_finite() -> None:
    vectors = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-4, 0.0]], requires_grad=True)
    unit = normalised(vectors)
    assert unit[0].tolist() == pytest.approx([0.6, 0.8])
    assert unit[1].tolist() == [0.0, 0.0]
    assert unit[2, 0].item() == pytest.approx(1.0, abs=1e-3)
    unit.sum().backward()
    assert vectors.grad is not None
    assert torch.isfinite(vectors.grad).all()


def test_history_shares_the_table_of_the_item() -> None:
    model, query, item = build([HISTORY, ITEM], {"item_id": ["a", "b"]}, ModelConfig(dim=4, embedding_dim=3))
    names = parameters_of(model)
    assert sum("tables" in name for name in names) == 1
    [table] = [value for name, value in names.items() if "tables" in name]
    assert table.shape == (4, 3)
    features = {name: torch.from_numpy(array) for name, array in query.encode_rows([{"history": ["b"]}]).items()}
    before = model.item({"item_id": torch.tensor([3])})
    model.query(features).sum().backward()
    assert table.grad is not None
    assert table.grad[3].abs().sum() > 0
    with torch.no_grad():
        table[3] += 1.0
    assert not torch.allclose(model.item({"item_id": torch.tensor([3])}), before)
    assert item.num_ids("item_id") == 4


def test_missing_and_unknown_say_nothing_at_first() -> None:
    hashed = {"name": "brand", "owner": "item", "kind": "categorical", "hash_buckets": 3}
    model, _, _ = build([HISTORY, ITEM, hashed], {"item_id": ["a"]}, ModelConfig(dim=4, embedding_dim=3))
    tables = {name: value for name, value in parameters_of(model).items() if "tables" in name}
    [ids] = [value for value in tables.values() if value.shape == (3, 3)]
    [buckets] = [value for value in tables.values() if value.shape == (4, 3)]
    assert ids.abs().sum(dim=1).gt(0).tolist() == [False, False, True]
    assert buckets.abs().sum(dim=1).gt(0).tolist() == [False, True, True, True]


@pytest.mark.parametrize("pooling", ["mean", "attention", "transformer"])
def test_padding_and_batch_do_not_change_an_embedding(pooling: str) -> None:
    history = {**HISTORY, "pooling": pooling}
    model, query, _ = build([history, ITEM], {"item_id": list("abcdef")}, ModelConfig(dim=4, query_hidden=(5,)))
    model.eval()
    rows = [{"history": list("ab")}, {"history": list("fedcba")}, {}]

    def embeddings(batch: Sequence[Mapping[str, Any]]) -> torch.Tensor:
        arrays = query.encode_rows(batch)
        with torch.inference_mode():
            return model.query({name: torch.from_numpy(array) for name, array in arrays.items()})

    together = embeddings(rows)
    for row, expected in zip(rows, together, strict=True):
        assert torch.allclose(embeddings([row])[0], expected, atol=1e-6)
    assert torch.allclose(together.norm(dim=1), torch.ones(3), atol=1e-5)


def test_without_hidden_layers_a_tower_is_a_linear_projection() -> None:
    vector = {"name": "v", "owner": "query", "kind": "vector", "size": 3}
    model, _, _ = build([vector, ITEM], {"item_id": ["a"]}, ModelConfig(dim=2))
    values = torch.tensor([[1.0, 2.0, 3.0]])
    linear = model.query.projection[-1]
    assert torch.equal(model.query({"v": values}), normalised(functional.linear(values, linear.weight, linear.bias)))


def test_a_linear_projection_starts_as_the_sum_of_the_embeddings() -> None:
    history = {"name": "history", "owner": "query", "kind": "sequence", "items": "item_id"}
    vector = {"name": "v", "owner": "query", "kind": "vector", "size": 3}
    model, _, _ = build([history, vector, ITEM], {"item_id": ["a", "b"]}, ModelConfig(dim=4, embedding_dim=4))
    query = {"history": torch.tensor([[2, 3]]), "v": torch.zeros(1, 3)}
    table = model.item.tables["feature_item_id"].weight
    assert torch.allclose(model.query(query), normalised(table[2:].mean(dim=0, keepdim=True)))
    assert torch.equal(model.item({"item_id": torch.tensor([2, 3])}), normalised(table[2:]))
    assert model.query(query | {"v": torch.ones(1, 3)}).allclose(model.query(query)) is False


def test_hidden_layers_are_normalised_before_their_activation() -> None:
    vector = {"name": "v", "owner": "query", "kind": "vector", "size": 3}
    config = ModelConfig(dim=2, query_hidden=(4, 5), activation="silu", normalisation="layer")
    model, _, _ = build([vector, ITEM], {"item_id": ["a"]}, config)
    layers = [layer for layer in model.query.projection if not isinstance(layer, nn.Dropout)]
    assert [type(layer) for layer in layers] == [*[nn.Linear, nn.LayerNorm, nn.SiLU] * 2, nn.Linear]
    first = layers[1](layers[0](torch.tensor([[100.0, -2.0, 3.0]])))
    assert first.mean().item() == pytest.approx(0, abs=1e-5)
    assert first.std(correction=0).item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("name", ["items", "type", "keys", "training"])
def test_feature_names_that_torch_modules_use_themselves(name: str) -> None:
    feature = {"name": name, "owner": "query", "kind": "categorical"}
    model, _, _ = build([feature, ITEM], {name: ["a"], "item_id": ["a"]}, ModelConfig(dim=2))
    assert model.query({name: torch.tensor([2])}).shape == (1, 2)


def test_dropout_acts_in_training_only() -> None:
    vector = {"name": "v", "owner": "query", "kind": "vector", "size": 50}
    model, _, _ = build([vector, ITEM], {"item_id": ["a"]}, ModelConfig(dim=3, dropout=0.5))
    values = torch.ones(1, 50)
    model.train()
    assert not torch.equal(model.query({"v": values}), model.query({"v": values}))
    model.eval()
    assert torch.equal(model.query({"v": values}), model.query({"v": values}))
