"""The whole system in processes of its own: a replica is killed, the catalogue is re-sharded, and no caller notices."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from toy_checkpoint import ToyModel, toy_items, toy_model

from cli.local_stack import LocalStack
from retrieval_client import Retrieval, RetrievalClient
from rollout import operations
from towers import deployment
from towers.catalogue import Catalogue
from towers.checkpoint import CheckpointStore
from towers.deployment import DeploymentStore
from towers.store import Store

NUM_ITEMS = 300
K = 10
WAIT_S = 90.0
QUERIES: list[dict[str, Any]] = [{"user_id": str(user), "history": [str(user * 7)]} for user in range(1, 11)]


@pytest.fixture(scope="module")
def model() -> ToyModel:
    """The one version there is."""
    return toy_model(num_items=NUM_ITEMS)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, model: ToyModel) -> Store:
    """A store with a catalogue and a checkpoint."""
    store = Store(str(tmp_path_factory.mktemp("store")))
    Catalogue(store).upsert(toy_items(NUM_ITEMS))
    CheckpointStore(store).publish(model.draft())
    return store


@pytest.fixture(scope="module")
def stack(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    """A layout of one shard and one of two, with two replicas each."""
    folder = tmp_path_factory.mktemp("stack")
    with LocalStack(store=store.url, folder=folder, num_shards=1, next_num_shards=2, replicas=2, query_port=0) as stack:
        stack.wait_ready(timeout_s=WAIT_S)
        yield stack


@contextmanager
def load(stack: LocalStack, model: ToyModel) -> Iterator[list[int]]:
    """Two callers whose every answer is full and exact; yields the number of shards of each answer so far."""
    is_over = threading.Event()
    totals: list[int] = []
    faults: list[str] = []
    expected = [model.nearest(query, model.item_ids, K)[0] for query in QUERIES]

    def fault(answer: Retrieval, number: int) -> str:
        if answer.shards_answered != answer.shards_total or answer.degraded_reasons:
            return f"not full: {answer}"
        return "" if [item.item_id for item in answer.items] == expected[number] else f"not exact: {answer}"

    def keep_calling(client: RetrievalClient) -> None:
        number = 0
        while not is_over.is_set():
            number = (number + 1) % len(QUERIES)
            try:
                answer = client.retrieve(QUERIES[number], k=K)
            except Exception as error:  # Any at all is a fault.
                faults.append(repr(error))
            else:
                totals.append(answer.shards_total)
                faults.extend(filter(None, [fault(answer, number)]))

    with RetrievalClient(stack.query_address, timeout_s=10.0) as client:
        callers = [threading.Thread(target=keep_calling, args=(client,)) for _ in range(2)]
        for caller in callers:
            caller.start()
        try:
            yield totals
        finally:
            is_over.set()
            for caller in callers:
                caller.join()
    assert faults == []


def wait_until(condition: Callable[[], bool], what: str) -> None:
    give_up = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < give_up, f"waited {WAIT_S:.0f} s for {what}"
        time.sleep(0.02)


@pytest.mark.parametrize("is_killed", [True, False], ids=["SIGKILL", "SIGTERM"])
def test_a_replica_that_ends_costs_no_answer(stack: LocalStack, model: ToyModel, is_killed: bool) -> None:
    with load(stack, model) as totals:
        for name in ("shard-0", "shard-0-replica-1"):
            stack.wait_ready(timeout_s=WAIT_S)
            wait_until(lambda name=name: is_reachable(stack, but=name), f"all but {name} to be asked again")
            if is_killed:
                stack.kill(name)
                before = len(totals)
                wait_until(lambda before=before: len(totals) > before + 100, "answers without it")
            stack.restart(name)
        assert set(totals) == {1}


def is_reachable(stack: LocalStack, but: str) -> bool:
    """Whether the query service reaches all of the shard's other replicas."""
    with RetrievalClient(stack.query_address) as client:
        others = [shard for shard in client.get_status().shards if shard.num_shards == 1]
    return all(shard.reachable for shard in others if shard.address != stack.address(but))


def test_the_catalogue_is_re_sharded_and_back_again(stack: LocalStack, store: Store, model: ToyModel) -> None:
    stack.wait_ready(timeout_s=WAIT_S)
    records = DeploymentStore(store)
    with load(stack, model) as totals:
        operations.stage(store, 1, num_shards=2)
        wait_until(lambda: records.current().live_num_shards == 2, "the controller to promote the other layout")
        wait_until(lambda: totals[-20:] == [2] * 20, "all answers from two shards")
        records.write(deployment.rolled_back(records.current(), "the test wants the old layout"))
        wait_until(lambda: totals[-20:] == [1] * 20, "all answers from one shard")
    assert set(totals) == {1, 2}
