"""Real shard processes on a real store: they build, load, follow, refuse, recover and end."""

import os
import signal
import subprocess
import sys
import threading

import grpc
import numpy as np
import pyarrow as pa
import pytest
from deltalake import write_deltalake
from retrieval.index.v1 import index_service_pb2
from shard_process import PATIENCE_S, ShardProcess, search_request, until
from toy_checkpoint import toy_items, toy_model

from index_service.service import MAX_HITS, MAX_K, SERVICE_NAME
from towers.catalogue import Catalogue
from towers.health import is_serving
from towers.placement import shard_of

QUERIES = ({"user_id": "1", "history": ["2", "3"]}, {"user_id": "4"}, {})


def assert_exact(process: ShardProcess, model, version, item_ids=None, k=10, **fields):
    """Every answer equals exact search at that version."""
    item_ids = model.item_ids if item_ids is None else item_ids
    result = process.search(model.query_embeddings(QUERIES), version, k, **fields)
    assert result.checkpoint_version == version
    for query, ids, scores in zip(QUERIES, result.item_ids, result.scores, strict=True):
        exact_ids, exact_scores = model.nearest(query, item_ids, k)
        assert ids == exact_ids
        np.testing.assert_allclose(scores, exact_scores, atol=1e-5)
    return result


def test_builds_serves_drains_and_loads_after_a_restart(world, start_shard):
    model = toy_model()
    catalogue_version = world.load_items()
    world.go_live(world.publish(model))
    shard = start_shard(world.url)
    status = shard.until_state(1, "AVAILABLE")
    assert (status.num_items, status.num_quarantined, status.index_type) == (50, 0, "Flat")
    assert (status.progress, status.reason, status.loaded_from_store) == (1.0, "", False)
    assert status.catalogue_version == catalogue_version
    assert status.size_bytes > 50 * 8 * 4
    assert 0 < status.golden_difference < 1e-5
    assert (shard.status().shard, shard.status().num_shards, shard.status().deployment_revision) == (0, 1, 2)
    until(lambda: is_serving(shard.address, SERVICE_NAME), "ready")
    result = assert_exact(shard, model, 1, attribute_names=["title", "year", "genres"])
    assert result.catalogue_version == catalogue_version
    for name, of_item in {
        "title": lambda item_id: f"Title {item_id}",
        "year": lambda item_id: 1950 + int(item_id) % 70,
        "genres": lambda item_id: [("Action", "Comedy", "Drama")[int(item_id) % 3]],
    }.items():
        values = [_plain(value) for value in result.attributes[name]]
        assert values == [of_item(item_id) for ids in result.item_ids for item_id in ids]
    assert shard.num_builds() == 1
    assert shard.stop(signal.SIGTERM) == 0
    assert "Traceback" not in "".join(shard.log)

    restarted = start_shard(world.url)
    assert restarted.until_state(1, "AVAILABLE").loaded_from_store
    assert_exact(restarted, model, 1)
    assert restarted.num_builds() == 0
    assert restarted.stop(signal.SIGINT) == 0


def test_two_shards_hold_each_item_once(world, start_shard):
    model = toy_model(dim=6, num_items=80)
    catalogue_version = world.load_items(toy_items(80))
    world.go_live(world.publish(model))
    world.build(1, catalogue_version, shard=1, num_shards=2)
    shards = [start_shard(world.url, shard=f"{number}/2") for number in (0, 1)]
    held = [[item_id for item_id in model.item_ids if shard_of(item_id, 2) == number] for number in (0, 1)]
    for number, shard in enumerate(shards):
        shard.until_state(1, "AVAILABLE")
        assert_exact(shard, model, 1, held[number], k=100, shard=number, num_shards=2)
    with pytest.raises(grpc.RpcError) as caught:
        shards[0].search(model.query_embeddings(QUERIES), 1, shard=1, num_shards=2)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "this is shard 0 of 2, the request is for shard 1 of 2" in caught.value.details()


