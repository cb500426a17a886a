"""The whole system in processes of its own: a replica is killed or restarted, and no caller notices."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from toy_checkpoint import ToyModel, toy_items, toy_model

from cli.local_stack import LocalStack
from retrieval_client import Retrieval, RetrievalClient
from towers.catalogue import Catalogue
from towers.checkpoint import CheckpointStore
from towers.store import Store

NUM_ITEMS = 300
K = 10
WAIT_S = 90.0
PAUSE_S = 0.005
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
    """One shard of two replicas."""
    folder = tmp_path_factory.mktemp("stack")
    with LocalStack(store=store.url, folder=folder, num_shards=1, replicas=2, query_port=0) as stack:
        stack.wait_ready(timeout_s=WAIT_S)
        yield stack


@contextmanager
def load(stack: LocalStack, model: ToyModel) -> Iterator[list[Retrieval]]:
    """Two callers whose every answer is full and exact; yields the answers so far."""
    is_over = threading.Event()
    answers: list[Retrieval] = []
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
                answers.append(answer)
                faults.extend(filter(None, [fault(answer, number)]))
            time.sleep(PAUSE_S)

    with RetrievalClient(stack.query_address, timeout_s=10.0) as client:
        callers = [threading.Thread(target=keep_calling, args=(client,)) for _ in range(2)]
        for caller in callers:
            caller.start()
        try:
            yield answers
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
    with load(stack, model) as answers:
        for name in ("shard-0", "shard-0-replica-1"):
            stack.wait_ready(timeout_s=WAIT_S)
            wait_until(lambda name=name: is_reachable(stack, but=name), f"all but {name} to be asked again")
            if is_killed:
                stack.kill(name)
                before = len(answers)
                wait_until(lambda before=before: len(answers) > before + 100, "answers without it")
            stack.restart(name)


def is_reachable(stack: LocalStack, but: str) -> bool:
    """Whether the query service reaches all of the shard's other replicas."""
    with RetrievalClient(stack.query_address) as client:
        shards = client.get_status().shards
    return all(shard.reachable for shard in shards if shard.address != stack.address(but))
