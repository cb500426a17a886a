"""`twotower index`: what shards hold and what is stored, and the frontier of a real catalogue and checkpoint."""

from pathlib import Path

import pytest
from command_outcome import Twotower
from toy_checkpoint import toy_items, toy_model

from index_service.build import build
from index_service.order import BuildOrder
from index_service.plan import TuningGoal
from towers.catalogue import Catalogue
from towers.checkpoint import CheckpointStore
from towers.deployment import DeploymentStore, promoted, staged
from towers.errors import InvalidInputError
from towers.store import Store

NOBODY = "127.0.0.1:1|127.0.0.1:2"


@pytest.fixture
def large_store(folder_url: str) -> Store:
    """A checkpoint with validation queries and 600 items; it is live."""
    store = Store(folder_url)
    Catalogue(store).upsert(toy_items(600))
    CheckpointStore(store).publish(toy_model(dim=16, num_items=600, num_users=200).draft())
    CheckpointStore(store).publish(toy_model(dim=8, seed=2, num_items=600).draft())
    records = DeploymentStore(store)
    records.write(staged(records.current(), 1, "test"))
    records.write(promoted(records.current(), "test"))
    return store


def build_index(store: Store, shard: int = 0, num_shards: int = 1, version: int = 1, revision: int = 1) -> None:
    order = BuildOrder(
        store=store.url,
        shard=shard,
        num_shards=num_shards,
        checkpoint_version=version,
        catalogue_version="0.1",
        revision=revision,
        goal=TuningGoal(index_type="IVF8,SQ8", target_k=50),
    )
    build(order, lambda _: None)


def test_the_frontier_of_the_live_checkpoint(twotower: Twotower, large_store: Store, tmp_path: Path) -> None:
    plot = tmp_path / "frontier.png"
    shown = twotower("index", "tune", "--store", large_store.url, "--k", "20", "--plot", str(plot))
    assert shown.exit_code == 0, shown.err
    assert "Checkpoint 1, catalogue 0.1: 600 items of dimension 16, 20 results a search" in shown.out
    assert "measured with validation queries" in shown.out
    for index_type in ("Flat", "SQ8", "SQfp16", "PQ8x4fs,Refine(Flat)", "HNSW32"):
        assert index_type in shown.out
    assert shown.out.count("chosen") == 1
    assert "A build searches fewer than 5000 items exactly all the same" in shown.out
    assert shown.out.endswith(f"drawn into {plot}\n")
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert not large_store.files("indexes"), "nothing is stored"


def test_the_frontier_as_json(twotower: Twotower, large_store: Store) -> None:
    arguments = ("--shard", "0/2", "--version", "2", "--target-recall", "0.9", "--json")
    frontier = twotower("index", "tune", "--store", large_store.url, *arguments).json
    assert (frontier["checkpoint_version"], frontier["dim"], frontier["measured_with"]) == (2, 8, "item vectors")
    assert 200 < frontier["num_items"] < 400
    assert frontier["goal"]["target_recall"] == 0.9
    (chosen,) = [candidate for candidate in frontier["candidates"] if candidate["verdict"] == "chosen"]
    assert chosen["setting"]["recall"] >= 0.9
    flat = next(curve for curve in frontier["curves"] if curve["index_type"] == "Flat")
    assert [point["recall"] for point in flat["points"]] == [1.0]
    assert flat["size_bytes"] == frontier["num_items"] * 8 * 4
    for curve in frontier["curves"]:
        assert all(point["latency_s"] > 0 for point in curve["points"])


def test_what_cannot_be_measured_is_said(
    twotower: Twotower, store: Store, folder_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "SHARD" in twotower("index", "tune", "--store", store.url, "--shard", "2/2").err
    missing = twotower("index", "tune", "--store", store.url, "--version", "9")
    assert (missing.exit_code, missing.err) == (1, "error: checkpoint 9 is not published; published: [1, 2]\n")
    empty = twotower("index", "tune", "--store", f"{folder_url}/empty")
    assert (empty.exit_code, empty.err.count("\n")) == (1, 1)
    assert "no checkpoint is published" in empty.err
    monkeypatch.setenv("TWOTOWER_MAX_INDEX_MB", "0.0001")
    refused = twotower("index", "tune", "--store", store.url)
    assert refused.exit_code == 2
    assert "Raise max_latency_ms or max_index_mb" in refused.err


def test_stored_indexes_and_shards_that_do_not_answer(twotower: Twotower, large_store: Store) -> None:
    for shard in (1, 0):
        build_index(large_store, shard, 2)
    build_index(large_store, version=2)
    build_index(large_store, version=2, revision=2)
    at = ("--store", large_store.url, "--shards", NOBODY)
    seen = twotower("index", "inspect", *at, "--json").json
    assert [replica["error"] for replica in seen["replicas"]] == ["is not reachable"] * 2
    stored = seen["stored"]
    assert [(index["checkpoint_version"], index["shard"], index["num_shards"]) for index in stored] == [
        (1, 0, 2),
        (1, 1, 2),
        (2, 0, 1),
    ]
    assert stored[-1]["revision"] == 2
    assert sum(index["num_items"] for index in stored[:2]) == 600
    files = large_store.files(stored[0]["path"].rpartition("/")[0])
    assert stored[0]["size_bytes"] == sum(size for path, size in files.items() if not path.endswith(".json"))

    manifest = bytearray(large_store.get(stored[0]["path"]))
    manifest[100] ^= 1
    large_store.delete(stored[0]["path"])
    large_store.put_new(stored[0]["path"], bytes(manifest))
    shown = twotower("index", "inspect", *at)
    assert shown.exit_code == 0
    assert "shard 0/1 at 127.0.0.1:2: is not reachable" in shown.out
    assert "IVF8,SQ8" in shown.out
    assert f"{stored[0]['path']}: it " in shown.out
    with pytest.raises(InvalidInputError):
        build_index(large_store, 3, 2)
