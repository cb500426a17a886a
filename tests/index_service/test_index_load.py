"""Indexes come from the store where it can be trusted, and are built in a process of their own where it cannot."""

import asyncio
import os
import shutil

import numpy as np
import pytest
from shard_process import children_of
from small_indexes import ids_of
from toy_checkpoint import toy_items, toy_model

from index_service.artefact import VECTORS, ArtefactStore
from index_service.load import IndexLoader
from index_service.order import CorruptCheckpointError
from index_service.plan import TuningGoal
from towers.errors import NotFoundError, TwoTowerError
from towers.placement import shard_of

DEFAULT = TuningGoal()
QUERY = {"user_id": "1", "history": ["2", "3"]}


def load(world, catalogue_version, version=1, goal=DEFAULT, replaced=None):
    """The index, and the progress that was reported: none where nothing was built."""
    progress = []
    loader = IndexLoader(world.store, 0, 1, goal)
    loaded = asyncio.run(loader.load(version, catalogue_version, replaced, progress.append))
    return loaded, progress


def assert_exact(loaded, model, item_ids=None):
    view = loaded.live.view
    hits = view.search(model.query_embeddings([QUERY]).astype(np.float32), 10)
    exact_ids, exact_scores = model.nearest(QUERY, item_ids or model.item_ids, 10)
    assert ids_of(view, hits.rows) == exact_ids
    np.testing.assert_allclose(hits.scores, exact_scores, atol=1e-5)


def test_what_is_stored_is_not_built(world):
    model = toy_model()
    catalogue_version = world.load_items()
    world.publish(model)
    world.build(1, catalogue_version)
    loaded, progress = load(world, catalogue_version)
    assert loaded.is_from_store
    assert progress == []
    assert_exact(loaded, model)


def test_a_successor_takes_the_item_tower_over(world):
    catalogue_version = world.load_items()
    world.publish()
    world.build(1, catalogue_version)
    first, _ = load(world, catalogue_version)
    tower = first.live.tower()
    catalogue_version = world.load_items(toy_items(40).slice(30))
    world.build(1, catalogue_version)
    second, progress = load(world, catalogue_version, replaced=first)
    assert progress == []
    assert second.live.base is not first.live.base
    assert second.live.tower() is tower


@pytest.mark.parametrize("damage", ["bit", "missing", "other checkpoint", "other settings"])
def test_a_stored_index_that_cannot_be_trusted_is_refused_and_replaced(world, damage, caplog):
    model = toy_model()
    catalogue_version = world.load_items()
    world.publish(model)
    world.build(1, catalogue_version)
    goal = DEFAULT
    (path,) = [path for path in world.store.files("indexes") if path.endswith(f"/{VECTORS}")]
    if damage == "bit":
        content = bytearray(world.store.get(path))
        content[-7] ^= 4
        world.store.delete(path)
        world.store.put_new(path, bytes(content))
    elif damage == "missing":
        world.store.delete(path)
    elif damage == "other checkpoint":
        # The checkpoints were lost, and another one was published under the same number.
        shutil.rmtree(f"{world.url}/checkpoints")
        model = toy_model(seed=77)
        assert world.publish(model) == 1
    else:
        goal = TuningGoal(index_type="IVF1,SQ8")
    loaded, progress = load(world, catalogue_version, goal=goal)
    assert "the stored index is refused and will be replaced" in caplog.text
    assert not loaded.is_from_store
    assert progress[0] == 0
    assert progress[-1] == 1
    assert loaded.manifest.index_type == ("IVF1,SQ8" if damage == "other settings" else "Flat")
    if damage != "other settings":
        assert_exact(loaded, model)
    # What replaced it can be trusted: the next load builds nothing.
    assert ArtefactStore(world.store, 0, 1).newest_revision(1, catalogue_version) == 2
    assert load(world, catalogue_version, goal=goal)[0].is_from_store