def test_follows_the_record_and_the_catalogue_while_it_answers(world, start_shard):
    models = {1: toy_model(dim=8, seed=1), 2: toy_model(dim=12, seed=2), 3: toy_model(dim=8, seed=3)}
    first_catalogue = world.load_items()
    world.go_live(world.publish(models[1]))
    world.build(1, first_catalogue)
    shard = start_shard(world.url)
    shard.until_state(1, "AVAILABLE")
    until(lambda: is_serving(shard.address, SERVICE_NAME), "ready")

    stop, failures, answers = threading.Event(), [], []

    def ask():
        while not stop.is_set():
            try:
                assert_exact(shard, models[1], 1)
                answers.append(1)
            except BaseException as error:
                failures.append(error)
                return

    client = threading.Thread(target=ask)
    client.start()
    try:
        world.publish(models[2])
        world.stage(2)
        shard.until_state(2, "AVAILABLE")
        assert_exact(shard, models[2], 2)
        world.promote()
        until(lambda: shard.status().deployment_revision == 4, "promoted")
        assert_exact(shard, models[2], 2)
        world.roll_back()
        until(lambda: shard.status().deployment_revision == 5, "rolled back")
        assert_exact(shard, models[2], 2)

        # Version 2 is omitted, 3 comes; the dimension of 1 and 3 is the same, their answers are not.
        world.publish(models[3])
        world.build(3, first_catalogue)
        world.stage(3)
        shard.until_state(3, "AVAILABLE")
        shard.until_versions([1, 3])
        assert_exact(shard, models[3], 3)
        with pytest.raises(grpc.RpcError) as caught:
            assert_exact(shard, models[2], 2)
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert caught.value.details() == "checkpoint_version 2 is not loaded; loaded: [1, 3]"
    finally:
        stop.set()
        client.join()
    assert not failures
    assert len(answers) > 20

    # A new catalogue is indexed beside, at the same versions.
    Catalogue(world.store).delete(["1", "2", "3"])
    second_catalogue = world.load_items(pa.table({"item_id": ["new"], "title": ["New"]}))
    for version in (1, 3):
        until(
            lambda version=version: shard.version(version).catalogue_version == second_catalogue,
            f"refresh of {version}",
        )
        remaining = [*(str(number) for number in range(4, 51)), "new"]
        assert shard.version(version).num_items == 48
        result = assert_exact(shard, models[version], version, remaining, k=100, attribute_names=["year"])
        assert result.catalogue_version == second_catalogue
        assert sum(not value.WhichOneof("value") for value in result.attributes["year"]) > 0
    assert is_serving(shard.address, SERVICE_NAME)


def test_items_that_a_tool_rewrites_are_indexed_anew_while_the_old_index_answers(world, start_shard):
    model = toy_model()
    world.load_items()
    world.go_live(world.publish(model))
    shard = start_shard(world.url)
    shard.until_state(1, "AVAILABLE")
    catalogue = Catalogue(world.store)
    catalogue.compact()
    kept = model.item_ids[:20]
    write_deltalake(f"{world.url}/catalog/items", toy_items(20), mode="overwrite")
    rewritten = catalogue.version()
    # From here on updates come as well; the new index has them when it takes the place of the old one.
    Catalogue(world.store).delete(["1"])
    newest = catalogue.version()
    seen = []
    while newest not in seen:
        result = shard.search(model.query_embeddings(QUERIES), 1)
        exact = [model.nearest(query, model.item_ids, 10)[0] for query in QUERIES]
        if result.catalogue_version == newest:
            exact = [model.nearest(query, kept[1:], 10)[0] for query in QUERIES]
        assert result.item_ids == exact, "neither the old state nor the new one"
        seen.append(result.catalogue_version)
    assert seen == sorted(seen, key=[seen[0], newest].index), "it never goes back"
    status = shard.version(1)
    assert (status.num_items, status.loaded_from_store) == (19, False)
    assert status.built_catalogue_version in (rewritten, newest)
    assert shard.num_builds() == 2


def test_the_store_may_go_while_the_live_version_serves(world, start_shard, tmp_path):
    model = toy_model()
    catalogue_version = world.load_items()
    world.go_live(world.publish(model))
    world.build(1, catalogue_version)
    shard = start_shard(world.url)
    shard.until_state(1, "AVAILABLE")
    os.rename(world.url, tmp_path / "gone")  # noqa: PTH104
    for _ in range(30):
        assert_exact(shard, model, 1)
        shard.status()
    assert shard.version(1).state == shard.until_state(1, "AVAILABLE").state
    os.rename(tmp_path / "gone", world.url)  # noqa: PTH104
    world.stage(world.publish(toy_model(seed=2)))
    shard.until_state(2, "AVAILABLE")
    assert "Traceback" not in "".join(shard.log)


def test_a_builder_killed_in_the_middle_is_started_again(world, start_shard):
    model = toy_model(num_items=10_000)
    world.load_items(toy_items(10_000))
    world.go_live(world.publish(model))
    shard = start_shard(world.url, environment={"TWOTOWER_INDEX_TYPE": "IVF16,SQ8"})
    builder = stop_builder_in_the_middle(shard, 1)
    assert not is_serving(shard.address, SERVICE_NAME)
    assert is_serving(shard.address)
    os.kill(builder, signal.SIGKILL)
    until(lambda: any("the build ended with status -9" in line for line in shard.log), "said")
    status = shard.until_state(1, "AVAILABLE")
    assert status.num_items == 10_000
    assert status.index_type == "IVF16,SQ8"
    assert shard.num_builds() == 2

    # SIGTERM in the middle of a build: the builder is ended too, and nothing of it is visible.
    world.publish(toy_model(seed=2, num_items=10_000))
    world.stage(2)
    builder = stop_builder_in_the_middle(shard, 2)
    assert shard.search(model.query_embeddings(QUERIES), 1).checkpoint_version == 1
    assert shard.stop(signal.SIGTERM) == 0
    assert not exists(builder)
    assert not world.store.files("indexes/2")


