import dataclasses
import hashlib
import json
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from child_process import tied_python
from toy_checkpoint import ToyModel, toy_model

from towers.checkpoint import FOLDER, MANIFEST, CheckpointStore, Manifest
from towers.errors import ConflictError, CorruptArtefactError, NotFoundError, StoreUnavailableError, TwoTowerError
from towers.schema import Owner
from towers.store import Store
from towers.tower import Tower

OWNERS: Sequence[Owner] = ("query", "item")
FILES = (
    "schema.json",
    "golden.json",
    "vocabulary/user_id.json",
    "vocabulary/item_id.json",
    "query_tower.onnx",
    "item_tower.onnx",
    "validation_queries.f32",
)


def _assert_is(model: ToyModel, checkpoints: CheckpointStore, version: int) -> None:
    """The version is whole, and all of it is this model's."""
    query = {"user_id": "1", "history": ["2", "3"]}
    towers = {owner: Tower(checkpoints.load(version, owner)) for owner in OWNERS}
    np.testing.assert_allclose(towers["query"].embed_rows([query]), model.query_embeddings([query]), atol=1e-6)
    np.testing.assert_allclose(towers["item"].embed_rows([{"item_id": "5"}]), model.item_embeddings(["5"]), atol=1e-6)


def test_publish_and_load(store_url: str) -> None:
    checkpoints = CheckpointStore(Store(store_url))
    assert checkpoints.versions() == []
    with pytest.raises(NotFoundError, match=r"checkpoint 1 is not published; published: \[\]"):
        checkpoints.manifest(1)
    models = {1: toy_model(), 2: toy_model(dim=5, seed=2)}
    first = checkpoints.publish(models[1].draft(metrics={"test.recall_at_10": 0.25}))
    second = checkpoints.publish(models[2].draft(parent_version=1))
    assert (first.version, second.version) == (1, 2)
    reader = CheckpointStore(Store(store_url))
    assert reader.versions() == [1, 2]
    assert reader.manifest(1) == first
    assert reader.manifest(2) == second
    assert first.metrics == {"test.recall_at_10": 0.25}
    assert (second.dim, second.parent_version) == (5, 1)
    assert first.schema_fingerprint == models[1].schema.fingerprint
    assert sorted(first.files) == sorted(FILES)
    for version, model in models.items():
        _assert_is(model, reader, version)
        files = reader.load(version, "query")
        assert files.vocabularies == {"user_id": model.user_ids, "item_id": model.item_ids}
        assert files.schema == model.schema
    written = Store(store_url).files(f"{FOLDER}/1")
    assert written == {
        **{f"{FOLDER}/1/{path}": digest.size_bytes for path, digest in first.files.items()},
        f"{FOLDER}/1/{MANIFEST}": written[f"{FOLDER}/1/{MANIFEST}"],
    }


def test_versions_come_in_numeric_order(folder_url: str) -> None:
    checkpoints = CheckpointStore(Store(folder_url))
    draft = toy_model().draft()
    assert [checkpoints.publish(draft).version for _ in range(11)] == list(range(1, 12))
    assert checkpoints.versions() == list(range(1, 12))


def test_other_folders_are_no_versions(folder_url: str) -> None:
    store = Store(folder_url)
    for path in ("7/schema.json", "latest/manifest.json", "8/deep/manifest.json", "manifest.json", "9x/manifest.json"):
        store.put_new(f"{FOLDER}/{path}", b"{}")
    checkpoints = CheckpointStore(store)
    assert checkpoints.versions() == []
    assert checkpoints.publish(toy_model().draft()).version == 9, "numbers that were ever claimed are not used again"
    assert checkpoints.versions() == [9]


# Two publishers race.

