"""What goes wrong while an index is obtained: refused in words, nothing half is left, and the next try heals."""

import asyncio
import os
import re
import shutil
import signal
import subprocess
import threading

import numpy as np
import pyarrow as pa
import pytest
from deltalake import write_deltalake
from shard_process import children_of
from small_indexes import ids_of
from toy_checkpoint import toy_items, toy_model

from index_service import load as load_module
from index_service.artefact import ITEM_HASHES, ITEMS, VECTORS, ArtefactRef, ArtefactStore
from index_service.load import IndexLoader
from index_service.plan import TuningGoal
from towers.catalogue import Catalogue
from towers.errors import CorruptArtefactError, StoreUnavailableError, TooLittleMemoryError, TwoTowerError

QUERY = {"user_id": "1", "history": ["2", "3"]}


def loader_of(world, goal=TuningGoal()):
    return IndexLoader(world.store, 0, 1, goal)


def load(loader, catalogue_version, replaced=None, version=1):
    return asyncio.run(loader.load(version, catalogue_version, replaced, lambda _: None))


def found(loaded, model, k=10):
    view = loaded.live.view
    hits = view.search(model.query_embeddings([QUERY]).astype(np.float32), k)
    return ids_of(view, hits.rows)


def stored_paths(world, file):
    return [path for path in world.store.files("indexes") if path.endswith(f"/{file}")]


def overwrite(world, path, content):
    world.store.delete(path)
    world.store.put_new(path, content)


@pytest.fixture
def built(world):
    """A world with a catalogue, a checkpoint and its stored index."""
    model = toy_model()
    world.model = model
    world.catalogue_version = world.load_items(toy_items(40))
    world.publish(model)
    world.build(1, world.catalogue_version)
    return world


def test_an_older_index_catches_up_instead_of_being_built_again(built):
    newest = built.load_items(toy_items(50))
    Catalogue(built.store).delete(["1", "2"])
    loaded = load(loader_of(built), newest)
    assert loaded.is_from_store
    assert loaded.live.built_catalogue_version == built.catalogue_version
    assert loaded.live.catalogue_version == Catalogue(built.store).version()
    assert found(loaded, built.model) == built.model.nearest(QUERY, built.model.item_ids[2:], 10)[0]


def rewrite_items(world):
    """As a tool does that knows nothing of the change log: the items are another table."""
    catalogue = Catalogue(world.store)
    catalogue.compact()
    write_deltalake(f"{world.url}/catalog/items", toy_items(20), mode="overwrite")
    return catalogue.version()


def test_after_items_were_rewritten_by_a_tool_the_index_is_built_anew(built):
    catalogue_version = rewrite_items(built)
    loader = loader_of(built)
    loaded = load(loader, catalogue_version)
    assert not loaded.is_from_store
    assert loaded.live.built_catalogue_version == catalogue_version
    assert loaded.live.num_items == 20
    assert load(loader, catalogue_version).is_from_store


def test_what_serves_says_when_it_cannot_catch_up(built):
    loader = loader_of(built)
    loaded = load(loader, built.catalogue_version)
    built.load_items(pa.table({"item_id": ["41"]}))
    assert asyncio.run(loader.catch_up(loaded))
    assert loaded.live.num_items == 41
    rewrite_items(built)
    assert not asyncio.run(loader.catch_up(loaded))
    assert loaded.live.num_items == 41


def test_more_changes_than_a_serving_process_should_embed_are_built(built, monkeypatch):
    monkeypatch.setattr(load_module, "_MOST_REPLAYED", 5)
    loader = loader_of(built)
    running = load(loader, built.catalogue_version)
    newest = built.load_items(toy_items(50))
    assert not asyncio.run(loader.catch_up(running))
    replacement = load(loader, newest, replaced=running)
    assert not replacement.is_from_store
    assert (replacement.live.built_catalogue_version, replacement.live.num_delta_items) == (newest, 0)


def test_a_replacement_that_another_replica_stored_is_used(built):
    running = load(loader_of(built), built.catalogue_version)
    newest = built.load_items(toy_items(50))
    assert not load(loader_of(built), newest, replaced=running).is_from_store
    other = load(loader_of(built), newest, replaced=running)
    assert other.is_from_store
    assert other.live.built_catalogue_version == newest


def test_one_replica_waits_while_another_one_builds(world, monkeypatch):
    monkeypatch.setattr(load_module, "CLAIM_POLL_S", 0.02)
    catalogue_version = world.load_items()
    world.publish()
    claim = ArtefactStore(world.store, 0, 1).claim(1, 10.0)
    assert claim.try_take()

    async def run():
        waiting = asyncio.create_task(loader_of(world).load(1, catalogue_version, None, lambda _: None))
        await asyncio.sleep(0.2)
        assert not waiting.done()
        await asyncio.to_thread(world.build, 1, catalogue_version)
        return await waiting

    assert asyncio.run(run()).is_from_store
    claim.release()


def test_the_build_of_a_replica_that_is_gone_is_taken_over(world, monkeypatch):
    monkeypatch.setattr(load_module, "CLAIM_POLL_S", 0.02)
    monkeypatch.setattr(load_module, "CLAIM_STALE_AFTER_S", 0.2)
    catalogue_version = world.load_items()
    world.publish()
    assert ArtefactStore(world.store, 0, 1).claim(1, 10.0).try_take()
    assert not load(loader_of(world), catalogue_version).is_from_store
    assert not any("claim" in path for path in world.store.files("indexes"))


