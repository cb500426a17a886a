"""A catalogue moves to more shards while clients call, back, and on to the next version: no gap, no mix."""

import threading
import time
from collections.abc import Callable, Iterator

import pytest
from command_outcome import Twotower
from quick_stack import quick_stack
from toy_checkpoint import toy_items, toy_model

from cli.local_stack import LocalStack
from retrieval_client import RetrievalClient
from towers.catalogue import Catalogue
from towers.checkpoint import CheckpointStore
from towers.deployment import DeploymentStore
from towers.settings import layouts_text
from towers.store import Store

WAIT_S = 60.0
K = 5
MODELS = {1: toy_model(), 2: toy_model(dim=12, seed=2)}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    """One shard and, beside it, two, with two replicas each; version 1 is live."""
    folder = tmp_path_factory.mktemp("stack")
    store = Store(str(folder / "store"))
    Catalogue(store).upsert(toy_items())
    CheckpointStore(store).publish(MODELS[1].draft())
    with quick_stack(store.url, folder, num_shards=1, next_num_shards=2, replicas=2) as stack:
        stack.wait_ready(timeout_s=60.0)
        yield stack


class Caller(threading.Thread):
    """Asks one query again and again, and checks every answer."""

    def __init__(self, address: str) -> None:
        super().__init__(daemon=True)
        self._address = address
        self._is_over = threading.Event()
        self.seen: list[tuple[int, int]] = []
        """Version and number of shards of each answer."""
        self.wrong: list[str] = []

    def run(self) -> None:
        items = toy_items()["item_id"].to_pylist()
        features = {"user_id": "2", "history": ["1", "2"]}
        exact = {version: model.nearest(features, items, K) for version, model in MODELS.items()}
        with RetrievalClient(self._address) as client:
            while not self._is_over.is_set():
                try:
                    answer = client.retrieve(features, k=K)
                except Exception as error:
                    self.wrong.append(repr(error))
                    continue
                self.seen.append((answer.checkpoint_version, answer.shards_total))
                time.sleep(0.005)
                ids, scores = exact[answer.checkpoint_version]
                is_right = [item.item_id for item in answer.items] == list(ids) and [
                    item.score for item in answer.items
                ] == pytest.approx(list(scores), abs=1e-5)
                if answer.shards_answered < answer.shards_total or not is_right:
                    self.wrong.append(f"{answer}, not {exact[answer.checkpoint_version]}")

    def end(self) -> None:
        self._is_over.set()
        self.join(WAIT_S)


def wait_for(condition: Callable[[], bool]) -> None:
    give_up_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < give_up_s
        time.sleep(0.05)


def test_to_more_shards_and_back_and_on(stack: LocalStack, twotower: Twotower) -> None:
    store = Store(stack.store)
    deployments = DeploymentStore(store)
    at = ("--store", store.url)
    where = ("--shards", layouts_text(stack.layouts), "--query-services", stack.query_address)

    def loaded() -> dict[int, set[int]]:
        """The versions that the shards of each layout hold."""
        held: dict[int, set[int]] = {1: set(), 2: set()}
        for replica in twotower("status", *at, *where, "--json").json["replicas"]:
            if replica["role"] == "shard":
                held[replica["num_shards"]] |= {load["version"] for load in replica["versions"]}
        return held

    caller = Caller(stack.query_address)
    caller.start()
    try:
        wait_for(lambda: (1, 1) in caller.seen)
        assert twotower("stage", "1", *at, "--num-shards", "2").exit_code == 0
        wait_for(lambda: (1, 2) in caller.seen)
        assert deployments.current().live == (1, 2)

        assert "version 1 on 2 shards is held" in twotower("rollback", *at).out
        wait_for(lambda: caller.seen[-1] == (1, 1))

        assert twotower("stage", "1", *at, "--num-shards", "2").exit_code == 0
        wait_for(lambda: caller.seen[-1] == (1, 2))
        CheckpointStore(store).publish(MODELS[2].draft())
        wait_for(lambda: caller.seen[-1] == (2, 2))
        assert deployments.current().live == (2, 2)
        # The layout that no version is on holds nothing.
        wait_for(lambda: loaded() == {1: set(), 2: {1, 2}})

        # Another version and another layout at once.
        assert twotower("rollback", *at).exit_code == 0
        wait_for(lambda: caller.seen[-1] == (1, 2))
        assert twotower("stage", "2", *at, "--num-shards", "1").exit_code == 0
        wait_for(lambda: caller.seen[-1] == (2, 1))
        assert deployments.current().live == (2, 1)
        wait_for(lambda: loaded() == {1: {2}, 2: {1}})
    finally:
        caller.end()
    assert caller.wrong == []
    assert set(caller.seen) == {(1, 1), (1, 2), (2, 2), (2, 1)}
