"""Items change while real shard processes serve: found on every replica, at every version, and after every crash."""

import signal
import threading

import grpc
import numpy as np
import pytest
from retrieval.feature.v1 import feature_pb2
from retrieval.index.v1 import index_service_pb2 as index_pb2
from retrieval.index.v1 import index_service_pb2_grpc as index_grpc
from shard_process import PATIENCE_S, until
from toy_checkpoint import toy_items, toy_model

from towers.catalogue import Catalogue
from towers.placement import shard_of

QUERIES = ({"user_id": "1", "history": ["2", "3"]}, {"user_id": "4"}, {})
NUM_LOADED = 30
"""Of the toy model's 50 items; tests add others."""


def upsert(shard, *item_ids, **attributes):
    """Acknowledged changes; the state of the catalogue that has them."""
    values = {name: feature_pb2.FeatureValue(number_value=value) for name, value in attributes.items()}
    items = [index_pb2.Item(item_id=item_id, attributes=values) for item_id in item_ids]
    stub = index_grpc.CatalogServiceStub(shard.channel)
    return stub.UpsertItems(index_pb2.UpsertItemsRequest(items=items), timeout=PATIENCE_S).catalogue_version


def delete(shard, *item_ids):
    stub = index_grpc.CatalogServiceStub(shard.channel)
    return stub.DeleteItems(index_pb2.DeleteItemsRequest(item_ids=item_ids), timeout=PATIENCE_S).catalogue_version


def order_of(catalogue_version):
    return tuple(map(int, catalogue_version.split(".")))


def until_searches(shard, version, catalogue_version):
    """Waits until a replica searches this state or a later one."""

    def reached():
        status = shard.version(version)
        return status and status.catalogue_version and order_of(status.catalogue_version) >= order_of(catalogue_version)

    until(reached, f"checkpoint {version} at catalogue {catalogue_version}")


def assert_exact(shard, model, version, item_ids):
    """Every answer equals exact search among these items."""
    number, num_shards = map(int, shard.shard.split("/"))
    own = [item_id for item_id in item_ids if shard_of(item_id, num_shards) == number]
    result = shard.search(model.query_embeddings(QUERIES), version, 20, shard=number, num_shards=num_shards)
    for query, ids, scores in zip(QUERIES, result.item_ids, result.scores, strict=True):
        exact_ids, exact_scores = model.nearest(query, own, 20)
        assert ids == exact_ids
        np.testing.assert_allclose(scores, exact_scores, atol=1e-5)


def test_a_change_reaches_every_replica_of_every_shard_without_a_build(world, start_shard):
    model = toy_model()
    world.load_items(toy_items(NUM_LOADED))
    world.go_live(world.publish(model))
    shards = [start_shard(world.url, shard=shard) for shard in ("0/2", "1/2", "1/2")]
    for shard in shards:
        shard.until_state(1, "AVAILABLE")
    item_ids = [str(number) for number in range(1, NUM_LOADED + 1)]
    builds = [shard.num_builds() for shard in shards]

    added = ["31", "32", "33", "34", "35", "36"]
    catalogue_version = upsert(shards[0], *added, year=2024)
    for shard in shards:
        until_searches(shard, 1, catalogue_version)
        assert_exact(shard, model, 1, [*item_ids, *added])
    removed = ["1", "2", "3", "4", "31", "36"]
    catalogue_version = delete(shards[1], *removed)
    left = [item_id for item_id in (*item_ids, *added) if item_id not in removed]
    for shard in shards:
        until_searches(shard, 1, catalogue_version)
        assert_exact(shard, model, 1, left)
    statuses = [shard.version(1) for shard in shards]
    assert statuses[0].num_items + statuses[1].num_items == len(left)
    assert statuses[0].num_tombstones + statuses[1].num_tombstones == 4
    assert statuses[0].num_delta_items + statuses[1].num_delta_items == 4
    assert statuses[0].catalogue_version != statuses[0].built_catalogue_version

    catalogue_version = upsert(shards[2], "5", "32", year=1999)
    for shard in shards[:2]:
        until_searches(shard, 1, catalogue_version)
        assert_exact(shard, model, 1, left)
        own = {"shard": int(shard.shard[0]), "num_shards": 2}
        result = shard.search(model.query_embeddings(QUERIES[:1]), 1, 50, attribute_names=["year", "title"], **own)
        years = dict(zip(result.item_ids[0], result.attributes["year"], strict=True))
        titles = dict(zip(result.item_ids[0], result.attributes["title"], strict=True))
        for item_id in {"5", "32"} & years.keys():
            assert years[item_id].number_value == 1999
            assert titles[item_id].WhichOneof("value") is None, "an upsert replaces all attributes"
        assert {years[item_id].number_value for item_id in set(added) & years.keys()} <= {2024, 1999}
    assert [shard.num_builds() for shard in shards] == builds


