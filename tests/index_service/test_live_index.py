"""A live index against a dictionary and exact search, over any sequence of changes."""

import functools
import tempfile
from datetime import UTC, datetime
from unittest import mock

import numpy as np
import onnx
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from small_indexes import ids_of, small_index, unit_vectors

from index_service.feed import Changes
from index_service.filters import AllMet, Exists, NotMet, OneOf, Range
from index_service.live import LiveIndex
from index_service.saved_delta import newest_delta, put_delta
from towers.checkpoint import GoldenExamples, Manifest, TowerFiles
from towers.errors import InvalidInputError
from towers.schema import parse_schema
from towers.store import Store
from towers.tower import OUTPUT_NAME, Tower, input_name

DIM = 4
SCHEMA = parse_schema(
    [
        {"name": "user", "owner": "query", "kind": "number"},
        {"name": "vector", "owner": "item", "kind": "vector", "size": DIM},
    ]
)


class CountingTower(Tower):
    """A real tower that returns an item's `vector`; it counts the items that it embeds."""

    def __init__(self) -> None:
        graph = helper.make_graph(
            [
                helper.make_node("ReduceL2", [input_name("vector"), "last_axis"], ["length"], keepdims=1),
                helper.make_node("Div", [input_name("vector"), "length"], [OUTPUT_NAME]),
            ],
            "item_tower",
            [helper.make_tensor_value_info(input_name("vector"), TensorProto.FLOAT, ["batch", DIM])],
            [helper.make_tensor_value_info(OUTPUT_NAME, TensorProto.FLOAT, ["batch", DIM])],
            [numpy_helper.from_array(np.array([1]), "last_axis")],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
        onnx.checker.check_model(model)
        manifest = Manifest(
            version=1,
            created=datetime.now(UTC),
            dim=DIM,
            schema_fingerprint="",
            files={},
            metrics={},
            config={},
            data_window=None,
            code_revision="",
            parent_version=None,
        )
        golden = GoldenExamples(features=[{"vector": [1.0, 0.0, 0.0, 0.0]}], embeddings=[[1.0, 0.0, 0.0, 0.0]])
        super().__init__(
            TowerFiles(
                owner="item",
                manifest=manifest,
                schema=SCHEMA,
                vocabularies={},
                onnx=model.SerializeToString(),
                golden=golden,
            )
        )
        self.num_embedded = 0

    def embed(self, arrays):
        embeddings = super().embed(arrays)
        self.num_embedded = getattr(self, "num_embedded", 0) + len(embeddings)
        return embeddings


VECTORS = np.random.default_rng(5).standard_normal((12, DIM)).astype(np.float32)
ROWS = st.fixed_dictionaries(
    {},
    optional={
        "vector": st.integers(0, len(VECTORS) - 1),
        "price": st.integers(0, 5),
        "tags": st.lists(st.sampled_from(["a", "b", "c"]), max_size=2),
    },
)
IDS = st.sampled_from([f"item{number}" for number in range(12)] + ["é", "x" * 40])
STEP = st.dictionaries(IDS, st.one_of(st.none(), ROWS), max_size=6)
"""Item id to its new attributes; None: deleted."""

CONDITIONS = [
    (Range("price", at_least=2.0), lambda row: row.get("price", -1) >= 2),
    (NotMet(Range("price", at_least=2.0)), lambda row: row.get("price", -1) < 2),
    (OneOf("tags", frozenset({"a"})), lambda row: "a" in row.get("tags", [])),
    (
        AllMet((Exists("price"), OneOf("tags", frozenset({"b", "c"})))),
        lambda row: "price" in row and {"b", "c"} & set(row.get("tags", [])),
    ),
    (NotMet(Exists("colour")), lambda row: True),
]


def table_of(rows):
    """Items as the feed gives them: `vector` numbers become the vectors; columns that no item has are left out."""
    columns = {
        "item_id": pa.array(list(rows), pa.string()),
        "vector": pa.array(
            [None if "vector" not in row else VECTORS[row["vector"]].tolist() for row in rows.values()],
            pa.list_(pa.float32()),
        ),
        "price": pa.array([row.get("price") for row in rows.values()], pa.int64()),
        "tags": pa.array([row.get("tags") for row in rows.values()], pa.list_(pa.string())),
    }
    return pa.table(
        {name: column for name, column in columns.items() if name == "item_id" or column.null_count < len(column)}
    )


def is_findable(row):
    """Without a vector the tower divides by zero: the embedding is not finite."""
    return "vector" in row


def embedding_of(row):
    vector = VECTORS[row["vector"]].astype(np.float64)
    return vector / np.linalg.norm(vector)


def changes_of(version, step):
    upserts = {item_id: row for item_id, row in step.items() if row is not None}
    return Changes(version, table_of(upserts), tuple(item_id for item_id, row in step.items() if row is None))


def built_from(state):
    found = {item_id: row for item_id, row in state.items() if is_findable(row)}
    table = table_of(found)
    embeddings = np.array([embedding_of(row) for row in found.values()], dtype=np.float32).reshape(-1, DIM)
    attributes = {name: table[name].combine_chunks() for name in table.column_names if name != "item_id"}
    return small_index(embeddings, list(found), attributes=attributes, filterable=["price", "tags", "colour"])


def check(live, state, excluded=()):
    """Every answer of the view is the model's."""
    view = live.view
    found = {item_id: row for item_id, row in state.items() if is_findable(row)}
    assert live.num_items == view.num_items == len(found)
    allowed = [item_id for item_id in found if item_id not in excluded]
    queries = np.eye(DIM, dtype=np.float32)[:3]
    for condition, is_met in CONDITIONS:
        met = {item_id for item_id in allowed if is_met(found[item_id])}
        hits = view.search(queries, 50, condition, list(excluded))
        assert hits.counts.tolist() == [len(met)] * len(queries)
        assert set(ids_of(view, hits.rows)) == met
    for k in (1, 3, 50):
        hits = view.search(queries, k, excluded_item_ids=list(excluded))
        assert hits.counts.tolist() == [min(k, len(allowed))] * len(queries)
        ids = ids_of(view, hits.rows)
        for i in range(len(queries)):
            part = slice(i * min(k, len(allowed)), (i + 1) * min(k, len(allowed)))
            scores = {item_id: embedding_of(found[item_id]) @ queries[i] for item_id in allowed}
            np.testing.assert_allclose(hits.scores[part], sorted(scores.values(), reverse=True)[:k], atol=1e-6)
            np.testing.assert_allclose(hits.scores[part], [scores[item_id] for item_id in ids[part]], atol=1e-6)
            assert len(set(ids[part])) == len(ids[part])
    for name in ("price", "tags"):
        if name in view.attribute_names:
            values = view.attribute_values(name, hits.rows)
            assert values == [found[item_id].get(name) for item_id in ids]
        else:
            assert all(name not in row for row in found.values())


@given(
    most_scanned=st.sampled_from([0, 3, 8192]),
    start=st.dictionaries(IDS, ROWS, max_size=8),
    steps=st.lists(STEP, max_size=8),
    excluded=st.frozensets(IDS, max_size=4),
)
def test_any_sequence_of_changes_gives_the_state_it_leads_to(most_scanned, start, steps, excluded):
    with mock.patch("index_service.live._MOST_SCANNED", most_scanned), tempfile.TemporaryDirectory() as folder:
        check_sequence(start, steps, excluded, Store(folder))


def check_sequence(start, steps, excluded, store):
    state = dict(start)
    live = LiveIndex(built_from(state), functools.cache(CountingTower))
    check(live, state, excluded)
    for number, step in enumerate(steps, start=2):
        before, seen = live.view, dict(state)
        live.apply(changes_of(f"0.{number}", step))
        for item_id, row in step.items():
            state.pop(item_id, None)
            if row is not None:
                state[item_id] = row
        assert live.catalogue_version == f"0.{number}"
        check(live, state, excluded)
        live_before = LiveIndex(live.base, None)
        live_before.view = before
        check(live_before, seen, excluded)
        put_delta(store, "index", live.to_save())
        resumed = LiveIndex(live.base, functools.cache(CountingTower), newest_delta(store, "index"))
        assert resumed.catalogue_version == live.catalogue_version
        assert resumed.view.quarantined == live.view.quarantined
        assert (resumed.num_delta_items, resumed.num_tombstones) == (live.num_delta_items, live.num_tombstones)
        check(resumed, state, excluded)
        if number % 2:  # What goes on from there is as good.
            live = resumed


def test_attributes_that_no_tower_reads_cost_no_embedding():
    state = {f"item{number}": {"vector": number, "price": 1} for number in range(6)}
    tower = CountingTower()
    live = LiveIndex(built_from(state), lambda: tower)
    tower.num_embedded = 0
    for item_id in state:
        state[item_id] = {**state[item_id], "price": 2, "tags": ["new"]}
    live.apply(changes_of("0.2", state))
    check(live, state)
    assert (tower.num_embedded, live.num_delta_items, live.num_tombstones) == (0, 6, 0)
    state["item1"] = {"vector": 7, "price": 3}
    state["new"] = {"vector": 8, "price": 3}
    live.apply(changes_of("0.3", {"item1": state["item1"], "new": state["new"]}))
    check(live, state)
    assert (tower.num_embedded, live.num_tombstones) == (2, 1)
    state["new"] = {"vector": 8, "price": 4}
    state["item1"] = {"vector": 7}
    live.apply(changes_of("0.4", {"new": state["new"], "item1": state["item1"]}))
    check(live, state)
    assert tower.num_embedded == 2


def test_what_cannot_be_embedded_is_quarantined_and_comes_back():
    state = {"good": {"vector": 1}, "bad": {"vector": 2}}
    live = LiveIndex(built_from(state), functools.cache(CountingTower))
    step = {"bad": {"price": 1}, "worse": {}}
    live.apply(changes_of("0.2", step))
    state.update(step)
    check(live, state)
    assert live.num_quarantined == 2
    live.apply(changes_of("0.3", {"bad": {"vector": 3}, "worse": None}))
    check(live, {"good": {"vector": 1}, "bad": {"vector": 3}})
    assert live.num_quarantined == 0


def test_many_changes_are_searched_through_the_lists_of_the_built_index(monkeypatch):
    monkeypatch.setattr("index_service.live._MOST_SCANNED", 400)
    monkeypatch.setattr("index_service.delta._LEAST_IN_LISTS", 300)
    vectors = unit_vectors(9_000, DIM, num_clusters=40)
    tags = [["even"] if number % 2 == 0 else ["odd"] for number in range(6_000)]
    names = [f"item{number}" for number in range(6_000)]

    def table(rows, vectors):
        return pa.table(
            {
                "item_id": [names[row] for row in rows],
                "vector": pa.array([vector.tolist() for vector in vectors], pa.list_(pa.float32())),
                "tags": [tags[row] for row in rows],
            }
        )

    attributes = {"tags": pa.array(tags[:3_000])}
    base = small_index(
        vectors[:3_000], names[:3_000], index_type="IVF64,SQ8", attributes=attributes, filterable=["tags"]
    )
    assert base.ann.lists is not None
    live = LiveIndex(base, functools.cache(CountingTower))
    now = dict(enumerate(vectors[:3_000]))
    for step in range(20):
        rows = [*range(3_000 + step * 100, 3_100 + step * 100), *range(step * 50, step * 50 + 150)]
        new = vectors[6_000 + step * 150 : 6_000 + step * 150 + len(rows)]
        rows = rows[: len(new)]
        deleted = [5_900 - step, 2_999 - step]
        live.apply(Changes(f"0.{step + 2}", table(rows, new), tuple(names[row] for row in deleted)))
        now.update(zip(rows, new, strict=True))
        for row in deleted:
            now.pop(row, None)
    view = live.view
    assert view.sealed.ann.lists is not None
    assert view.sealed.num_items > 1_000
    assert live.num_items == len(now)
    ids, matrix = np.array(list(now)), np.array(list(now.values()))
    queries = unit_vectors(20, DIM, seed=3)
    for condition, is_allowed in ((None, ids >= 0), (OneOf("tags", frozenset({"odd"})), ids % 2 == 1)):
        hits = view.search(queries, 50, condition)
        assert hits.counts.tolist() == [50] * len(queries)
        found = np.array([int(item_id[4:]) for item_id in ids_of(view, hits.rows)]).reshape(len(queries), 50)
        exact = [ids[is_allowed][np.argsort(-(matrix[is_allowed] @ query))[:50]] for query in queries]
        recall = np.mean([len(np.intersect1d(a, b)) / 50 for a, b in zip(found, exact, strict=True)])
        assert recall > 0.9
        if condition is not None:
            assert (found % 2 == 1).all()


def test_a_delta_much_larger_than_the_index_asks_for_a_rebuild(monkeypatch):
    monkeypatch.setattr("index_service.live._SMALLEST_REBUILD", 2)
    monkeypatch.setattr("index_service.live._REBUILD_PAUSE_S", 0)
    state = {f"item{number}": {"vector": number} for number in range(10)}
    live = LiveIndex(built_from(state), functools.cache(CountingTower))
    live.apply(changes_of("0.2", {"item1": None}))
    assert not live.needs_rebuild(0.1), "fewer than a rebuild is worth"
    live.apply(changes_of("0.3", {"item2": {"vector": 11}}))
    assert live.needs_rebuild(0.1)
    assert not live.needs_rebuild(0.5)
    monkeypatch.setattr("index_service.live._REBUILD_PAUSE_S", 3600)
    assert not live.needs_rebuild(0.1), "so soon after the last one"


def test_a_delta_is_saved_when_a_restart_would_have_much_to_do(monkeypatch):
    monkeypatch.setattr("index_service.live._LEAST_UNSAVED", 2)
    monkeypatch.setattr("index_service.live._MOST_UNSAVED_COMMITS", 3)
    state = {f"item{number}": {"vector": number} for number in range(10)}
    live = LiveIndex(built_from(state), functools.cache(CountingTower))
    live.apply(changes_of("0.2", {"item1": {"vector": 2}}))
    assert not live.is_worth_saving()
    live.apply(changes_of("0.3", {"item1": {"vector": 3}}))
    assert live.is_worth_saving(), "two changes"
    live.to_save()
    assert not live.is_worth_saving()
    for number in range(4, 7):
        assert not live.is_worth_saving()
        live.apply(changes_of(f"0.{number}", {}))
    assert live.is_worth_saving(), "three commits"
    live.to_save()
    live.apply(changes_of("0.7", {f"item{number}": None for number in range(2, 10)}))
    assert live.is_worth_saving()
    live.to_save()
    live.apply(changes_of("0.8", {"item2": {"vector": 3}, "item3": {"vector": 3}}))
    assert not live.is_worth_saving(), "few beside what is saved"


def test_bad_searches_and_unknown_attributes_are_refused():
    live = LiveIndex(built_from({"a": {"vector": 1, "price": 1}}), functools.cache(CountingTower))
    live.apply(changes_of("0.2", {"b": {"vector": 2, "tags": ["x"]}}))
    query = np.eye(DIM, dtype=np.float32)[:1]
    for embeddings, k in ((query[:, :3], 1), (query, 0), (query * np.nan, 1), (query * 3, 1)):
        with pytest.raises(InvalidInputError):
            live.view.search(embeddings, k)
    hits = live.view.search(query, 2)
    assert set(live.view.attribute_names) == {"vector", "price", "tags"}
    with pytest.raises(InvalidInputError, match="unknown attribute 'size'; known: \\['price', 'tags', 'vector'\\]"):
        live.view.attribute_values("size", hits.rows)


def test_no_tower_is_loaded_where_nothing_is_to_be_embedded():
    asked = []

    def tower():
        asked.append(1)
        return CountingTower()

    live = LiveIndex(built_from({"a": {"vector": 1, "price": 1}, "b": {"vector": 2, "price": 1}}), tower)
    live.apply(Changes("0.2", pa.table({"item_id": pa.array([], pa.string())}), ("a", "nothing")))
    assert (live.num_items, asked) == (1, [])
    live.apply(Changes("0.3", pa.table({"item_id": ["c"], "vector": [[1.0, 0.0, 0.0, 0.0]]}), ()))
    assert live.num_items == 2
    assert asked
