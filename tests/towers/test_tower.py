import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from toy_checkpoint import ToyModel, toy_model

from towers.checkpoint import CheckpointStore, GoldenExamples, TowerFiles
from towers.errors import CorruptArtefactError, GoldenDriftError, InvalidFeatureError
from towers.schema import Owner
from towers.store import Store
from towers.tower import GOLDEN_TOLERANCE, OUTPUT_NAME, Tower

OWNERS: Sequence[Owner] = ("query", "item")


@pytest.fixture
def model() -> ToyModel:
    return toy_model()


@pytest.fixture
def published(model: ToyModel, folder_url: str) -> dict[Owner, TowerFiles]:
    checkpoints = CheckpointStore(Store(folder_url))
    checkpoints.publish(model.draft())
    return {owner: checkpoints.load(1, owner) for owner in OWNERS}


def _with_weights(content: bytes, change: Any) -> bytes:
    """The graph with each float table replaced by `change` of it."""
    graph = onnx.load_model_from_string(content)
    for tensor in graph.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.dtype == np.float32 and array.ndim == 2:
            tensor.CopyFrom(numpy_helper.from_array(change(array).astype(np.float32), tensor.name))
    return graph.SerializeToString()


@pytest.mark.parametrize("owner", OWNERS)
def test_golden_examples_come_out(published: dict[Owner, TowerFiles], owner: Owner) -> None:
    tower = Tower(published[owner])
    assert tower.golden_difference < 1e-6
    assert (tower.version, tower.owner, tower.dim) == (1, owner, 8)
    golden = published[owner].golden
    embeddings = tower.embed_rows(golden.features)
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(embeddings, golden.embeddings, atol=1e-6)


def test_a_batch_is_its_rows(published: dict[Owner, TowerFiles], model: ToyModel) -> None:
    tower = Tower(published["query"], num_threads=2)
    queries = [
        {"user_id": "1", "history": [str(number) for number in range(1, 31)]},
        {"user_id": "2"},
        {},
        {"user_id": "nobody", "history": ["nothing", "5"]},
    ]
    together = tower.embed_rows(queries)
    np.testing.assert_allclose(together, model.query_embeddings(queries), atol=1e-6)
    for query, embedding in zip(queries, together, strict=True):
        np.testing.assert_allclose(tower.embed_rows([query])[0], embedding, atol=1e-6)


def test_a_wrong_feature_is_the_callers_fault(published: dict[Owner, TowerFiles]) -> None:
    with pytest.raises(InvalidFeatureError, match="'history'"):
        Tower(published["query"]).embed_rows([{"history": "5"}])


@pytest.mark.parametrize("owner", OWNERS)
def test_drift_is_refused(published: dict[Owner, TowerFiles], owner: Owner) -> None:
    files = published[owner]
    for shift, is_refused in ((GOLDEN_TOLERANCE * 0.5, False), (GOLDEN_TOLERANCE * 2, True), (np.nan, True)):
        embeddings = [list(row) for row in files.golden.embeddings]
        embeddings[-1][3] += shift
        drifted = dataclasses.replace(
            files, golden=GoldenExamples(features=files.golden.features, embeddings=embeddings)
        )
        if is_refused:
            with pytest.raises(GoldenDriftError, match=f"checkpoint 1: golden {owner} embeddings differ by"):
                Tower(drifted)
        else:
            assert Tower(drifted).golden_difference == pytest.approx(shift, rel=0.1)


def test_tampered_golden_examples_are_refused_even_when_signed(model: ToyModel, folder_url: str) -> None:
    checkpoints = CheckpointStore(Store(folder_url))
    draft = model.draft()
    other = toy_model(seed=2).draft()
    checkpoints.publish(dataclasses.replace(draft, golden=other.golden))
    checkpoints.publish(dataclasses.replace(draft, towers=other.towers))
    checkpoints.publish(
        dataclasses.replace(draft, towers={"query": draft.towers["item"], "item": draft.towers["query"]})
    )
    checkpoints.publish(
        dataclasses.replace(draft, vocabularies={**draft.vocabularies, "item_id": model.item_ids[::-1]})
    )
    for version in (1, 2):
        for owner in OWNERS:
            with pytest.raises(GoldenDriftError):
                Tower(checkpoints.load(version, owner))
    for owner in OWNERS:
        with pytest.raises(CorruptArtefactError, match=f"the {owner} tower does not run"):
            Tower(checkpoints.load(3, owner))
    with pytest.raises(GoldenDriftError):
        Tower(checkpoints.load(4, "item"))