_PUBLISHER = """
import sys
from toy_checkpoint import toy_model
from towers.checkpoint import CheckpointStore
from towers.errors import ConflictError
from towers.store import Store

class StoreThatWaits(Store):
    def folders(self, prefix):
        found = super().folders(prefix)
        print("listed", flush=True)
        sys.stdin.readline()
        return found

checkpoints = CheckpointStore(StoreThatWaits(sys.argv[1]))
draft = toy_model(dim=int(sys.argv[2]), seed=int(sys.argv[2])).draft()
while True:
    try:
        print(checkpoints.publish(draft).version, flush=True)
    except ConflictError as error:
        assert "publish again" in str(error)
        print("conflict", flush=True)
"""


@pytest.mark.parametrize(("kind", "num_rounds"), [("folder", 20), ("s3", 4)])
def test_of_publishers_that_race_exactly_one_wins(request: pytest.FixtureRequest, kind: str, num_rounds: int) -> None:
    url = request.getfixturevalue(f"{kind}_url")
    dims = (3, 4, 5)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    publishers = [
        subprocess.Popen(
            tied_python(_PUBLISHER, url, str(dim)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for dim in dims
    ]

    def lines() -> list[str]:
        return [publisher.stdout.readline().strip() for publisher in publishers if publisher.stdout is not None]

    checkpoints = CheckpointStore(Store(url))
    try:
        for number in range(1, num_rounds + 1):
            assert lines() == ["listed"] * len(dims), "all have seen the same number free"
            for publisher in publishers:
                assert publisher.stdin is not None
                publisher.stdin.write("go\n")
                publisher.stdin.flush()
            answers = lines()
            assert sorted(answers) == sorted([str(number), "conflict", "conflict"])
            winner = dims[answers.index(str(number))]
            assert checkpoints.versions() == list(range(1, number + 1))
            _assert_is(toy_model(dim=winner, seed=winner), checkpoints, number)
            assert len(Store(url).files(f"{FOLDER}/{number}")) == len(FILES) + 1, "nothing of the losers"
    finally:
        for publisher in publishers:
            publisher.kill()
            publisher.communicate()


# The publisher dies.

_DYING_PUBLISHERS = """
import os, signal, sys
from toy_checkpoint import toy_model
from towers.checkpoint import CheckpointStore
from towers.store import Store

class StoreOfTheDying(Store):
    def __init__(self, url, dies_at, is_before):
        super().__init__(url)
        self.puts, self.dies_at, self.is_before = 0, dies_at, is_before

    def put_new(self, path, content):
        if self.puts == self.dies_at and self.is_before:
            os.kill(os.getpid(), signal.SIGKILL)
        super().put_new(path, content)
        if self.puts == self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.puts += 1

draft = toy_model(seed=9).draft()
for line in sys.stdin:
    step, moment = line.split()
    pid = os.fork()  # No thread runs yet: the store is opened by the child.
    if pid == 0:
        CheckpointStore(StoreOfTheDying(sys.argv[1], int(step), moment == "before")).publish(draft)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    print("killed" if os.WIFSIGNALED(status) else "lived", flush=True)
"""


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_kill_9_at_each_step_leaves_nothing_visible(request: pytest.FixtureRequest, kind: str) -> None:
    url = request.getfixturevalue(f"{kind}_url")
    checkpoints = CheckpointStore(Store(url))
    model = toy_model(seed=1)
    visible = [checkpoints.publish(model.draft()).version]
    num_puts = len(FILES) + 1
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "OPENBLAS_NUM_THREADS": "1"}
    with subprocess.Popen(
        tied_python(_DYING_PUBLISHERS, url), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as mother:
        assert mother.stdin is not None
        assert mother.stdout is not None
        for step in range(num_puts):
            for moment in ("before", "after"):
                mother.stdin.write(f"{step} {moment}\n")
                mother.stdin.flush()
                assert mother.stdout.readline() == "killed\n"
                if (step, moment) == (num_puts - 1, "after"):
                    last = checkpoints.versions()[-1]
                    assert checkpoints.versions() == [*visible, last], "the manifest makes it visible, whole"
                    _assert_is(toy_model(seed=9), checkpoints, last)
                    visible.append(last)
                assert checkpoints.versions() == visible
                visible.append(checkpoints.publish(model.draft()).version)
                assert checkpoints.versions() == visible, "the next publisher goes on"
                _assert_is(model, checkpoints, visible[-1])
        mother.stdin.write(f"{num_puts} before\n")
        mother.stdin.flush()
        assert mother.stdout.readline() == "lived\n", "every step was killed"
        mother.kill()


# The store fails.


class FailingStore(Store):
    """Fails at one put, before it is done, or after it is done with the answer lost."""

    def __init__(self, url: str, fails_at: int, is_done: bool, error: TwoTowerError) -> None:
        super().__init__(url)
        self.puts = 0
        self._fails_at = fails_at
        self._is_done = is_done
        self._error = error

    def put_new(self, path: str, content: bytes) -> None:
        is_failing = self.puts == self._fails_at
        self.puts += 1
        if self._is_done or not is_failing:
            super().put_new(path, content)
        if is_failing:
            raise self._error


@pytest.mark.parametrize("step", range(len(FILES) + 1))
def test_a_put_that_fails_leaves_no_files(folder_url: str, step: int) -> None:
    store = FailingStore(folder_url, step, False, StoreUnavailableError("disk full"))
    checkpoints = CheckpointStore(store)
    with pytest.raises(StoreUnavailableError, match="disk full"):
        checkpoints.publish(toy_model().draft())
    assert store.files("") == {}
    assert checkpoints.publish(toy_model().draft()).version in (1, 2)


@pytest.mark.parametrize("error", [StoreUnavailableError("timeout"), ConflictError("exists, from the first attempt")])
@pytest.mark.parametrize("step", range(len(FILES) + 1))
def test_an_answer_that_is_lost_leaves_all_or_nothing(folder_url: str, step: int, error: TwoTowerError) -> None:
    store = FailingStore(folder_url, step, True, error)
    checkpoints = CheckpointStore(store)
    if step == len(FILES):
        assert checkpoints.publish(toy_model().draft()).version == 1
        assert checkpoints.versions() == [1]
        _assert_is(toy_model(), checkpoints, 1)
        return
    with pytest.raises(type(error)):
        checkpoints.publish(toy_model().draft())
    # Whose the claim is cannot be told then, so it stays; the number is not used again.
    assert set(store.files("")) == ({f"{FOLDER}/1/schema.json"} if step == 0 else set())
    assert checkpoints.versions() == []
    version = checkpoints.publish(toy_model().draft()).version
    _assert_is(toy_model(), checkpoints, version)


_DISK_FULL = """
import resource, sys
from toy_checkpoint import toy_model
from towers.checkpoint import CheckpointStore
from towers.errors import StoreUnavailableError
from towers.store import Store

checkpoints = CheckpointStore(Store(sys.argv[1]))
for num_bytes in range(0, 40_000, 2_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))
    try:
        print(num_bytes, checkpoints.publish(toy_model(num_items=200).draft()).version)
        break
    except StoreUnavailableError as error:
        assert "File too large" in str(error), error
        print(num_bytes, sorted(Store(sys.argv[1]).files("")))
"""


def test_a_full_disk_leaves_no_files(folder_url: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(
        tied_python(_DISK_FULL, folder_url), capture_output=True, text=True, check=True, env=environment
    )
    *failed, published = done.stdout.splitlines()
    assert len(failed) >= 3
    assert all(line.endswith(" []") for line in failed)
    checkpoints = CheckpointStore(Store(folder_url))
    assert checkpoints.versions() == [int(published.split()[1])]
    assert len([path for path in Path(folder_url).rglob("*") if path.is_file()]) == len(FILES) + 1


# A file is damaged.


def _load_both(checkpoints: CheckpointStore, version: int) -> None:
    checkpoints.validation_queries(checkpoints.manifest(version))
    for owner in OWNERS:
        checkpoints.load(version, owner)


def _flip_first(content: bytes) -> bytes:
    return bytes([content[0] ^ 1]) + content[1:]


def _flip_middle(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0x10]) + content[middle + 1 :]


def _flip_last(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 0x80])


DAMAGES: Sequence[Callable[[bytes], bytes]] = (
    _flip_first,
    _flip_middle,
    _flip_last,
    lambda content: content[:-1],
    lambda content: content[: len(content) // 2],
    lambda content: b"",
    lambda content: content + b"\n",
    lambda content: bytes(len(content)),
)


@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_is_refused(folder_url: str, file: str) -> None:
    checkpoints = CheckpointStore(Store(folder_url))
    checkpoints.publish(toy_model().draft())
    path = Path(folder_url, FOLDER, "1", file)
    content = path.read_bytes()
    for damage in DAMAGES:
        path.write_bytes(damage(content))
        with pytest.raises(CorruptArtefactError, match=f"checkpoint 1: {file} differs"):
            _load_both(checkpoints, 1)
    path.unlink()
    with pytest.raises(CorruptArtefactError, match=f"checkpoint 1: {file} is missing"):
        _load_both(checkpoints, 1)
    path.write_bytes(content)
    _load_both(checkpoints, 1)


@pytest.mark.parametrize("file", FILES)
def test_a_file_of_another_version_is_refused(folder_url: str, file: str) -> None:
    checkpoints = CheckpointStore(Store(folder_url))
    checkpoints.publish(toy_model(num_items=50, num_users=10).draft())
    checkpoints.publish(toy_model(seed=2, num_items=51, num_users=11).draft())
    ours, theirs = (Path(folder_url, FOLDER, version, file) for version in "12")
    if file == "schema.json":
        assert ours.read_bytes() == theirs.read_bytes()
        return
    ours.write_bytes(theirs.read_bytes())
    with pytest.raises(CorruptArtefactError, match=f"checkpoint 1: {file} differs"):
        _load_both(checkpoints, 1)


def _edit_manifest(url: str, change: Callable[[dict[str, Any]], object]) -> None:
    path = Path(url, FOLDER, "1", MANIFEST)
    manifest = json.loads(path.read_bytes())
    change(manifest)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda manifest: manifest.update(version=2), "its manifest says version 2"),
        (lambda manifest: manifest.update(version=0), "not valid"),
        (lambda manifest: manifest.update(dim=0), "not valid"),
        (lambda manifest: manifest.update(metric="l2"), "not valid"),
        (lambda manifest: manifest.pop("files"), "not valid"),
        (lambda manifest: manifest.update(schema_fingerprint="0" * 64), "not the schema that the manifest names"),
        (lambda manifest: manifest["files"].pop("golden.json"), "does not name golden.json"),
        (lambda manifest: manifest["files"].pop("vocabulary/item_id.json"), "does not name vocabulary/item_id.json"),
        (lambda manifest: manifest["files"]["query_tower.onnx"].update(size_bytes=1), "query_tower.onnx differs"),
        (lambda manifest: manifest["files"]["item_tower.onnx"].update(sha256="0" * 64), "item_tower.onnx differs"),
    ],
)
def test_a_wrong_manifest_is_refused(folder_url: str, change: Callable[[dict[str, Any]], object], reason: str) -> None:
    checkpoints = CheckpointStore(Store(folder_url))
    checkpoints.publish(toy_model().draft())
    _edit_manifest(folder_url, change)
    with pytest.raises(CorruptArtefactError, match=f"checkpoint 1: .*{reason}"):
        _load_both(checkpoints, 1)


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"[]", b"\xff\xfe", b"{}"])
def test_a_manifest_that_is_none_is_refused(folder_url: str, content: bytes) -> None:
    checkpoints = CheckpointStore(Store(folder_url))
    checkpoints.publish(toy_model().draft())
    Path(folder_url, FOLDER, "1", MANIFEST).write_bytes(content)
    with pytest.raises(CorruptArtefactError, match="checkpoint 1: its manifest is not valid"):
        checkpoints.load(1, "query")


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("schema.json", b"{}", "schema.json is not a schema"),
        ("schema.json", b"\xff", "schema.json is not a schema"),
        ("golden.json", b"{", "golden.json is not JSON"),
        ("golden.json", b"[]", "golden.json has no valid query examples"),
        ("golden.json", b'{"query": 5}', "golden.json has no valid query examples"),
        ("vocabulary/item_id.json", b"{", "vocabulary/item_id.json is not JSON"),
        ("vocabulary/item_id.json", b'{"1": 2}', "vocabulary/item_id.json is not a list of strings"),
        ("vocabulary/item_id.json", b"[1]", "vocabulary/item_id.json is not a list of strings"),
    ],
)
def test_a_file_that_says_nonsense_is_refused_even_when_signed(
    folder_url: str, file: str, content: bytes, reason: str
) -> None:
    checkpoints = CheckpointStore(Store(folder_url))
    checkpoints.publish(toy_model().draft())
    Path(folder_url, FOLDER, "1", file).write_bytes(content)
    digest = {"sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content)}
    _edit_manifest(folder_url, lambda manifest: manifest["files"].update({file: digest}))
    with pytest.raises(CorruptArtefactError, match=f"checkpoint 1: {reason}"):
        checkpoints.load(1, "query")


def test_a_damaged_file_is_refused_on_s3(s3_url: str) -> None:
    store = Store(s3_url)
    checkpoints = CheckpointStore(store)
    checkpoints.publish(toy_model().draft())
    path = f"{FOLDER}/1/query_tower.onnx"
    content = store.get(path)
    store.delete(path)
    with pytest.raises(CorruptArtefactError, match=r"query_tower.onnx is missing"):
        checkpoints.load(1, "query")
    store.put_new(path, _flip_middle(content))
    with pytest.raises(CorruptArtefactError, match=r"query_tower.onnx differs"):
        checkpoints.load(1, "query")
    checkpoints.load(1, "item")


def test_validation_queries_come_back_without_the_towers(store_url: str) -> None:
    checkpoints = CheckpointStore(Store(store_url))
    model = toy_model()
    manifest = checkpoints.publish(model.draft())
    Store(store_url).delete(f"{FOLDER}/1/query_tower.onnx")
    found = checkpoints.validation_queries(manifest)
    assert found is not None
    np.testing.assert_allclose(found, model.query_embeddings(model.validation_queries()), atol=1e-6)
    assert found.dtype == np.float32
    # Those of an older checkpoint, or of a training without a validation split.
    without = checkpoints.publish(dataclasses.replace(model.draft(), validation_queries=None))
    assert "validation_queries.f32" not in without.files
    assert checkpoints.validation_queries(without) is None


@pytest.mark.parametrize(
    ("embeddings", "reason"),
    [
        (np.eye(2, 7), "has 56 bytes, which are no rows of 8 numbers"),
        (np.eye(2, 8) * 0.5, "does not hold unit vectors"),
        (np.eye(2, 8) * np.nan, "does not hold unit vectors"),
    ],
)
def test_validation_queries_that_are_none_are_refused(folder_url: str, embeddings: Any, reason: str) -> None:
    checkpoints = CheckpointStore(Store(folder_url))
    draft = dataclasses.replace(toy_model().draft(), validation_queries=embeddings.astype(np.float32))
    manifest = checkpoints.publish(draft)
    with pytest.raises(CorruptArtefactError, match=f"checkpoint 1: validation_queries.f32 {reason}"):
        checkpoints.validation_queries(manifest)


def test_manifests_survive_their_own_json(folder_url: str) -> None:
    draft = dataclasses.replace(
        toy_model().draft(metrics={"test.recall_at_10": 0.1 + 0.2}),
        config={"title": "ünï", "nested": {"list": [1, 2.5, None, True]}},
        code_revision="abc",
    )
    manifest = CheckpointStore(Store(folder_url)).publish(draft)
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest
    assert CheckpointStore(Store(folder_url)).manifest(1) == manifest
