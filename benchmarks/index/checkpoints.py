"""Checkpoints of any size with known embeddings: towers that look rows of tables up, as ONNX, and a matching catalogue.

Deliberately does not know torch or training: the right answer to every query is exact search over the tables.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from towers.checkpoint import CheckpointDraft, GoldenExamples
from towers.schema import Owner, parse_schema
from towers.tower import OUTPUT_NAME, input_name

USER_ID = "user_id"
ITEM_ID = "item_id"
_OPSET = 18
_IR_VERSION = 10
_NUM_SPECIAL_ROWS = 2
"""Row 0 is the missing id, row 1 the unknown one."""
_NUM_GOLDEN = 4


def lookup_checkpoint(
    items: NDArray[np.float32], queries: NDArray[np.float32], item_column: str = ITEM_ID
) -> CheckpointDraft:
    """A checkpoint that embeds item "0" as row 0 of `items`, user "0" as row 0 of `queries`, and so on.

    Args:
        items: `[N, D]` unit vectors.
        queries: `[Q, D]` unit vectors.
        item_column: The attribute that says which row an item is.
    """
    tables: dict[Owner, NDArray[np.float32]] = {"query": queries, "item": items}
    names: dict[Owner, str] = {"query": USER_ID, "item": item_column}
    return CheckpointDraft(
        dim=items.shape[1],
        schema=parse_schema([{"name": names[owner], "owner": owner, "kind": "categorical"} for owner in names]),
        vocabularies={names[owner]: ids(len(table)) for owner, table in tables.items()},
        towers={owner: _tower(owner, names[owner], table) for owner, table in tables.items()},
        golden={
            owner: GoldenExamples(
                features=[{names[owner]: row} for row in ids(_NUM_GOLDEN)], embeddings=table[:_NUM_GOLDEN].tolist()
            )
            for owner, table in tables.items()
        },
        metrics={},
        config={"model": "lookup"},
        data_window=None,
        code_revision="benchmark",
        parent_version=None,
        validation_queries=queries,
    )


def lookup_items(num_items: int) -> pa.Table:
    """The catalogue: items "0" to "N - 1" with a title and a year."""
    numbers = np.arange(num_items)
    return pa.table(
        {
            ITEM_ID: pa.array(ids(num_items)),
            "title": pa.array([f"Title of item {number}" for number in numbers.tolist()]),
            "year": pa.array(1950 + numbers % 70),
        }
    )


def ids(count: int) -> Sequence[str]:
    """Ids "0" to "count - 1"."""
    return [str(number) for number in range(count)]


def _tower(owner: Owner, name: str, table: NDArray[np.float32]) -> bytes:
    special = np.eye(_NUM_SPECIAL_ROWS, table.shape[1], dtype=np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", input_name(name)], ["row"]),
            helper.make_node("LpNormalization", ["row"], [OUTPUT_NAME], axis=1, p=2),
        ],
        f"{owner}_tower",
        [helper.make_tensor_value_info(input_name(name), TensorProto.INT64, ["batch"])],
        [helper.make_tensor_value_info(OUTPUT_NAME, TensorProto.FLOAT, ["batch", table.shape[1]])],
        [numpy_helper.from_array(np.concatenate((special, table)), "table")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION)
    return bytes(model.SerializeToString())
