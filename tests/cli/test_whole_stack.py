"""The whole stack in processes of its own: its processes, `retrieve`, `status`, then bad versions and good ones.

The tests share one stack and run in order; the last ones move it to other versions.
"""

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from command_outcome import Twotower
from quick_stack import quick_stack
from running import is_running
from toy_checkpoint import toy_items, toy_model

from cli.local_stack import LocalStack
from retrieval_client import RetrievalClient
from towers.catalogue import Catalogue
from towers.checkpoint import CheckpointDraft, CheckpointStore
from towers.deployment import Deployment, DeploymentStore
from towers.errors import NotFoundError, NotReadyError
from towers.store import Store

QUERY = ("user_id=2", "history=1,2")
WAIT_S = 60.0


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    """Everything that serves, ready at the one version there is."""
    folder = tmp_path_factory.mktemp("stack")
    store = Store(str(folder / "store"))
    Catalogue(store).upsert(toy_items())
    CheckpointStore(store).publish(toy_model().draft())
    with pytest.MonkeyPatch.context() as patch:
        for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY"):
            patch.delenv(name, raising=False)
        with quick_stack(store.url, folder) as stack:
            stack.wait_ready(timeout_s=60.0)
            yield stack


def test_names_addresses_and_environment(stack: LocalStack) -> None:
    assert stack.names == ("valkey", "shard-0", "shard-1", "query", "rollout")
    assert [stack.address(name) for name in stack.names] == [
        stack.redis_url,
        *stack.shard_addresses,
        stack.query_address,
        "",
    ]
    for name in stack.names:
        assert is_running(stack.pid(name))
        assert "libtorch" not in Path(f"/proc/{stack.pid(name)}/maps").read_text()
        assert f"{name} starts" in stack.log(name)
    for name in ("shard-0", "query", "rollout"):
        environment = Path(f"/proc/{stack.pid(name)}/environ").read_bytes().split(b"\0")
        assert b"OMP_NUM_THREADS=1" in environment
        assert b"OMP_WAIT_POLICY=passive" in environment
    assert os.getpgid(stack.pid("query")) != os.getpgid(0), "Ctrl-C would reach the children too"


def test_kill_and_restart(stack: LocalStack) -> None:
    pids = {name: stack.pid(name) for name in stack.names}
    for name in ("shard-1", "valkey"):
        stack.kill(name)
        assert not is_running(pids[name])
        assert not stack.is_up(name)
        with pytest.raises(NotReadyError, match=f"{name} is not running"):
            stack.pid(name)
    assert stack.first_death() is None, "a process that was killed on purpose has not died by itself"
    for name in ("shard-1", "valkey"):
        stack.restart(name)
    stack.wait_ready(timeout_s=60.0)
    with RetrievalClient(stack.query_address) as client:
        assert client.retrieve({"user_id": "1"}, k=3, min_shards=2).shards_answered == 2
    assert stack.pid("query") == pids["query"]
    assert stack.pid("shard-1") != pids["shard-1"]
    with pytest.raises(NotFoundError, match="there is no process 'shard-2'; there are valkey, shard-0, shard-1"):
        stack.restart("shard-2")


def test_a_death_is_noticed_and_named(stack: LocalStack) -> None:
    os.kill(stack.pid("rollout"), 9)
    give_up_s = time.monotonic() + 60
    while (death := stack.first_death()) is None:
        assert time.monotonic() < give_up_s
        time.sleep(0.02)
    assert (death.name, death.exit_code, death.log_path) == ("rollout", -9, stack.log_path("rollout"))
    assert "rollout has ended (killed by SIGKILL); its log is" in str(death)
    assert death.last_lines
    with pytest.raises(NotReadyError, match="rollout has ended"):
        stack.wait_up()
    stack.restart("rollout")
    stack.wait_up()


def test_json(stack: LocalStack, twotower: Twotower) -> None:
    outcome = twotower("retrieve", *QUERY, "-k", "3", "--json", "--address", stack.query_address)
    assert (outcome.exit_code, outcome.err) == (0, "")
    answer = outcome.json
    model = toy_model()
    item_ids, scores = model.nearest({"user_id": "2", "history": ["1", "2"]}, toy_items()["item_id"].to_pylist(), 3)
    assert [item["item_id"] for item in answer["items"]] == item_ids
    assert [item["score"] for item in answer["items"]] == pytest.approx(list(scores), abs=1e-5)
    assert [item["attributes"] for item in answer["items"]] == [{"title": f"Title {number}"} for number in item_ids]
    assert (answer["checkpoint_version"], answer["shards_answered"], answer["shards_total"]) == (1, 2, 2)
    assert answer["degraded_reasons"] == []
    assert answer["milliseconds"] > 0
    # A cache that is slow for a moment counts as a miss, and this machine may be busy.
    give_up_s = time.monotonic() + WAIT_S
    while not answer["embedding_cached"]:
        assert time.monotonic() < give_up_s
        answer = twotower("retrieve", *QUERY, "-k", "3", "--json", "--address", stack.query_address).json


