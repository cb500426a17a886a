"""A tiny real checkpoint: ONNX towers over random tables, their exact embeddings in numpy, and a matching catalogue.

Deliberately does not know torch or training: versions differ by seed and dimension, and the right answers are known.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from towers.checkpoint import CheckpointDraft, GoldenExamples
from towers.schema import FeatureSchema, Owner, parse_schema
from towers.tower import OUTPUT_NAME, input_name

_OPSET = 18
_IR_VERSION = 10
_GENRES = ("Action", "Comedy", "Drama")

TOY_FEATURES: Sequence[Mapping[str, Any]] = (
    {"name": "user_id", "owner": "query", "kind": "categorical"},
    {"name": "history", "owner": "query", "kind": "sequence", "items": "item_id", "max_length": 20},
    {"name": "item_id", "owner": "item", "kind": "categorical"},
)
"""What the towers read: a user, the items seen before, an item."""


@dataclass(frozen=True)
class ToyModel:
    """Two towers that look up rows of random tables; users are "1" to "U", items "1" to "N".

    A query is normalise(user row + mean of the history's item rows), an item is normalise(item row). Row 0 of a table
    is the missing id, row 1 the unknown one, so unknown users and items have embeddings too.
    """

    schema: FeatureSchema
    user_table: NDArray[np.float32]
    """`[U + 2, D]`"""
    item_table: NDArray[np.float32]
    """`[N + 2, D]`"""

    @property
    def dim(self) -> int:
        return self.user_table.shape[1]

    @property
    def user_ids(self) -> list[str]:
        return _numbered(len(self.user_table) - 2)

    @property
    def item_ids(self) -> list[str]:
        return _numbered(len(self.item_table) - 2)

    def validation_queries(self) -> list[Mapping[str, Any]]:
        """Raw features of the queries whose embeddings go with the checkpoint: each user after two items."""
        items = self.item_ids
        return [
            {"user_id": user_id, "history": [items[i % len(items)], items[7 * i % len(items)]]}
            for i, user_id in enumerate(self.user_ids)
        ]

    def query_embeddings(self, queries: Sequence[Mapping[str, Any]]) -> NDArray[np.float64]:
        """Exact embeddings `[B, D]` of queries such as `{"user_id": "1", "history": ["2", "3"]}`."""
        max_length = TOY_FEATURES[1]["max_length"]
        sums = []
        for query in queries:
            user = _row(query.get("user_id"), len(self.user_table))
            history = [_row(item_id, len(self.item_table)) for item_id in query.get("history", ())]
            known = [row for row in history if row > 1][-max_length:]
            mean = self.item_table[known].astype(np.float64).mean(axis=0) if known else np.zeros(self.dim)
            sums.append(self.user_table[user].astype(np.float64) + mean)
        return _normalised(np.array(sums))

    def item_embeddings(self, item_ids: Sequence[str]) -> NDArray[np.float64]:
        """Exact embeddings `[N, D]` of items."""
        rows = [_row(item_id, len(self.item_table)) for item_id in item_ids]
        return _normalised(self.item_table[rows].astype(np.float64))

    def nearest(
        self, query: Mapping[str, Any], item_ids: Sequence[str], k: int
    ) -> tuple[list[str], NDArray[np.float64]]:
        """The k best of `item_ids` for a query by exact search, best first: ids and scores `[K]`."""
        scores = self.item_embeddings(item_ids) @ self.query_embeddings([query])[0]
        best = np.argsort(-scores, kind="stable")[:k]
        return [item_ids[i] for i in best], scores[best]

    def draft(self, metrics: Mapping[str, float] | None = None, parent_version: int | None = None) -> CheckpointDraft:
        """The checkpoint, ready to be published.

        Args:
            metrics: Offline figures; `test.recall_at_10` is 0.1 when left out.
            parent_version: The version trained from.
        """
        queries = [
            {"user_id": "1", "history": ["1", "2", "3"]},
            {"user_id": "2", "history": []},
            {"user_id": "nobody", "history": ["nothing", "2"]},
            {},
        ]
        validation = self.query_embeddings(self.validation_queries()).astype(np.float32)
        items = [{"item_id": item_id} for item_id in (*self.item_ids[:3], "nothing")]
        return CheckpointDraft(
            dim=self.dim,
            schema=self.schema,
            vocabularies={"user_id": self.user_ids, "item_id": self.item_ids},
            towers={"query": self._query_tower(), "item": self._item_tower()},
            golden={
                "query": _golden(queries, self.query_embeddings(queries)),
                "item": _golden(items, self.item_embeddings([item["item_id"] for item in items])),
            },
            metrics=metrics if metrics is not None else {"test.recall_at_10": 0.1},
            config={"model": "toy", "dim": self.dim},
            data_window=None,
            code_revision="toy",
            parent_version=parent_version,
            validation_queries=validation[np.isfinite(validation).all(axis=1)],
        )

    def _query_tower(self) -> bytes:
        nodes = [
            helper.make_node("Gather", ["user_table", input_name("user_id")], ["user"]),
            helper.make_node("Gather", ["item_table", input_name("history")], ["history_rows"]),
            helper.make_node("Equal", [input_name("history"), "zero"], ["is_padding"]),
            helper.make_node("Not", ["is_padding"], ["is_item"]),
            helper.make_node("Cast", ["is_item"], ["mask"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["mask", "last_axis"], ["mask_column"]),
            helper.make_node("Mul", ["history_rows", "mask_column"], ["masked"]),
            helper.make_node("ReduceSum", ["masked", "length_axis"], ["history_sum"], keepdims=0),
            helper.make_node("ReduceSum", ["mask", "length_axis"], ["count"], keepdims=1),
            helper.make_node("Max", ["count", "one"], ["divisor"]),
            helper.make_node("Div", ["history_sum", "divisor"], ["history_mean"]),
            helper.make_node("Add", ["user", "history_mean"], ["sum"]),
            helper.make_node("LpNormalization", ["sum"], [OUTPUT_NAME], axis=1, p=2),
        ]
        constants = {
            "user_table": self.user_table,
            "item_table": self.item_table,
            "zero": np.array(0, dtype=np.int64),
            "one": np.array(1.0, dtype=np.float32),
            "last_axis": np.array([-1], dtype=np.int64),
            "length_axis": np.array([1], dtype=np.int64),
        }
        inputs = {input_name("user_id"): ["batch"], input_name("history"): ["batch", "length"]}
        return _graph("query", nodes, inputs, constants, self.dim)

    def _item_tower(self) -> bytes:
        nodes = [
            helper.make_node("Gather", ["item_table", input_name("item_id")], ["item"]),
            helper.make_node("LpNormalization", ["item"], [OUTPUT_NAME], axis=1, p=2),
        ]
        return _graph("item", nodes, {input_name("item_id"): ["batch"]}, {"item_table": self.item_table}, self.dim)


def toy_model(dim: int = 8, seed: int = 1, num_items: int = 50, num_users: int = 10) -> ToyModel:
    """A model with random tables: another seed gives other weights, another dim another embedding space."""
    random = np.random.default_rng(seed)
    return ToyModel(
        schema=parse_schema(TOY_FEATURES),
        user_table=random.standard_normal((num_users + 2, dim)).astype(np.float32),
        item_table=random.standard_normal((num_items + 2, dim)).astype(np.float32),
    )


def toy_items(num_items: int = 50) -> pa.Table:
    """A catalogue that matches: item_id, title, year and genres of items "1" to "N"."""
    numbers = range(1, num_items + 1)
    return pa.table(
        {
            "item_id": pa.array(_numbered(num_items), pa.string()),
            "title": pa.array([f"Title {number}" for number in numbers], pa.string()),
            "year": pa.array([1950 + number % 70 for number in numbers], pa.int64()),
            "genres": pa.array([[_GENRES[number % len(_GENRES)]] for number in numbers], pa.list_(pa.string())),
        }
    )


def _numbered(count: int) -> list[str]:
    return [str(number) for number in range(1, count + 1)]


def _row(value: str | None, num_rows: int) -> int:
    """Row of an id in its table: 0 missing, 1 unknown, "1" is row 2."""
    if not value:
        return 0
    return int(value) + 1 if value.isdecimal() and 1 <= int(value) <= num_rows - 2 else 1


def _normalised(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _golden(rows: Sequence[Mapping[str, Any]], embeddings: NDArray[np.float64]) -> GoldenExamples:
    return GoldenExamples(features=rows, embeddings=embeddings.tolist())


def _graph(
    owner: Owner,
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Sequence[str]],
    constants: Mapping[str, NDArray[Any]],
    dim: int,
) -> bytes:
    graph = helper.make_graph(
        nodes,
        f"{owner}_tower",
        [helper.make_tensor_value_info(name, TensorProto.INT64, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(OUTPUT_NAME, TensorProto.FLOAT, ["batch", dim])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION)
    onnx.checker.check_model(model)
    return model.SerializeToString()