@pytest.mark.parametrize("owner", OWNERS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(
    published: dict[Owner, TowerFiles], owner: Owner, value: float
) -> None:
    broken = _with_weights(published[owner].onnx, lambda table: np.full_like(table, value))
    with pytest.raises(GoldenDriftError):
        Tower(dataclasses.replace(published[owner], onnx=broken))


def test_embeddings_must_be_unit_vectors_or_zero(published: dict[Owner, TowerFiles], model: ToyModel) -> None:
    files = published["item"]
    graph = onnx.load_model_from_string(files.onnx)
    normalise = next(node for node in graph.graph.node if node.op_type == "LpNormalization")
    normalise.op_type = "Identity"
    del normalise.attribute[:]
    rows = [{"item_id": "1"}, {"item_id": "2"}]
    golden = GoldenExamples(features=rows, embeddings=model.item_table[2:4].astype(float).tolist())
    unnormalised = graph.SerializeToString()
    with pytest.raises(GoldenDriftError, match="neither unit vectors nor zero"):
        Tower(dataclasses.replace(files, onnx=unnormalised, golden=golden))
    saying_nothing = _with_weights(unnormalised, np.zeros_like)
    zero = GoldenExamples(features=rows, embeddings=np.zeros((2, 8)).tolist())
    tower = Tower(dataclasses.replace(files, onnx=saying_nothing, golden=zero))
    assert not tower.embed_rows(rows).any()


@pytest.mark.parametrize("content", [b"", b"not a graph", bytes(1000)])
def test_bytes_that_are_no_graph(published: dict[Owner, TowerFiles], content: bytes) -> None:
    with pytest.raises(CorruptArtefactError, match="checkpoint 1: the item tower does not load"):
        Tower(dataclasses.replace(published["item"], onnx=content))


def test_a_graph_that_does_not_fit_the_schema(published: dict[Owner, TowerFiles]) -> None:
    files = published["item"]
    for old, new, reason in (
        ("feature_item_id", "feature_other", "does not run"),
        (OUTPUT_NAME, "another_output", "does not run"),
    ):
        graph = onnx.load_model_from_string(files.onnx)
        for node in graph.graph.node:
            node.input[:] = [new if name == old else name for name in node.input]
            node.output[:] = [new if name == old else name for name in node.output]
        for value in (*graph.graph.input, *graph.graph.output):
            value.name = new if value.name == old else value.name
        with pytest.raises(CorruptArtefactError, match=reason):
            Tower(dataclasses.replace(files, onnx=graph.SerializeToString()))


def test_a_table_that_is_too_small_for_the_vocabulary(published: dict[Owner, TowerFiles]) -> None:
    # The golden examples know the first items only; the whole table is this short.
    short = _with_weights(published["item"].onnx, lambda table: table[:2])
    with pytest.raises(CorruptArtefactError, match="does not run"):
        Tower(dataclasses.replace(published["item"], onnx=short))


@pytest.mark.parametrize(
    ("features", "embeddings", "reason"),
    [
        ([], [], "no golden item examples"),
        ([{"item_id": "1"}], [], "golden embeddings are"),
        ([{"item_id": "1"}], [[1.0]], "golden embeddings are"),
        ([{"item_id": "1"}], [[1.0] * 8, [1.0] * 8], "golden embeddings are"),
        ([{"item_id": "1"}, {"item_id": "2"}], [[1.0] * 8, [1.0]], "differ in length"),
        ([{"item_id": 1.5}], [[1.0] * 8], "do not encode: row 0: feature 'item_id'"),
        ([{"user_id": "1"}], [[1.0] * 8], "do not encode: unknown feature 'user_id'"),
    ],
)
def test_golden_examples_that_fit_nothing(
    published: dict[Owner, TowerFiles], features: list[Any], embeddings: list[Any], reason: str
) -> None:
    golden = GoldenExamples(features=features, embeddings=embeddings)
    with pytest.raises(CorruptArtefactError, match=reason):
        Tower(dataclasses.replace(published["item"], golden=golden))


def test_a_wrong_dim_in_the_manifest(published: dict[Owner, TowerFiles]) -> None:
    files = published["item"]
    manifest = files.manifest.model_copy(update={"dim": 9})
    with pytest.raises(CorruptArtefactError, match="the manifest's dim is 9"):
        Tower(dataclasses.replace(files, manifest=manifest))


def test_two_versions_live_side_by_side(folder_url: str) -> None:
    checkpoints = CheckpointStore(Store(folder_url))
    models = {1: toy_model(dim=4, seed=1), 2: toy_model(dim=12, seed=2, num_items=80)}
    for model in models.values():
        checkpoints.publish(model.draft())
    towers = {version: Tower(checkpoints.load(version, "query")) for version in models}
    query = {"user_id": "3", "history": ["4", "79"]}
    for version, model in models.items():
        np.testing.assert_allclose(towers[version].embed_rows([query]), model.query_embeddings([query]), atol=1e-6)