@pytest.mark.parametrize("damage", [None, "bit", "cut", "format"])
def test_a_saved_delta_spares_the_log_and_one_that_cannot_be_trusted_is_left_out(world, damage, caplog, monkeypatch):
    model = toy_model()
    first = world.load_items(toy_items(30))
    world.publish(model)
    world.build(1, first)
    newest = world.load_items(toy_items(40).slice(25))
    loader = IndexLoader(world.store, 0, 1, DEFAULT)
    if damage == "format":
        monkeypatch.setattr("index_service.saved_delta._FORMAT", 0)
    asyncio.run(loader.save_delta(load(world, newest)[0]))
    monkeypatch.undo()
    (path,) = [path for path in world.store.files("indexes") if "/delta-" in path]
    content = bytearray(world.store.get(path))
    if damage == "bit":
        content[len(content) // 2] ^= 4
    elif damage == "cut":
        del content[-5:]
    world.store.delete(path)
    world.store.put_new(path, bytes(content))
    if damage is None:
        for file in world.store.files("catalog/changes"):
            if file.endswith(".parquet"):
                world.store.delete(file)
    loaded, progress = load(world, newest)
    assert progress == []
    assert loaded.live.catalogue_version == newest
    assert_exact(loaded, model, model.item_ids[:40])
    assert ("more of the change log is read" in caplog.text) == (damage is not None)


def test_the_last_deltas_are_kept(world):
    first = world.load_items(toy_items(30))
    world.publish()
    world.build(1, first)
    loader = IndexLoader(world.store, 0, 1, DEFAULT)
    loaded, _ = load(world, first)
    states = []
    for number in range(31, 36):
        states.append(world.load_items(toy_items(50).slice(number, 1)))
        assert asyncio.run(loader.catch_up(loaded))
        asyncio.run(loader.save_delta(loaded))
        asyncio.run(loader.save_delta(loaded))  # As another replica does.
    names = [path.rsplit("/", 1)[-1] for path in world.store.files("indexes") if "/delta-" in path]
    assert sorted(names) == [f"delta-{state}.arrow" for state in states[-2:]]


def test_failures_say_whose_fault_they_are(world):
    catalogue_version = world.load_items()
    with pytest.raises(NotFoundError, match="checkpoint 1 is not published"):
        load(world, catalogue_version)
    world.publish()
    with pytest.raises(TwoTowerError, match=r"the catalogue has no version '0\.9'") as caught:
        load(world, "0.9")
    assert not isinstance(caught.value, CorruptCheckpointError)
    for file in ("item_tower.onnx", "manifest.json"):
        content = bytearray(world.store.get(f"checkpoints/1/{file}"))
        content[0] ^= 1
        world.store.delete(f"checkpoints/1/{file}")
        world.store.put_new(f"checkpoints/1/{file}", bytes(content))
        with pytest.raises(CorruptCheckpointError, match="checkpoint 1: "):
            load(world, catalogue_version)


def test_a_build_stands_back_and_ends_when_its_load_is_cancelled(world):

    catalogue_version = world.load_items()
    world.publish()

    async def run():
        before = set(children_of(os.getpid()))
        loader = IndexLoader(world.store, 0, 1, DEFAULT)
        is_building = asyncio.Event()
        task = asyncio.create_task(loader.load(1, catalogue_version, None, lambda _: is_building.set()))
        await is_building.wait()
        while not (builders := set(children_of(os.getpid())) - before):
            await asyncio.sleep(0.001)
        # From its first moment: its imports too would keep searches waiting.
        assert [os.getpriority(os.PRIO_PROCESS, builder) for builder in builders] == [19]
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert set(children_of(os.getpid())) == before

    asyncio.run(run())
    assert not world.store.files("indexes")


def test_an_index_that_another_replica_built_first_is_used(world):
    """Both find nothing; one gets the claim, and the other waits for what it stores."""
    model = toy_model()
    catalogue_version = world.load_items()
    world.publish(model)

    async def run():
        loaders = [IndexLoader(world.store, 0, 1, DEFAULT) for _ in range(2)]
        return await asyncio.gather(*(loader.load(1, catalogue_version, None, lambda _: None) for loader in loaders))

    loaded = asyncio.run(run())
    assert sorted(replica.is_from_store for replica in loaded) == [False, True]
    assert loaded[0].manifest == loaded[1].manifest
    for replica in loaded:
        assert_exact(replica, model)


def test_a_bucket_does_as_well_as_a_folder(s3_world):
    model = toy_model()
    catalogue_version = s3_world.load_items()
    s3_world.publish(model)
    loaded, progress = load(s3_world, catalogue_version)
    assert (loaded.is_from_store, progress[-1]) == (False, 1)
    assert_exact(loaded, model)
    assert load(s3_world, catalogue_version)[0].is_from_store


def test_a_shard_without_items_is_an_index_like_any_other(world):
    catalogue_version = world.load_items(toy_items(1))
    world.publish()
    loader = IndexLoader(world.store, 1 - shard_of("1", 2), 2, DEFAULT)
    loaded = asyncio.run(loader.load(1, catalogue_version, None, lambda _: None))
    assert loaded.live.num_items == 0
    assert loaded.live.view.search(toy_model().query_embeddings([QUERY]).astype(np.float32), 10).counts.tolist() == [0]
