"""Stored indexes: whole or not there, and never believed when damaged."""

import threading
from dataclasses import replace

import numpy as np
import pytest
from small_indexes import small_artefact, unit_vectors

from index_service import artefact as artefact_module
from index_service.artefact import INDEX, ITEM_HASHES, ITEMS, VECTORS, ArtefactRef, ArtefactStore
from towers.errors import ConflictError, CorruptArtefactError
from towers.store import Store

CATALOGUE = "0.1"
REF = ArtefactRef(1, CATALOGUE, 1)
FOLDER = "indexes/1/0-of-1/v0.1"


def assert_same(read, stored):
    """`stored` as it was built, without the digests that storing adds."""
    assert read.manifest.model_copy(update={"files": {}}) == stored.manifest
    assert read.items == stored.items
    assert read.item_hashes.tolist() == stored.item_hashes.tolist()
    np.testing.assert_array_equal(read.ann.vectors, stored.ann.vectors)
    queries = unit_vectors(5, read.ann.dim, seed=99)
    for found, right in zip(read.ann.search(queries, 20), stored.ann.search(queries, 20), strict=True):
        np.testing.assert_array_equal(found, right)


@pytest.mark.parametrize("chunk_bytes", [100, 8 * 2**20])
@pytest.mark.parametrize("index_type", ["IVF8,SQ8", "IVF8,PQ2x4fs,Refine(Flat)", "HNSW8", "Flat"])
def test_round_trip(store_url, index_type, chunk_bytes, monkeypatch):
    monkeypatch.setattr(artefact_module, "CHUNK_BYTES", chunk_bytes)
    artefacts = ArtefactStore(Store(store_url), 0, 1)
    assert artefacts.newest_revision(1, CATALOGUE) is None
    stored = small_artefact(unit_vectors(200, 4), index_type=index_type)
    manifest = artefacts.put(stored)
    assert set(manifest.files) == {VECTORS, ITEMS, ITEM_HASHES} | ({INDEX} if index_type != "Flat" else set())
    assert artefacts.newest_revision(1, CATALOGUE) == 1
    assert artefacts.manifest(REF) == manifest
    assert_same(artefacts.get(REF), stored)
    assert artefacts.newest_revision(2, CATALOGUE) is None
    assert artefacts.newest_revision(1, "0.2") is None


def test_an_empty_index_is_stored_like_any_other(folder_url):
    artefacts = ArtefactStore(Store(folder_url), 0, 1)
    stored = small_artefact(unit_vectors(0, 4))
    artefacts.put(stored)
    assert_same(artefacts.get(REF), stored)


def test_any_catalogue_version_names_one_folder(folder_url):
    artefacts = ArtefactStore(Store(folder_url), 0, 1)
    versions = ("1", "..", "a/b", "a%2Fb", "a=2Fb", "ü ", "a b")
    for version in versions:
        artefacts.put(small_artefact(unit_vectors(2, 4), catalogue_version=version))
    for version in versions:
        assert artefacts.get(ArtefactRef(1, version, 1)).manifest.catalogue_version == version
    assert len(Store(folder_url).folders("indexes/1/0-of-1")) == len(versions)
    assert {ref.catalogue_version for ref in artefacts.refs(1)} == set(versions)


def test_the_newest_state_of_the_catalogue_is_found_first(store_url):
    artefacts = ArtefactStore(Store(store_url), 0, 1)
    assert artefacts.newest(1) is None
    for version, revision in (("0.9", 1), ("0.10", 1), ("0.10", 2), ("2.3", 1), ("1.200", 1)):
        artefacts.put(small_artefact(unit_vectors(2, 4), catalogue_version=version, revision=revision))
    artefacts.put(small_artefact(unit_vectors(2, 4), catalogue_version="7.7", checkpoint_version=2))
    Store(store_url).put_new("indexes/1/0-of-1/v9.9/abc/index.faiss", b"a build in progress")
    expected = [("2.3", 1), ("1.200", 1), ("0.10", 2), ("0.9", 1)]
    assert artefacts.refs(1) == [ArtefactRef(1, *ref) for ref in expected]
    assert artefacts.newest(1) == ArtefactRef(1, "2.3", 1)