def test_table(stack: LocalStack, twotower: Twotower) -> None:
    outcome = twotower("retrieve", *QUERY, "-k", "2", "--address", stack.query_address)
    assert (outcome.exit_code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert re.findall(r"[\w#]+", lines[1]) == ["#", "item_id", "title", "score"]
    assert re.fullmatch(r"│ 1 │ (\d+) +│ Title \1 +│ \d\.\d{4} │", lines[3])
    assert re.fullmatch(r"version 1, [\d.]+ ms, 2 of 2 shards(, embedding from the cache)?", lines[-1])


def test_attributes_and_exclusion(stack: LocalStack, twotower: Twotower) -> None:
    at = ("--address", stack.query_address, "--json")
    best = [item["item_id"] for item in twotower("retrieve", *QUERY, "-k", "4", *at).json["items"]]
    answer = twotower(
        "retrieve",
        *QUERY,
        "-k",
        "2",
        *("--exclude", best[0], "--exclude", best[2]),
        *("--attribute", "year", "--attribute", "genres"),
        *at,
    ).json
    assert [item["item_id"] for item in answer["items"]] == [best[1], best[3]]
    rows = {row["item_id"]: row for row in toy_items().to_pylist()}
    for item in answer["items"]:
        row = rows[item["item_id"]]
        assert item["attributes"] == {"year": row["year"], "genres": row["genres"]}


@pytest.mark.parametrize(
    ("arguments", "exit_code", "words"),
    [
        (["usr_id=2"], 2, "it reads history (sequence), user_id (categorical)"),
        (["user_id=2", "--attribute", "colour"], 2, "colour"),
        (["user_id=2", "-k", "1000000"], 2, "k"),
        (["user_id=2", "--min-shards", "3"], 2, "min_shards"),
    ],
)
def test_what_the_service_refuses(
    stack: LocalStack, twotower: Twotower, arguments: list[str], exit_code: int, words: str
) -> None:
    outcome = twotower("retrieve", *arguments, "--address", stack.query_address)
    assert (outcome.exit_code, outcome.out, outcome.err.count("\n")) == (exit_code, "", 1), outcome
    assert words in outcome.err


def test_status_of_the_running_stack(stack: LocalStack, twotower: Twotower) -> None:
    where = ("--shards", ",".join(stack.shard_addresses), "--query-services", stack.query_address)
    seen = twotower("status", "--store", stack.store, *where, "--json").json
    assert (seen["deployment"]["live_version"], seen["deployment"]["standby_version"]) == (1, None)
    assert seen["next"] == "wait: version 1 is live; no newer one is published"
    assert [replica["error"] for replica in seen["replicas"]] == ["", "", ""]
    versions = [replica["versions"] for replica in seen["replicas"]]
    assert all([load["version"], load["state"]] == [1, "available"] for [load] in versions)
    assert sum(load["num_items"] for [load] in versions) == toy_items().num_rows
    table = twotower("status", "--store", stack.store, *where).out
    for words in ("version 1 is live", "shard 1", "available", "Flat", "promoted by the rollout controller"):
        assert words in table
    assert "is --store the right one?" not in table


def test_the_indexes_of_the_running_stack(stack: LocalStack, twotower: Twotower) -> None:
    at = ("--store", stack.store, "--shards", ",".join(stack.shard_addresses))
    seen = twotower("index", "inspect", *at, "--json").json
    for replica, stored in zip(seen["replicas"], seen["stored"], strict=True):
        (load,) = replica["versions"]
        assert (load["index_type"], load["target_recall"], load["target_k"]) == ("Flat", 0.95, 100)
        assert load["measured_with"] == "item vectors"
        assert [setting["k"] for setting in load["search_settings"]] == [10, 100, 500, 1000]
        assert all(setting["recall"] == 1.0 and setting["latency_s"] > 0 for setting in load["search_settings"])
        assert load["size_bytes"] > load["num_items"] * 8 * 4
        assert (stored["shard"], stored["num_items"]) == (replica["shard"], load["num_items"])
    table = twotower("index", "inspect", *at).out
    for words in (
        "1 available",
        "0.95 at 100  item vectors",
        "Stored indexes",
        stack.shard_addresses[0],
    ):
        assert words in table


def test_status_with_another_store_than_the_processes(stack: LocalStack, twotower: Twotower, tmp_path: Path) -> None:
    where = ("--shards", ",".join(stack.shard_addresses), "--query-services", stack.query_address)
    outcome = twotower("status", "--store", str(tmp_path / "another"), *where)
    assert "so of another store: is --store the right one?" in outcome.out


def wait_for_record(store: Store, condition: Callable[[Deployment], bool]) -> Deployment:
    give_up_s = time.monotonic() + WAIT_S
    while not condition(current := DeploymentStore(store).current()):
        assert time.monotonic() < give_up_s, current
        time.sleep(0.05)
    return current


def publish_damaged(store: Store, draft: CheckpointDraft, scratch: Path) -> int:
    """Publishes a checkpoint in whose item tower one bit is flipped."""
    newest = CheckpointStore(store).versions()[-1]
    elsewhere = CheckpointStore(Store(str(scratch)))
    while elsewhere.publish(draft).version <= newest:
        pass
    source = scratch / "checkpoints" / str(newest + 1)
    tower = source / "item_tower.onnx"
    content = bytearray(tower.read_bytes())
    content[len(content) // 2] ^= 1
    tower.write_bytes(content)
    target = Path(store.url) / "checkpoints" / str(newest + 1)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("manifest.json"))
    shutil.copy(source / "manifest.json", target)
    return newest + 1


def test_bad_versions_are_held_and_the_next_good_one_goes_live(
    stack: LocalStack, twotower: Twotower, tmp_path: Path
) -> None:
    store = Store(stack.store)
    checkpoints = CheckpointStore(store)
    at = ("--store", store.url)
    where = ("--shards", ",".join(stack.shard_addresses), "--query-services", stack.query_address)
    good = toy_model(dim=12, seed=2).draft()

    golden = {**good.golden, "item": toy_model(dim=12, seed=3).draft().golden["item"]}
    drifting = checkpoints.publish(replace(good, golden=golden)).version
    record = wait_for_record(store, lambda record: record.held)
    assert (record.live_version, record.standby_version) == (1, drifting)
    assert re.search(rf"golden replay: shard [01]/2 at .* refuses version {drifting}: ", record.reason)

    damaged = publish_damaged(store, good, tmp_path)
    record = wait_for_record(store, lambda record: record.held and record.standby_version == damaged)
    assert record.live_version == 1
    assert "differs from the manifest" in record.reason

    worse = checkpoints.publish(replace(good, metrics={"test.recall_at_10": 0.05})).version
    record = wait_for_record(store, lambda record: record.held and record.standby_version == worse)
    assert record.live_version == 1
    assert "offline recall: test.recall_at_10 is 0.0500, the live one's 0.1000" in record.reason
    refused = twotower("promote", *at, *where)
    assert (refused.exit_code, refused.err.count("\n")) == (1, 1)
    assert "offline recall (refuse): test.recall_at_10 is 0.0500" in refused.err

    model = toy_model(dim=12, seed=2)
    collapsed = checkpoints.publish(replace(model, item_table=np.ones_like(model.item_table)).draft()).version
    record = wait_for_record(store, lambda record: record.held and record.standby_version == collapsed)
    assert record.live_version == 1
    assert "item similarity 1.000" in record.reason
    assert "items are all alike" in record.reason

    best = checkpoints.publish(good).version
    record = wait_for_record(store, lambda record: record.live_version == best)
    assert (record.standby_version, record.held) == (1, False)
    with RetrievalClient(stack.query_address) as client:
        give_up_s = time.monotonic() + WAIT_S
        while client.retrieve({"user_id": "1"}).checkpoint_version != best:
            assert time.monotonic() < give_up_s
            time.sleep(0.05)

    assert twotower("rollback", *at).exit_code == 0
    time.sleep(0.5)  # Some rounds of the controller, which must leave the record alone.
    record = DeploymentStore(store).current()
    assert (record.live_version, record.standby_version, record.held) == (1, best, True)
    promoted = twotower("promote", *at, *where)
    assert promoted.out.endswith(f"version {best} is live, version 1 stands by; promoted by hand\n"), promoted


def test_a_canary_answers_a_share_of_the_requests_and_is_promoted(
    stack: LocalStack, twotower: Twotower, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(stack.store)
    before = DeploymentStore(store).current().live_version
    monkeypatch.setenv("TWOTOWER_CANARY_SHARE", "0.3")
    monkeypatch.setenv("TWOTOWER_CANARY_MIN_REQUESTS", "40")
    # How fast this machine is at this moment must not decide.
    monkeypatch.setenv("TWOTOWER_MAX_CANARY_LATENCY_RATIO", "1000000")
    stack.restart("rollout")
    published = CheckpointStore(store).publish(toy_model(dim=16, seed=4).draft()).version
    record = wait_for_record(store, lambda record: record.canary_share > 0)
    assert (record.live_version, record.standby_version, record.canary_share) == (before, published, 0.3)

    answered = []
    with RetrievalClient(stack.query_address) as client:
        give_up_s = time.monotonic() + WAIT_S
        while DeploymentStore(store).newer_than(record) == record:
            assert time.monotonic() < give_up_s
            for user in range(20):
                answered.append(client.retrieve({"user_id": f"{len(answered)} {user}"}, k=3).checkpoint_version)
    assert set(answered) == {before, published}
    record = wait_for_record(store, lambda record: record.live_version == published)
    assert (record.standby_version, record.canary_share) == (before, 0.0)
    begun = DeploymentStore(store).history()[-2]
    assert begun.reason == "a canary of the rollout controller: all gates pass"

    where = ("--shards", ",".join(stack.shard_addresses), "--query-services", stack.query_address)
    seen = twotower("status", "--store", stack.store, *where, "--json").json
    assert (
        seen["next"]
        == f"wait: version {published} is live, version {before} is kept for a rollback; no newer one is published"
    )