@pytest.mark.parametrize("file", [VECTORS, ITEMS, ITEM_HASHES])
@pytest.mark.parametrize("damage", ["flip", "truncate", "lengthen", "remove"])
def test_a_damaged_file_is_refused_and_replaced(built, file, damage):
    newest = built.load_items(pa.table({"item_id": ["1"], "title": ["Title 1"], "year": [1951]}))
    built.build(1, newest)
    for path in stored_paths(built, file):
        content = bytearray(built.store.get(path))
        content[len(content) // 2] ^= 1
        if damage == "remove":
            built.store.delete(path)
        else:
            damaged = {"flip": content, "truncate": content[:-1], "lengthen": content + b"\0"}[damage]
            overwrite(built, path, bytes(damaged))
    loaded = load(loader_of(built), newest)
    assert not loaded.is_from_store
    assert found(loaded, built.model) == built.model.nearest(QUERY, built.model.item_ids[:40], 10)[0]


def test_of_two_stored_indexes_the_older_one_serves_when_the_newer_one_is_damaged(built, caplog):
    newest = built.load_items(toy_items(50))
    built.build(1, newest)
    folder = f"indexes/1/0-of-1/v{newest}"
    [path] = [path for path in stored_paths(built, VECTORS) if path.startswith(folder)]
    overwrite(built, path, b"")
    loaded = load(loader_of(built), newest)
    assert "the stored index is refused" in caplog.text
    assert loaded.is_from_store
    assert loaded.live.built_catalogue_version == built.catalogue_version
    assert loaded.live.num_items == 50


def test_an_index_that_finds_nothing_is_refused_although_every_digest_is_right(built, monkeypatch):
    """As after a bug in a build: here the ids of the vectors are right, and their search is not."""
    loader = loader_of(built)
    search = load_module.ShardIndex.search

    def half_blind(self, embeddings, k, *rest):
        return search(self, -embeddings, k, *rest)

    monkeypatch.setattr(load_module.ShardIndex, "search", half_blind)
    monkeypatch.setattr(load_module, "_WARM_UP_K", 5)
    with pytest.raises(TwoTowerError, match=r"the index that was just built is refused: its recall is 0\.0"):
        load(loader, built.catalogue_version)


def test_what_does_not_fit_in_memory_is_refused_before_anything_is_allocated(built, monkeypatch):
    monkeypatch.setattr(load_module, "memory_available", lambda: 1000)
    with pytest.raises(TooLittleMemoryError, match=r"loading the index of checkpoint 1 needs about [1-9]\d* MiB"):
        load(loader_of(built), built.catalogue_version)
    built.publish(toy_model(seed=2))
    before = set(children_of(os.getpid()))
    with pytest.raises(TooLittleMemoryError, match=r"building the index of checkpoint 2 needs .* 0 MiB are available"):
        load(loader_of(built), built.catalogue_version, version=2)
    assert set(children_of(os.getpid())) == before
    assert not built.store.files("indexes/2")
    monkeypatch.undo()
    assert load(loader_of(built), built.catalogue_version).is_from_store


def test_a_build_needs_the_memory_of_its_pinned_kind_or_of_the_largest(world, monkeypatch):
    catalogue_version = world.load_items(toy_items(20_000))
    world.publish(toy_model(num_items=20_000))
    monkeypatch.setattr(load_module, "memory_available", lambda: 1000)

    def needed_mib(goal):
        with pytest.raises(TooLittleMemoryError) as refused:
            load(loader_of(world, goal), catalogue_version)
        return int(re.search(r"needs about (\d+) MiB", str(refused.value)).group(1))

    assert needed_mib(TuningGoal(index_type="IVF64,SQ8")) < needed_mib(TuningGoal())


def test_reading_ends_when_it_is_no_longer_wanted(built):
    stopped = threading.Event()
    stopped.set()
    artefacts = ArtefactStore(built.store, 0, 1)
    with pytest.raises(CorruptArtefactError, match="not wanted any more"):
        artefacts.get(ArtefactRef(1, built.catalogue_version, 1), stopped)


def test_a_builder_that_is_killed_leaves_nothing_and_the_next_one_is_not_kept_waiting(world):
    catalogue_version = world.load_items(toy_items(10_000))
    world.publish(toy_model(num_items=10_000))
    before = set(children_of(os.getpid()))

    def kill_builder(progress):
        for builder in set(children_of(os.getpid())) - before:
            os.kill(builder, signal.SIGKILL)

    loader = loader_of(world, TuningGoal(index_type="IVF16,SQ8"))
    with pytest.raises(TwoTowerError, match="the build ended with status -9"):
        asyncio.run(loader.load(1, catalogue_version, None, kill_builder))
    assert not world.store.files("indexes")
    assert not load(loader, catalogue_version).is_from_store


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting needs privileges")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_fails_the_build_and_leaves_nothing_behind(world, small_disk):
    catalogue_version = world.load_items()
    world.publish()
    shutil.copytree(world.url, small_disk / "store")
    world.url = str(small_disk / "store")
    loader = loader_of(world)
    filler = small_disk / "filler"
    room = os.statvfs(small_disk)
    filler.write_bytes(b"\0" * (room.f_bavail * room.f_bsize - 8192))
    with pytest.raises(StoreUnavailableError, match="No space left"):
        world.build(1, catalogue_version)
    assert not [path for path in small_disk.glob("store/indexes/**/*") if path.is_file()]
    with pytest.raises(TwoTowerError):
        load(loader, catalogue_version)
    filler.unlink()
    assert not load(loader, catalogue_version).is_from_store
    assert load(loader, catalogue_version).is_from_store