def test_of_builders_that_race_one_wins_and_nothing_is_mixed(store_url):
    built = [small_artefact(unit_vectors(10, 4, seed=seed)) for seed in range(6)]
    outcomes = []

    def publish(artefact):
        try:
            ArtefactStore(Store(store_url), 0, 1).put(artefact)
        except ConflictError:
            outcomes.append(None)
        else:
            outcomes.append(artefact)

    threads = [threading.Thread(target=publish, args=(artefact,)) for artefact in built]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [outcome for outcome in outcomes if outcome is not None]
    assert len(outcomes) == 6
    assert len(winners) == 1
    assert_same(ArtefactStore(Store(store_url), 0, 1).get(REF), winners[0])


@pytest.mark.parametrize("chunk_bytes", [64, 8 * 2**20])
def test_every_flipped_bit_is_seen(folder_url, chunk_bytes, monkeypatch):
    monkeypatch.setattr(artefact_module, "CHUNK_BYTES", chunk_bytes)
    store = Store(folder_url)
    artefacts = ArtefactStore(store, 0, 1)
    artefact = small_artefact(unit_vectors(50, 4), index_type="IVF4,SQ8")
    artefacts.put(artefact)
    random = np.random.default_rng(0)
    names = [f"{artefact.manifest.build}/{file}" for file in (INDEX, VECTORS, ITEMS, ITEM_HASHES)]
    for path in (f"{FOLDER}/{name}" for name in (*names, "manifest-1.json")):
        good = store.get(path)
        for bit in random.choice(8 * len(good), size=60, replace=False).tolist():
            bad = bytearray(good)
            bad[bit // 8] ^= 1 << bit % 8
            _replace(store, path, bytes(bad))
            try:
                read = artefacts.get(REF)
            except CorruptArtefactError:
                continue
            assert_same(read, artefact)  # White space in the manifest says nothing.
            assert path.endswith("manifest-1.json"), f"bit {bit} of {path} went unseen"
        for other in (good[:-1], good + b"\0"):
            _replace(store, path, other)
            with pytest.raises(CorruptArtefactError):
                artefacts.get(REF)
        store.delete(path)
        with pytest.raises(CorruptArtefactError, match="is missing"):
            artefacts.get(REF)
        store.put_new(path, good)
    assert_same(artefacts.get(REF), artefact)


@pytest.mark.parametrize(
    "elsewhere", ["indexes/2/0-of-1/v0.1", "indexes/1/0-of-1/v0.2", "indexes/1/1-of-2/v0.1", "indexes/1/0-of-2/v0.1"]
)
def test_an_artefact_in_another_place_is_refused(folder_url, elsewhere):
    store = Store(folder_url)
    ArtefactStore(store, 0, 1).put(small_artefact(unit_vectors(5, 4)))
    for path in store.files(FOLDER):
        store.put_new(path.replace(FOLDER, elsewhere), store.get(path))
    _, version, shards, catalogue = elsewhere.split("/")
    shard, _, num_shards = shards.partition("-of-")
    with pytest.raises(CorruptArtefactError, match="it describes another index"):
        ArtefactStore(store, int(shard), int(num_shards)).get(ArtefactRef(int(version), catalogue[1:], 1))


def test_a_newer_revision_replaces_and_leaves_the_older(folder_url):
    artefacts = ArtefactStore(Store(folder_url), 0, 1)
    first, second = (small_artefact(unit_vectors(5, 4, seed=n), revision=n) for n in (1, 2))
    tenth = small_artefact(unit_vectors(5, 4, seed=10), revision=10)
    for artefact in (first, second, tenth):
        artefacts.put(artefact)
    assert artefacts.newest_revision(1, CATALOGUE) == 10
    assert_same(artefacts.get(ArtefactRef(1, CATALOGUE, 10)), tenth)
    assert_same(artefacts.get(REF), first)


def test_files_without_a_manifest_are_not_there(folder_url):
    store = Store(folder_url)
    ArtefactStore(store, 0, 1).put(small_artefact(unit_vectors(5, 4)))
    store.delete(f"{FOLDER}/manifest-1.json")
    assert ArtefactStore(store, 0, 1).newest_revision(1, CATALOGUE) is None
    assert ArtefactStore(store, 0, 1).newest(1) is None


def test_prune_deletes_what_is_older_and_whole(store_url):
    store = Store(store_url)
    artefacts = ArtefactStore(store, 0, 1)
    built = {version: small_artefact(unit_vectors(5, 4), catalogue_version=version) for version in ("1", "2", "3")}
    for artefact in built.values():
        artefacts.put(artefact)
    artefacts.put(small_artefact(unit_vectors(5, 4), checkpoint_version=2))
    store.put_new("indexes/1/0-of-1/v4/abc/index.faiss", b"a build in progress")
    artefacts.prune(1, built["2"].manifest.created)
    assert artefacts.newest_revision(1, "1") is None
    assert not store.files("indexes/1/0-of-1/v1")
    for version in ("2", "3"):
        assert_same(artefacts.get(ArtefactRef(1, version, 1)), built[version])
    artefacts.get(ArtefactRef(2, "0.1", 1))
    assert store.files("indexes/1/0-of-1/v4")


def test_a_manifest_of_another_format_is_refused(folder_url):
    artefacts = ArtefactStore(Store(folder_url), 0, 1)
    artefact = small_artefact(unit_vectors(5, 4))
    artefacts.put(replace(artefact, manifest=artefact.manifest.model_copy(update={"format": 1})))
    with pytest.raises(CorruptArtefactError, match="format"):
        artefacts.get(REF)


@pytest.mark.parametrize("file", [INDEX, VECTORS, ITEMS, ITEM_HASHES])
def test_files_that_do_not_fit_together_are_refused(file, folder_url):
    store = Store(folder_url)
    artefacts = ArtefactStore(store, 0, 1)
    one, other = (
        artefacts.put(small_artefact(unit_vectors(n, 8), index_type="IVF2,SQ8", revision=n)) for n in (10, 11)
    )
    for content in (store.get(f"{FOLDER}/{other.build}/{file}"), b"12345678"):
        _replace(store, f"{FOLDER}/{one.build}/{file}", content)
        mixed = one.model_copy(update={"files": {**one.files, file: artefact_module.stored_file(content)}})
        _replace(store, f"{FOLDER}/manifest-10.json", artefact_module._sealed(mixed))
        with pytest.raises(CorruptArtefactError, match=r"does not load|do not fit together"):
            artefacts.get(ArtefactRef(1, CATALOGUE, 10))


def _replace(store, path, content):
    store.delete(path)
    store.put_new(path, content)


def test_indexes_of_old_checkpoints_go_with_all_their_layouts(folder_url):
    store = Store(folder_url)
    for version in range(1, 8):
        for shard, num_shards in ((0, 1), (1, 2)):
            artefact = small_artefact(unit_vectors(3, 4), checkpoint_version=version, catalogue_version=CATALOGUE)
            manifest = artefact.manifest.model_copy(update={"shard": shard, "num_shards": num_shards})
            ArtefactStore(store, shard, num_shards).put(replace(artefact, manifest=manifest))
    artefacts = ArtefactStore(store, 0, 1)
    artefacts.prune_others((2, 6))
    kept = {int(path.split("/")[1]) for path in store.files("indexes")}
    assert kept == {2, 5, 6, 7}, "those that are named, and the newest two others"
    for version in kept:
        assert artefacts.newest(version) == ArtefactRef(version, CATALOGUE, 1)
        assert ArtefactStore(store, 1, 2).newest(version) == ArtefactRef(version, CATALOGUE, 1)
    artefacts.prune_others((2, 5, 6, 7))
    assert {int(path.split("/")[1]) for path in store.files("indexes")} == kept
