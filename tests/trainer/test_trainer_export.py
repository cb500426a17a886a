from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from towers.errors import InvalidInputError, TwoTowerError
from towers.features import FeatureEncoder
from towers.schema import Owner
from trainer import export
from trainer.config import TrainerConfig
from trainer.model import TwoTowers
from trainer.run import Prepared, prepare

Configure = Callable[..., TrainerConfig]


@pytest.fixture
def prepared(world: Path, configure: Configure) -> Prepared:
    return prepare(configure(), world)


def untrained(prepared: Prepared, config: TrainerConfig) -> TwoTowers:
    """Random towers whose missing and unknown rows are not zero, so that a wrong row shows."""
    torch.manual_seed(0)
    model = TwoTowers(prepared.fitted.schema, prepared.encoder.query, prepared.encoder.item, config.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


@pytest.mark.parametrize("pooling", ["attention", "transformer"])
def test_exported_histories_equal_torch_at_any_length(world: Path, configure: Configure, pooling: str) -> None:
    """Toy histories hold at most 5 items; those of callers none, one, five, or more than are kept."""
    config = configure(history__pooling=pooling, item_id__min_count=1, model__normalisation="layer")
    prepared = prepare(config, world)
    model = untrained(prepared, config).eval()
    encoder = prepared.encoder.query
    lengths = (0, 1, 2, 4, 5, 6, 200)
    rows = [{"user_id": "1", "history": [str(item % 40) for item in range(length)]} for length in lengths]
    golden = export.GoldenExamples(
        features=rows, embeddings=export.torch_embeddings(model.query, encoder, rows).tolist()
    )
    tower = export.load_unpublished("query", export.export_onnx(model.query, encoder), golden, prepared.fitted)
    assert export.difference(tower, model.query, encoder, rows) <= export.TOLERANCE
    together = tower.embed_rows(rows)
    for row, expected in zip(rows, together, strict=True):
        np.testing.assert_allclose(tower.embed_rows([row])[0], expected, atol=1e-6)
    # The order counts, and each length says something of its own.
    backwards = tower.embed_rows([{**row, "history": row["history"][::-1]} for row in rows])
    assert (np.abs(together - backwards).max(axis=1) > 1e-3).tolist() == [length > 1 for length in lengths]
    assert len(np.unique(together[:-1].round(3), axis=0)) == len(lengths) - 1


def test_exported_towers_equal_torch_for_every_kind_of_feature(
    prepared: Prepared, configure: Configure, capfd: pytest.CaptureFixture[str]
) -> None:
    model = untrained(prepared, configure())
    encoders: Mapping[Owner, FeatureEncoder] = {"query": prepared.encoder.query, "item": prepared.encoder.item}
    rows: Mapping[Owner, export.Rows] = {
        "query": prepared.encoder.raw_queries(prepared.split.test.tolist()),
        "item": prepared.encoder.raw_items(range(40)),
    }
    validation = prepared.encoder.raw_queries(prepared.split.validation.tolist())
    exported = export.export_towers(model, prepared.fitted, encoders, rows, validation)
    assert exported.validation_queries is not None
    np.testing.assert_allclose(
        exported.validation_queries, export.torch_embeddings(model.query, prepared.encoder.query, validation), atol=1e-5
    )
    assert all(0 <= difference <= export.TOLERANCE for difference in exported.differences.values())
    for owner in encoders:
        golden = exported.golden[owner]
        assert len(golden.features) == 18
        assert golden.features[-2] == {}
        unknown = golden.features[-1]
        assert unknown
        ids = encoders[owner].encode_rows([unknown])
        assert all(ids[name].max() <= 8 for name in unknown)
        # Known, missing and unknown must not look alike, else a golden replay could not tell them apart.
        embeddings = np.array(golden.embeddings)
        assert (embeddings[-1] * embeddings[-2]).sum() < 0.999
        assert (embeddings[0] * embeddings[-2]).sum() < 0.999
    assert capfd.readouterr() == ("", "")

    # A tower of other weights does not pass for the exported one.
    tower = export.load_unpublished("item", exported.onnx["item"], exported.golden["item"], prepared.fitted)
    with torch.no_grad():
        model.item.projection[-1].bias += 0.01
    with pytest.raises(TwoTowerError, match=r"the exported item tower differs from the trained one by .*; it is not"):
        export.difference(tower, model.item, prepared.encoder.item, rows["item"])


def test_a_tower_too_large_for_onnx_is_refused(prepared: Prepared, configure: Configure) -> None:
    with torch.device("meta"):
        model = untrained(prepared, configure(model__item_hidden=[30_000, 20_000]))
    with pytest.raises(InvalidInputError, match=r"the item tower has 2\.4 GB of parameters, more than the 2 GB"):
        export.export_onnx(model.item, prepared.encoder.item)


def test_the_unknown_row_names_ids_that_training_never_saw(prepared: Prepared) -> None:
    row = export.unknown_row(prepared.fitted.schema, "query")
    assert row.keys() == {"user_id", "history", "segment", "interests"}
    assert prepared.encoder.query.encode_rows([row])["user_id"].tolist() == [1]
