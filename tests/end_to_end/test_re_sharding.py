"""From two shards to three under load, together with a new version: no answer fails or mixes."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
import pyarrow.parquet as pq
from retrieval.index.v1 import index_service_pb2, index_service_pb2_grpc
from toy_checkpoint import toy_items, toy_model

from cli.demo.exact import ExactSearch
from cli.local_stack import ROLLOUT, LocalStack
from retrieval_client import RetrievalClient
from towers import deployment
from towers.catalogue import Catalogue
from towers.checkpoint import CheckpointStore
from towers.deployment import DeploymentStore
from towers.store import Store

NUM_ITEMS = 300
K = 10
WAIT_S = 90.0
QUERIES: list[dict[str, Any]] = [{"user_id": str(user), "history": [str(user * 7)]} for user in range(1, 21)]
AVAILABLE = index_service_pb2.VERSION_STATE_AVAILABLE


def wait_until(condition: Callable[[], bool], what: str) -> None:
    give_up_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < give_up_s, f"waited {WAIT_S:.0f} s for {what}"
        time.sleep(0.05)


def available(addresses: Sequence[str]) -> list[list[int]]:
    """The versions that each shard has available."""
    found = []
    for address in addresses:
        with grpc.insecure_channel(address) as channel:
            status = index_service_pb2_grpc.IndexServiceStub(channel).GetShardStatus(
                index_service_pb2.GetShardStatusRequest(), timeout=10
            )
        found.append([version.checkpoint_version for version in status.versions if version.state == AVAILABLE])
    return found


def write(records: DeploymentStore, **changes: Any) -> None:
    current = records.current()
    records.write(current.model_copy(update={"revision": current.revision + 1, **changes}))


def test_two_shards_become_three(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    catalogue = Catalogue(store)
    catalogue.upsert(toy_items(NUM_ITEMS))
    checkpoints = CheckpointStore(store)
    checkpoints.publish(toy_model(dim=8, seed=1, num_items=NUM_ITEMS).draft())
    records = DeploymentStore(store)
    queries_path, answers_path = tmp_path / "queries.json", tmp_path / "answers.parquet"
    queries_path.write_text(json.dumps(QUERIES))
    with LocalStack(store=store.url, folder=tmp_path, num_shards=2, next_num_shards=3, query_port=0) as stack:
        two, three = (tuple(address for [address] in layout) for layout in stack.layouts)
        stack.wait_up(WAIT_S)
        wait_until(lambda: records.current().live_version == 1, "version 1 to be live")
        stack.kill(ROLLOUT)  # The test writes the records from here on.
        wait_until(lambda: available(two) == [[1], [1]], "version 1 on two shards")
        checkpoints.publish(toy_model(dim=12, seed=2, num_items=NUM_ITEMS).draft())
        command = [sys.executable, "-m", "cli.demo.load", stack.query_address, queries_path, answers_path]
        with RetrievalClient(stack.query_address) as client:
            wait_until(lambda: client.get_status().live_version == 1, "version 1 to answer")
            load = subprocess.Popen(command)
            try:
                time.sleep(1.0)
                write(records, live_num_shards=2)
                records.write(deployment.staged(records.current(), 2, "test", num_shards=3))
                wait_until(lambda: available(three) == [[2], [2], [2]], "version 2 on three shards")
                # Each shard loads what its own layout serves, and nothing else.
                assert available(two) == [[1], [1]]
                wait_until(lambda: client.get_status().standby_version == 2, "version 2 to stand by")
                records.write(deployment.promoted(records.current(), "test"))
                wait_until(lambda: client.get_status().live_version == 2, "version 2 to answer")
                time.sleep(0.5)
                records.write(deployment.rolled_back(records.current(), "test"))
                wait_until(lambda: client.get_status().live_version == 1, "the rollback")
                records.write(deployment.promoted(records.current(), "test"))
                wait_until(lambda: client.get_status().live_version == 2, "version 2 to answer again")
                time.sleep(0.5)
            finally:
                load.send_signal(signal.SIGTERM)
                load.wait(timeout=30)
        # Without a version of its own, the former layout holds nothing.
        write(records, standby_version=None)
        wait_until(lambda: available(two) == [[], []], "the former layout to be empty")

    answers = pq.read_table(answers_path).to_pylist()
    assert [answer["error"] for answer in answers if answer["error"]] == []
    items = catalogue.read().items
    oracles = {version: ExactSearch(checkpoints, version, items, QUERIES) for version in (1, 2)}
    for answer in answers:
        fault = oracles[answer["version"]].fault(answer["query"], answer["item_ids"], answer["scores"], K)
        assert fault == "", answer
        shards = {1: 2, 2: 3}[answer["version"]]
        assert (answer["shards_answered"], answer["shards_total"]) == (shards, shards)
    assert {answer["version"] for answer in answers} == {1, 2}
