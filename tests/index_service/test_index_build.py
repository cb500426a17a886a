"""The build: what it embeds, what it leaves out, what it refuses, and how its process ends."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from shard_process import PATIENCE_S, until
from small_indexes import ids_of
from toy_checkpoint import TOY_FEATURES, toy_items, toy_model

from index_service import build as build_module
from index_service.artefact import ArtefactRef, ArtefactStore
from index_service.build import build
from index_service.order import BuildOrder, CorruptCheckpointError
from index_service.plan import TuningGoal
from index_service.shard import ShardIndex
from towers.catalogue import Catalogue
from towers.checkpoint import CheckpointStore
from towers.errors import InvalidInputError
from towers.placement import shard_of
from towers.schema import parse_schema


def order_of(world, **how):
    fields = {"shard": 0, "num_shards": 1, "checkpoint_version": 1, "catalogue_version": "0.1", "revision": 1}
    return BuildOrder(store=world.url, **{**fields, "goal": TuningGoal(), **how})


def loaded(world, order):
    artefacts = ArtefactStore(world.store, order.shard, order.num_shards)
    return ShardIndex(artefacts.get(ArtefactRef(order.checkpoint_version, order.catalogue_version, order.revision)))


def test_shards_hold_all_items_once_with_the_embeddings_of_the_tower(world):
    model = toy_model(dim=12)
    world.publish(model)
    world.load_items()
    query = model.query_embeddings([{"user_id": "3", "history": ["7"]}])
    found = {}
    progress = []
    for shard in range(3):
        order = order_of(world, shard=shard, num_shards=3)
        manifest = build(order, progress.append)
        index = loaded(world, order)
        assert manifest.num_items == index.num_items > 0
        assert manifest.golden_difference < 1e-5
        hits = index.search(query.astype(np.float32), 50)
        ids = index.attributes.values("title", hits.rows)
        assert all(shard_of(title.removeprefix("Title "), 3) == shard for title in ids)
        found |= dict(zip(ids, hits.scores.tolist(), strict=True))
    exact = (model.item_embeddings(model.item_ids) @ query[0]).tolist()
    assert {title.removeprefix("Title ") for title in found} == set(model.item_ids)
    for item_id, score in zip(model.item_ids, exact, strict=True):
        assert found[f"Title {item_id}"] == pytest.approx(score, abs=1e-6)
    assert progress[-1] == 1.0
    assert all(0 <= share <= 1 for share in progress)


def test_an_item_whose_embedding_is_not_finite_is_quarantined(world, caplog):
    model = toy_model()
    model.item_table[8 + 1] = np.nan  # Item "8".
    model.item_table[30 + 1, 2] = np.inf
    world.publish(model)
    world.load_items()
    manifest = build(order_of(world), lambda _: None)
    assert (manifest.num_items, manifest.num_quarantined) == (48, 2)
    assert manifest.quarantined == dict.fromkeys(("8", "30"), "its embedding is not finite")
    assert "item '8' is quarantined: its embedding is not finite" in caplog.text
    assert "item '30' is quarantined" in caplog.text
    index = loaded(world, order_of(world))
    hits = index.search(model.query_embeddings([{"user_id": "1"}]).astype(np.float32), 50)
    assert hits.counts.tolist() == [48]
    assert len(index.rows_of(["8", "30"])) == 0


def test_an_item_whose_features_do_not_encode_is_quarantined(world, caplog):
    model = toy_model()
    CheckpointStore(world.store).publish(replace(model.draft(), schema=_schema_that_reads("number")))
    # A category may be an integer, whatever its type, but not a fraction.
    world.load_items(pa.table({"item_id": ["a", "b", "c", "d"], "number": [1.0, 2.5, 3.0, None]}))
    manifest = build(order_of(world), lambda _: None)
    assert (manifest.num_items, manifest.num_quarantined) == (3, 1)
    assert "item 'b' is quarantined: feature 'item_id': expected a string or an integer" in caplog.text
    index = loaded(world, order_of(world))
    query = model.query_embeddings([{"user_id": "1"}])
    hits = index.search(query.astype(np.float32), 3)
    expected = dict(zip("acd", (model.item_embeddings(["1", "3", ""]) @ query[0]).tolist(), strict=True))
    ids = ids_of(index, hits.rows)
    assert ids == sorted(expected, key=expected.__getitem__, reverse=True)
    assert hits.scores.tolist() == pytest.approx([expected[item_id] for item_id in ids], abs=1e-6)


def test_only_the_first_quarantined_items_are_named(world, caplog):
    model = toy_model(num_items=200)
    model.item_table[100:170] = np.nan
    world.publish(model)
    world.load_items(toy_items(200))
    assert build(order_of(world), lambda _: None).num_quarantined == 70
    assert caplog.text.count(" is quarantined") == 50
    assert "20 more items are quarantined" in caplog.text


def test_a_tower_that_can_embed_no_item_is_refused(world):
    model = toy_model()
    model.item_table[5:] = np.nan
    world.publish(model)
    world.load_items(toy_items().slice(10))
    with pytest.raises(InvalidInputError, match="not one of 40 items could be embedded by checkpoint 1; for example"):
        build(order_of(world), lambda _: None)


def test_a_column_that_the_tower_needs_is_named(world):
    CheckpointStore(world.store).publish(replace(toy_model().draft(), schema=_schema_that_reads("track")))
    world.load_items()
    with pytest.raises(InvalidInputError, match="no column 'track', which feature 'item_id' of checkpoint 1 needs"):
        build(order_of(world), lambda _: None)


def test_an_empty_catalogue_is_refused_and_an_empty_shard_is_not(world):
    world.publish()
    world.load_items(toy_items(1))
    shard = shard_of("1", 2)
    assert build(order_of(world, shard=shard, num_shards=2), lambda _: None).num_items == 1
    empty = build(order_of(world, shard=1 - shard, num_shards=2), lambda _: None)
    assert (empty.num_items, empty.num_quarantined, empty.index_type) == (0, 0, "Flat")
    Catalogue(world.store).delete(["1"])
    with pytest.raises(InvalidInputError, match="the catalogue has no items"):
        build(order_of(world, catalogue_version="0.2"), lambda _: None)


def test_a_drifting_tower_is_the_checkpoints_own_fault(world):
    draft = toy_model().draft()
    other = toy_model(seed=2).draft()
    CheckpointStore(world.store).publish(replace(draft, towers=other.towers))
    world.load_items()
    with pytest.raises(CorruptCheckpointError, match="golden item embeddings differ"):
        build(order_of(world), lambda _: None)


def test_the_process_says_how_far_it_is_and_how_it_ended(world):
    world.publish()
    world.load_items()
    messages = _run(order_of(world))
    assert [message["progress"] for message in messages] == sorted(message["progress"] for message in messages)
    assert messages[-1]["build"] == loaded(world, order_of(world)).manifest.build
    # A second build of the same revision finds the first.
    assert _run(order_of(world))[-1]["build"] == ""
    # And one of a checkpoint that is not there says so.
    failure = _run(order_of(world, checkpoint_version=7), exit_code=1)[-1]
    assert failure["failure"] == "checkpoint 7 is not published; published: [1]"
    assert not failure["is_corrupt"]


def test_the_process_ends_with_its_parent(world):
    world.publish()
    world.load_items()
    # A parent whose build hangs, and that is killed.
    code = (
        "import os, signal, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-m', 'index_service.build', '--parent', str(os.getpid()), "
        "sys.argv[1]], stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\n"
        "child.send_signal(signal.SIGSTOP)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, order_of(world).model_dump_json()], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        build_pid = int(parent.stdout.readline())
        os.kill(parent.pid, signal.SIGKILL)
    until(lambda: not _is_running(build_pid), "the build ends")


def test_a_process_without_its_parent_does_nothing(world):
    run = subprocess.run(
        [sys.executable, "-m", "index_service.build", "--parent", "1", order_of(world).model_dump_json()],
        capture_output=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert (run.returncode, run.stdout) == (1, b"")


@pytest.mark.parametrize(("num_users", "measured_with"), [(100, "validation queries"), (10, "item vectors")])
def test_the_manifest_says_what_was_chosen_and_measured(world, num_users, measured_with):
    model = toy_model(num_items=300, num_users=num_users)
    world.publish(model)
    world.load_items(toy_items(300))
    goal = TuningGoal(target_recall=0.9, target_k=20, index_type="IVF8,SQ8")
    manifest = build(order_of(world, goal=goal), lambda _: None)
    assert (manifest.index_type, manifest.goal, manifest.measured_with) == ("IVF8,SQ8", goal, measured_with)
    assert [setting.k for setting in manifest.plan.settings] == [10, 20, 100, 500, 1000]
    assert all(setting.recall >= 0.9 and setting.parameters for setting in manifest.plan.settings)
    items = model.item_embeddings(model.item_ids)
    cosines = items @ items.T
    assert manifest.item_similarity == pytest.approx((cosines.sum() - 300) / (300 * 299), abs=1e-6)
    if measured_with == "validation queries":
        scores = model.query_embeddings(model.validation_queries()) @ items.T
        assert (manifest.score_mean, manifest.score_deviation) == pytest.approx((scores.mean(), scores.std()), abs=1e-6)
    else:
        others = cosines[~np.eye(300, dtype=bool)]
        assert (manifest.score_mean, manifest.score_deviation) == pytest.approx((others.mean(), others.std()), abs=1e-6)


def test_a_rebuild_for_the_same_checkpoint_keeps_the_choice(world, monkeypatch):
    choices = []
    tuned = build_module.tuned
    monkeypatch.setattr(build_module, "tuned", lambda *args: choices.append(args) or tuned(*args))
    goal = TuningGoal(index_type="IVF8,SQ8")
    world.publish(toy_model(num_items=1000))
    versions = [world.load_items(toy_items(num_items)) for num_items in (300, 400, 1000)]

    def built_at(catalogue_version, **how):
        order = order_of(world, goal=goal, catalogue_version=catalogue_version, **how)
        return build(order, lambda _: None), loaded(world, order).ann.base

    _, base = built_at(versions[0])
    assert len(choices) == 1
    manifest, rebuilt = built_at(versions[1])
    assert (manifest.num_items, len(choices)) == (400, 1)
    np.testing.assert_array_equal(rebuilt.quantizer.reconstruct_n(0, 8), base.quantizer.reconstruct_n(0, 8))
    # Many more items, another goal, or another checkpoint: chosen anew.
    built_at(versions[2])
    assert len(choices) == 2
    goal = TuningGoal(index_type="IVF8,SQ8", target_recall=0.9)
    built_at(versions[2], revision=2)
    assert len(choices) == 3
    world.publish(toy_model(num_items=1000, seed=2))
    built_at(versions[2], checkpoint_version=2)
    assert len(choices) == 4


def test_a_damaged_earlier_index_does_not_stop_a_build(world, caplog):
    world.publish(toy_model(num_items=400))
    goal = TuningGoal(index_type="IVF8,SQ8")
    build(order_of(world, goal=goal, catalogue_version=world.load_items(toy_items(300))), lambda _: None)
    (path,) = [path for path in world.store.files("indexes") if path.endswith("index.faiss")]
    content = bytearray(world.store.get(path))
    content[100] ^= 1
    world.store.delete(path)
    world.store.put_new(path, bytes(content))
    order = order_of(world, goal=goal, catalogue_version=world.load_items(toy_items(400)))
    assert build(order, lambda _: None).num_items == 400
    assert "an earlier index is not used: " in caplog.text


def _run(order, exit_code=0):
    run = subprocess.run(
        [sys.executable, "-m", "index_service.build", "--parent", str(os.getpid()), order.model_dump_json()],
        capture_output=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert run.returncode == exit_code, run.stderr.decode()
    return [json.loads(line) for line in run.stdout.splitlines()]


def _is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _schema_that_reads(column):
    features = [dict(feature) for feature in TOY_FEATURES]
    features[2]["column"] = column
    return parse_schema(features)
