"""The whole system in processes of its own: swap, rollback, a dead cache and a dead shard, every answer judged."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pyarrow.parquet as pq
import pytest
from quick_stack import quick_stack
from retrieval.index.v1 import index_service_pb2, index_service_pb2_grpc
from toy_checkpoint import toy_items, toy_model

from cli.demo.exact import ExactSearch
from cli.local_stack import LocalStack
from retrieval_client import RetrievalClient
from towers import deployment
from towers.catalogue import Catalogue
from towers.checkpoint import CheckpointStore
from towers.deployment import DeploymentStore
from towers.store import Store

NUM_ITEMS = 400
NUM_USERS = 40
K = 10
WAIT_S = 60.0
QUERIES: list[dict[str, Any]] = [
    {"user_id": str(user), "history": [str(user * 7 % NUM_ITEMS + 1), str(user * 13 % NUM_ITEMS + 1)]}
    for user in range(1, NUM_USERS + 1)
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store with a catalogue and a first checkpoint."""
    store = Store(str(tmp_path_factory.mktemp("store")))
    Catalogue(store).upsert(toy_items(NUM_ITEMS))
    publish(store, dim=8, seed=1)
    return store


@pytest.fixture(scope="module")
def stack(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    """Valkey, two shards, the query service and the controller, ready at version 1."""
    with quick_stack(store.url, tmp_path_factory.mktemp("stack")) as stack:
        stack.wait_ready(timeout_s=WAIT_S)
        yield stack


def publish(store: Store, dim: int, seed: int) -> int:
    model = toy_model(dim=dim, seed=seed, num_items=NUM_ITEMS, num_users=NUM_USERS)
    return CheckpointStore(store).publish(model.draft()).version


def is_loaded_from_store(stack: LocalStack, shard: int) -> bool:
    with grpc.insecure_channel(stack.shard_addresses[shard]) as channel:
        status = index_service_pb2_grpc.IndexServiceStub(channel).GetShardStatus(
            index_service_pb2.GetShardStatusRequest(), timeout=10
        )
    [version] = status.versions
    return bool(version.loaded_from_store)


def wait_until(condition: Callable[[], bool], what: str) -> None:
    give_up_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < give_up_s, f"waited {WAIT_S:.0f} s for {what}"
        time.sleep(0.05)


def test_a_dead_shard_is_reported_and_comes_back_without_rebuilding(stack: LocalStack) -> None:
    with RetrievalClient(stack.query_address) as client:
        assert client.retrieve(QUERIES[0], k=K).shards_answered == 2
        assert not is_loaded_from_store(stack, shard=1), "the first start has nothing to load"
        stack.kill("shard-1")
        answer = client.retrieve(QUERIES[0], k=K)
        assert (answer.shards_answered, answer.shards_total) == (1, 2)
        assert any("shard 1" in reason for reason in answer.degraded_reasons)
        assert len(answer.items) == K

        stack.restart("shard-1")
        wait_until(lambda: client.retrieve(QUERIES[0], k=K).shards_answered == 2, "the shard to answer again")
    assert is_loaded_from_store(stack, shard=1), "it was built again"


def test_no_service_process_imports_torch(stack: LocalStack) -> None:
    with RetrievalClient(stack.query_address) as client:
        client.retrieve(QUERIES[0], k=K)
    for name in stack.names:
        maps = Path(f"/proc/{stack.pid(name)}/maps").read_text()
        assert "libtorch" not in maps, f"{name} has loaded torch"


def test_swap_and_rollback_under_load_with_a_dying_cache(stack: LocalStack, store: Store, tmp_path: Path) -> None:
    queries_path, answers_path = tmp_path / "queries.json", tmp_path / "answers.parquet"
    queries_path.write_text(json.dumps(QUERIES))
    command = [
        sys.executable,
        "-m",
        "cli.demo.load",
        stack.query_address,
        queries_path,
        answers_path,
        "--rate",
        "60",
        "--limit",
        "100",
    ]
    load = subprocess.Popen(command)
    try:
        with RetrievalClient(stack.query_address) as client:
            time.sleep(0.5)
            assert publish(store, dim=12, seed=2) == 2
            wait_until(lambda: client.get_status().live_version == 2, "version 2 to go live")
            time.sleep(0.5)
            stack.kill("valkey")
            time.sleep(0.5)
            deployments = DeploymentStore(store)
            deployments.write(deployment.rolled_back(deployments.current(), "the test wants the old version"))
            wait_until(lambda: client.get_status().live_version == 1, "the rollback")
            stack.restart("valkey")
            time.sleep(0.5)
    finally:
        load.send_signal(signal.SIGTERM)
        load.wait(timeout=30)

    answers = pq.read_table(answers_path).to_pylist()
    assert [answer["error"] for answer in answers if answer["error"]] == []
    checkpoints = CheckpointStore(store)
    items = Catalogue(store).read().items
    oracles = {version: ExactSearch(checkpoints, version, items, QUERIES) for version in (1, 2)}
    faults = [
        fault
        for answer in answers
        if (fault := oracles[answer["version"]].fault(answer["query"], answer["item_ids"], answer["scores"], K))
    ]
    assert faults == []
    assert {answer["version"] for answer in answers} == {1, 2}
    assert answers[0]["version"] == answers[-1]["version"] == 1
    assert all(answer["shards_answered"] == answer["shards_total"] == 2 for answer in answers)
    assert any(answer["embedding_cached"] for answer in answers)
    assert DeploymentStore(store).current().held, "automation must leave the rolled back version alone"


def test_the_oracle_catches_planted_faults(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    Catalogue(store).upsert(toy_items(NUM_ITEMS))
    publish(store, dim=8, seed=1)
    publish(store, dim=8, seed=2)
    checkpoints = CheckpointStore(store)
    items = Catalogue(store).read().items
    first, second = (ExactSearch(checkpoints, version, items, QUERIES) for version in (1, 2))
    model = toy_model(dim=8, seed=1, num_items=NUM_ITEMS, num_users=NUM_USERS)
    item_ids, scores = model.nearest(QUERIES[0], model.item_ids, K + 1)
    right = (item_ids[:K], list(scores[:K]))

    assert first.fault(0, *right, K) == ""
    assert second.fault(0, *right, K) != "", "another version's answer"
    assert first.fault(1, *right, K) != "", "another query's answer"
    assert first.fault(0, item_ids[: K - 1], list(scores[: K - 1]), K) != "", "too few items"
    assert first.fault(0, [*item_ids[: K - 1], item_ids[0]], right[1], K) != "", "an item twice"
    assert first.fault(0, [*item_ids[: K - 1], "nothing"], right[1], K) != "", "an item of no catalogue"
    assert first.fault(0, [*item_ids[: K - 1], item_ids[K]], [*scores[: K - 1], scores[K]], K) != "", "not the best"
    assert first.fault(0, right[0], [score + 1e-4 for score in right[1]], K) != "", "a wrong score"
    assert first.fault(0, *right, K, excluded_item_ids=[item_ids[3]]) != "", "an excluded item"