def test_what_was_acknowledged_outlives_kill_9_and_needs_no_build(world, start_shard):
    model = toy_model()
    world.load_items(toy_items(NUM_LOADED))
    world.go_live(world.publish(model))
    shard = start_shard(world.url)
    shard.until_state(1, "AVAILABLE")
    item_ids = [str(number) for number in range(1, NUM_LOADED + 1)]
    for added in ("31", "32", "33"):
        catalogue_version = upsert(shard, added)
        shard.stop(signal.SIGKILL)
        item_ids.append(added)
        assert Catalogue(world.store).version() == catalogue_version
        shard = start_shard(world.url)
        status = shard.until_state(1, "AVAILABLE")
        assert status.catalogue_version == catalogue_version, "it catches up before it serves"
        assert status.loaded_from_store
        assert shard.num_builds() == 0
        assert_exact(shard, model, 1, item_ids)
    catalogue_version = delete(shard, "33", "1")
    shard.stop(signal.SIGKILL)
    shard = start_shard(world.url)
    assert shard.until_state(1, "AVAILABLE").catalogue_version == catalogue_version
    assert_exact(shard, model, 1, [item_id for item_id in item_ids if item_id not in ("33", "1")])


def test_a_restart_goes_on_from_the_delta_that_was_saved(world, start_shard):
    num_items = 11_000
    model = toy_model(num_items=num_items)
    world.load_items(toy_items(1_000))
    world.go_live(world.publish(model))
    shard = start_shard(world.url)
    shard.until_state(1, "AVAILABLE")
    catalogue_version = upsert(shard, *(str(number) for number in range(1_001, num_items + 1)), year=2001)
    name = f"/delta-{catalogue_version}.arrow"
    until(lambda: any(path.endswith(name) for path in world.store.files("indexes")), "the delta is saved")
    # What it holds is not read again: neither the log nor a build could give it any more.
    for path in world.store.files("catalog/changes"):
        if path.endswith(".parquet"):
            world.store.delete(path)
    upsert(shard, "7", "2000", year=2002)
    catalogue_version = delete(shard, "8", "3000")
    shard.stop(signal.SIGKILL)

    shard = start_shard(world.url)
    status = shard.until_state(1, "AVAILABLE")
    assert status.catalogue_version == catalogue_version
    assert status.loaded_from_store
    assert (status.num_items, status.num_tombstones) == (num_items - 2, 1)
    assert_exact(shard, model, 1, [item_id for item_id in model.item_ids if item_id not in ("8", "3000")])
    result = shard.search(model.item_embeddings(["7", "2000", "2001"]), 1, 1, attribute_names=["year"])
    assert result.item_ids == [["7"], ["2000"], ["2001"]]
    assert [year.number_value for year in result.attributes["year"]] == [2002, 2002, 2001]