def stop_builder_in_the_middle(shard, version):
    until(lambda: (status := shard.version(version)) and 0 < status.progress < 1, "progress")
    (builder,) = shard.builder_pids()
    os.kill(builder, signal.SIGSTOP)
    assert shard.version(version).state == index_service_pb2.VERSION_STATE_BUILDING
    return builder


def test_what_is_missing_is_said_in_words_and_recovers(world, start_shard):
    shard = start_shard(world.url)
    assert not shard.status().versions
    assert not is_serving(shard.address, SERVICE_NAME)
    model = toy_model()
    world.go_live(world.publish(model))
    no_catalogue = shard.until_state(1, "FAILED")
    assert "twotower catalog load" in no_catalogue.reason
    assert not no_catalogue.is_corrupt
    world.load_items()
    shard.until_state(1, "AVAILABLE")
    assert_exact(shard, model, 1)

    # A checkpoint that is not there yet, and one that is damaged: the live version goes on.
    world.stage(2)
    assert "checkpoint 2 is not published" in shard.until_state(2, "FAILED").reason
    assert world.publish(toy_model(seed=2)) == 2
    shard.until_state(2, "AVAILABLE")
    assert world.publish(toy_model(seed=3)) == 3
    content = bytearray(world.store.get("checkpoints/3/item_tower.onnx"))
    content[100] ^= 1
    world.store.delete("checkpoints/3/item_tower.onnx")
    world.store.put_new("checkpoints/3/item_tower.onnx", bytes(content))
    world.stage(3)
    damaged = shard.until_state(3, "FAILED")
    assert damaged.is_corrupt
    assert "item_tower.onnx differs from the manifest" in damaged.reason
    assert_exact(shard, model, 1)
    assert is_serving(shard.address, SERVICE_NAME)


def test_bad_requests_are_the_callers_fault(world, start_shard):
    model = toy_model()
    catalogue_version = world.load_items()
    world.go_live(world.publish(model))
    world.build(1, catalogue_version)
    shard = start_shard(world.url)
    shard.until_state(1, "AVAILABLE")
    good = model.query_embeddings(QUERIES)

    def refused(embeddings, expected, version=1, **fields):
        request = search_request(embeddings, version, **fields)
        with pytest.raises(grpc.RpcError) as caught:
            shard.stub.Search(request, timeout=PATIENCE_S)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, caught.value
        assert expected in caught.value.details()

    refused(good, "k is 0; ask for 1 to 10000", k=0)
    refused(good, "k is -1", k=-1)
    refused(good, f"k is {MAX_K + 1}", k=MAX_K + 1)
    refused(good, "96 bytes, but 2 float32 embeddings of checkpoint 1 (dimension 8) are 64", num_queries=2)
    refused(good[:0], "num_queries is 0")
    refused(good, "num_queries is -1", num_queries=-1)
    refused(good[:, :7], "84 bytes")
    refused(good * np.nan, "not all numbers are finite")
    refused(good * np.inf, "not all numbers are finite")
    refused(good * 2, "must be unit vectors")
    refused(good, "unknown attribute 'rating'; known: ['genres', 'title', 'year']", attribute_names=["rating"])
    many = np.repeat(good, MAX_HITS // 50, axis=0)
    refused(many, f"more than {MAX_HITS}", k=50)
    # And the edges that are allowed.
    assert_exact(shard, model, 1, k=1)
    assert_exact(shard, model, 1, k=MAX_K)
    kept = model.item_ids[7:]
    assert_exact(shard, model, 1, kept, excluded_item_ids=[*model.item_ids[:7], "1", "nothing"])
    assert_exact(shard, model, 1, [], excluded_item_ids=model.item_ids, attribute_names=["title"])
    for version in (0, -1, 2):
        with pytest.raises(grpc.RpcError) as caught:
            shard.search(good, version)
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION


def test_wrong_settings_end_with_one_line(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "cli.main", "serve", "index"],
        env={**os.environ, "TWOTOWER_STORE": str(tmp_path), "TWOTOWER_SHARD": "2/2"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert run.returncode == 2
    assert run.stderr == "error: TWOTOWER_SHARD: say which shard this is, of how many, for example 0/2\n"


def test_no_process_of_the_service_imports_torch():
    code = "import sys, index_service.serve, index_service.build; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    assert run.stdout == "False\n"


def _plain(value):
    match value.WhichOneof("value"):
        case "string_value":
            return value.string_value
        case "number_value":
            return value.number_value
        case "string_list":
            return list(value.string_list.values)


def exists(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
