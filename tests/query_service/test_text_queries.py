"""Queries that are a text: tokenised by the checkpoint's own file, embedded once, found again."""

import asyncio
import json
from dataclasses import replace

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from query_system import World
from test_embed import desk
from tokenizers import Tokenizer, models, pre_tokenizers
from toy_checkpoint import TOY_FEATURES, toy_model

from towers.checkpoint import CheckpointDraft, CheckpointStore, GoldenExamples
from towers.schema import parse_schema
from towers.tower import input_name

WORDS = ["red", "green", "blue", "apple"]
DIM = 4


def with_text(draft: CheckpointDraft) -> CheckpointDraft:
    """A query tower whose text is the sum of its words' unit vectors, normalised."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, **{w: i for i, w in enumerate(WORDS, 1)}}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_padding(length=128)
    table = np.zeros((2 + len(WORDS), DIM), dtype=np.float32)
    table[2:] = np.eye(DIM)
    nodes = [
        helper.make_node("Gather", ["table", input_name("text")], ["vectors"]),
        helper.make_node("ReduceSum", ["vectors", "length_axis"], ["sum"], keepdims=0),
        helper.make_node("ReduceL2", ["sum", "last_axis"], ["norm"], keepdims=1),
        helper.make_node("Max", ["norm", "floor"], ["divisor"]),
        helper.make_node("Div", ["sum", "divisor"], ["tower_output"]),
    ]
    constants = {
        "table": table,
        "length_axis": np.array([1], dtype=np.int64),
        "last_axis": np.array([-1], dtype=np.int64),
        "floor": np.array(1e-6, dtype=np.float32),
    }
    graph = helper.make_graph(
        nodes,
        "query_tower",
        [helper.make_tensor_value_info(input_name("text"), TensorProto.INT64, ["batch", "length"])],
        [helper.make_tensor_value_info("tower_output", TensorProto.FLOAT, ["batch", DIM])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    tower: onnx.ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    text = {"name": "text", "owner": "query", "kind": "text", "encoder": "words", "max_length": 8}
    return replace(
        draft,
        schema=parse_schema([text, TOY_FEATURES[2]]),
        vocabularies={"item_id": draft.vocabularies["item_id"]},
        tokenizers={"text": tokenizer.to_str()},
        towers={**draft.towers, "query": tower.SerializeToString()},
        golden={**draft.golden, "query": GoldenExamples(features=[{"text": "red"}], embeddings=[[1, 0, 0, 0]])},
    )


def test_a_repeated_text_skips_the_tower(empty_world: World) -> None:
    CheckpointStore(empty_world.store).publish(with_text(toy_model(dim=DIM, seed=1).draft()))
    empty_world.deploy(live=1)

    async def check() -> None:
        async with desk(empty_world) as at:
            first = await at.embed({"text": "red apple"}, {"text": "blue"})
            expected = np.array([[1, 0, 0, 1], [0, 0, 1, 0]]) / [[np.sqrt(2)], [1]]
            np.testing.assert_allclose(first.embeddings, expected, atol=1e-6)
            assert list(first.is_cached) == [False, False]
            # Beside a longer text it is padded, and still the same query.
            again = await at.embed({"text": "green green green green"}, {"text": "blue"}, {"text": "red apple"})
            assert list(again.is_cached) == [False, True, True]
            assert again.embeddings[1:].tobytes() == first.embeddings[::-1].tobytes()
            assert at.held.tower.num_batches == 2

    asyncio.run(check())


def test_the_tokenizer_is_a_file_of_the_checkpoint(empty_world: World) -> None:
    manifest = CheckpointStore(empty_world.store).publish(with_text(toy_model(dim=DIM, seed=1).draft()))
    assert manifest.files["tokenizer/text.json"].size_bytes > 0
    files = CheckpointStore(empty_world.store).load(1, "query")
    assert json.loads(files.tokenizers["text"])["model"]["vocab"].keys() == {"[UNK]", *WORDS}
    assert not CheckpointStore(empty_world.store).load(1, "item").tokenizers