def test_updates_that_stream_through_a_swap_are_in_both_versions(world, start_shard):
    models = {1: toy_model(), 2: toy_model(seed=2, dim=6)}
    world.load_items(toy_items(NUM_LOADED))
    world.go_live(world.publish(models[1]))
    shard = start_shard(world.url)
    shard.until_state(1, "AVAILABLE")
    stopped = threading.Event()
    there = {str(number) for number in range(1, NUM_LOADED + 1)}
    last = [""]

    def change():
        number = NUM_LOADED
        while not stopped.is_set():
            number = number % 50 + 1
            there.add(str(number))
            last[0] = upsert(shard, str(number))
            gone = str((number + 20) % 50 + 1)
            there.discard(gone)
            last[0] = delete(shard, gone)

    writer = threading.Thread(target=change)
    writer.start()
    try:
        world.publish(models[2])
        world.stage(2)
        shard.until_state(2, "AVAILABLE")
        world.promote()
        until(lambda: shard.status().deployment_revision == 4, "promoted")
        began_at = last[0]
        until(lambda: order_of(last[0])[1] > order_of(began_at)[1] + 10, "more changes after the swap")
    finally:
        stopped.set()
        writer.join(PATIENCE_S)
    for version, model in models.items():
        until_searches(shard, version, last[0])
        assert_exact(shard, model, version, sorted(there, key=int))


def test_a_bad_item_is_refused_and_the_rest_goes_on(world, start_shard):
    world.load_items(toy_items(NUM_LOADED))
    world.go_live(world.publish(toy_model()))
    shard = start_shard(world.url)
    shard.until_state(1, "AVAILABLE")
    with pytest.raises(grpc.RpcError) as caught:
        upsert(shard, "31", year=1999.5)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "items[0] '31': attribute 'year' is 1999.5, but an integer" in caught.value.details()
    until_searches(shard, 1, upsert(shard, "31", year=1999))
    assert shard.version(1).num_items == NUM_LOADED + 1


def test_thousands_of_the_nearest_items_are_excluded_whichever_part_has_them(world, start_shard):
    num_loaded, num_items, num_excluded = 4_000, 13_000, 5_000
    model = toy_model(num_items=num_items)
    world.load_items(toy_items(num_loaded))
    world.go_live(world.publish(model))
    shard = start_shard(world.url)
    shard.until_state(1, "AVAILABLE")
    until_searches(shard, 1, upsert(shard, *(str(number) for number in range(num_loaded + 1, num_items + 1))))
    query = QUERIES[0]
    nearest, _ = model.nearest(query, model.item_ids, num_excluded)
    assert min(map(int, nearest)) <= num_loaded < max(map(int, nearest)), "both parts have some of them"
    left = sorted(set(model.item_ids) - set(nearest), key=int)
    result = shard.search(model.query_embeddings([query]), 1, 100, excluded_item_ids=[*nearest, "unknown"])
    expected, _ = model.nearest(query, left, 100)
    assert len(result.item_ids[0]) == 100
    assert not set(result.item_ids[0]) & set(nearest)
    assert len(set(result.item_ids[0]) & set(expected)) >= 95


def test_an_item_that_cannot_be_embedded_is_quarantined_and_the_rest_goes_on(world, start_shard):
    model = toy_model()
    model.item_table[35 + 1] = np.nan  # Item "35".
    world.load_items(toy_items(NUM_LOADED))
    world.go_live(world.publish(model))
    shard = start_shard(world.url)
    shard.until_state(1, "AVAILABLE")
    until_searches(shard, 1, upsert(shard, "34", "35", "36"))
    assert_exact(shard, model, 1, [*map(str, range(1, NUM_LOADED + 1)), "34", "36"])
    status = shard.version(1)
    assert (status.num_items, status.num_quarantined) == (NUM_LOADED + 2, 1)
    embedding = model.query_embeddings(QUERIES[:1]).astype("<f4").tobytes()
    request = index_pb2.RankItemRequest(
        checkpoint_version=1, query_embeddings=embedding, num_queries=1, item_id="35", shard=0, num_shards=1
    )
    ranked = shard.stub.RankItem(request, timeout=PATIENCE_S)
    assert ranked.state == index_pb2.ITEM_STATE_QUARANTINED
    assert ranked.quarantine_reason == "its embedding is not finite"
    until_searches(shard, 1, delete(shard, "35"))
    assert shard.version(1).num_quarantined == 0
