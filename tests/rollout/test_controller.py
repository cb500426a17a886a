"""The controller against a real store and real gRPC servers: rollouts, refusals, faults, two of them at once."""

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from fleets import METRIC, load, recall
from scripted_services import ScriptedServices, scripted_services
from toy_checkpoint import toy_model

from rollout.controller import Controller
from rollout.fleet import State
from rollout.gates import Thresholds
from rollout.overview import Observer
from rollout.policy import Hold, Promote, Stage, Wait
from rollout.statuses import StatusCollector
from towers import deployment
from towers.checkpoint import CheckpointStore
from towers.deployment import DeploymentStore
from towers.errors import ConflictError
from towers.store import Store

THRESHOLDS = Thresholds(METRIC, max_recall_drop=0.1, min_item_ratio=0.8)


def publish(store: Store, metrics: Mapping[str, float] | None = None) -> int:
    return CheckpointStore(store).publish(toy_model(num_items=5, num_users=2).draft(metrics)).version


def slots(store: Store) -> tuple[int | None, int | None, bool]:
    current = DeploymentStore(store).current()
    return current.live_version, current.standby_version, current.held


async def controllers(stack: AsyncExitStack, store: Store, services: ScriptedServices, count: int) -> list[Controller]:
    made = []
    for _ in range(count):
        collector = await stack.enter_async_context(
            StatusCollector(services.shard_addresses, [services.query_service.address], timeout_s=5.0)
        )
        made.append(Controller(store, Observer(store, collector, THRESHOLDS)))
    return made


def test_from_the_first_checkpoint_to_a_swap_a_rollback_and_the_next_version(store_url: str) -> None:
    async def scenario() -> None:
        store = Store(store_url)
        async with AsyncExitStack() as stack:
            services = await stack.enter_async_context(scripted_services())
            (controller,) = await controllers(stack, store, services, 1)
            assert await controller.step() == Wait("no checkpoint is published")
            publish(store)
            assert await controller.step() == Stage(1)
            waiting = await controller.step()
            assert isinstance(waiting, Wait)
            assert "shard 0 at" in waiting.reason
            services.say(load(1, State.BUILDING, progress=0.5))
            assert isinstance(await controller.step(), Wait)
            services.say(load(1))
            assert await controller.step() == Promote(1)
            assert slots(store) == (1, None, False)
            assert isinstance(await controller.step(), Wait)

            publish(store)
            publish(store)
            assert await controller.step() == Stage(3)
            services.say(load(1), load(3))
            assert await controller.step() == Promote(3)
            assert slots(store) == (3, 1, False)

            deployments = DeploymentStore(store)
            deployments.write(deployment.rolled_back(deployments.current(), "it is bad"))
            held = await controller.step()
            assert held == Wait("version 3 is held until a newer one is published: it is bad")
            publish(store)
            assert await controller.step() == Stage(4)
            assert slots(store) == (1, 4, False)
            reasons = [record.reason for record in deployments.history()]
            assert [record.revision for record in deployments.history()] == list(range(1, len(reasons) + 1))
            assert reasons[:2] == [
                "staged by the rollout controller: the newest published",
                "promoted by the rollout controller: all gates pass",
            ]

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("standby", "metrics", "words"),
    [
        (load(2, golden_difference=0.5), recall(0.1), "golden replay: shard 0"),
        (load(2, State.FAILED, is_corrupt=True, reason="sha256 differs"), recall(0.1), "sha256 differs"),
        (load(2, num_items=3), recall(0.1), "item count: 6 items beside 200"),
        (load(2), recall(0.02), "offline recall: test.recall_at_10 is 0.0200"),
        (load(2), {}, "offline recall: the manifest has no test.recall_at_10"),
    ],
)
def test_a_refused_version_is_held_with_the_gate_and_its_figure(
    folder_url: str, standby: object, metrics: dict[str, float], words: str
) -> None:
    async def scenario() -> None:
        store = Store(folder_url)
        async with AsyncExitStack() as stack:
            services = await stack.enter_async_context(scripted_services())
            (controller,) = await controllers(stack, store, services, 1)
            publish(store, recall(0.1))
            services.say(load(1))
            assert [await controller.step(), await controller.step()] == [Stage(1), Promote(1)]
            publish(store, metrics)
            services.say(load(1), standby)  # type: ignore[arg-type]
            assert await controller.step() == Stage(2)
            action = await controller.step()
            assert isinstance(action, Hold)
            assert words in action.reason
            assert slots(store) == (1, 2, True)
            assert words in DeploymentStore(store).current().reason
            services.say(load(1), load(2))
            assert isinstance(await controller.step(), Wait), "a held version is left alone even when it looks well now"
            assert slots(store) == (1, 2, True)

    asyncio.run(scenario())


def test_a_damaged_manifest_is_refused(folder_url: str) -> None:
    async def scenario() -> None:
        store = Store(folder_url)
        async with AsyncExitStack() as stack:
            services = await stack.enter_async_context(scripted_services())
            (controller,) = await controllers(stack, store, services, 1)
            publish(store)
            (Path(folder_url) / "checkpoints/1/manifest.json").write_text("{")
            services.say(load(1))
            assert await controller.step() == Stage(1)
            action = await controller.step()
            assert isinstance(action, Hold)
            assert "manifest" in action.reason

    asyncio.run(scenario())


def test_a_deleted_live_checkpoint_does_not_block_its_successor(folder_url: str) -> None:
    async def scenario() -> None:
        store = Store(folder_url)
        async with AsyncExitStack() as stack:
            services = await stack.enter_async_context(scripted_services())
            publish(store)
            publish(store)
            deployments = DeploymentStore(store)
            deployments.write(deployment.staged(deployments.current(), 1, ""))
            deployments.write(deployment.promoted(deployments.current(), ""))
            (Path(folder_url) / "checkpoints/1/manifest.json").unlink()
            services.say(load(1), load(2))
            (controller,) = await controllers(stack, store, services, 1)
            assert [await controller.step(), await controller.step()] == [Stage(2), Promote(2)]

    asyncio.run(scenario())


def test_an_unreadable_store_changes_nothing_and_is_said_once(
    folder_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        store = Store(folder_url)
        async with AsyncExitStack() as stack:
            services = await stack.enter_async_context(scripted_services())
            (controller,) = await controllers(stack, store, services, 1)
            publish(store)
            services.say(load(1))
            assert await controller.step() == Stage(1)
            records = Path(folder_url) / "deployments"
            hidden = Path(folder_url) / "hidden"
            records.rename(hidden)
            records.write_text("not a folder")
            for _ in range(5):
                action = await controller.step()
                assert isinstance(action, Wait)
                assert "nothing is changed until this is mended" in action.reason
            records.unlink()
            hidden.rename(records)
            assert await controller.step() == Promote(1)
            assert slots(store) == (1, None, False)

    with caplog.at_level(logging.INFO, logger="rollout"):
        asyncio.run(scenario())
    said = [entry.message for entry in caplog.records]
    assert [words for words in said if words in ("staged version 1", "promoted version 1")] == [
        "staged version 1",
        "promoted version 1",
    ]
    assert len([words for words in said if "until this is mended" in words]) == 1


def test_of_two_controllers_exactly_one_writes(store_url: str) -> None:
    async def scenario() -> None:
        store = Store(store_url)
        async with AsyncExitStack() as stack:
            services = await stack.enter_async_context(scripted_services())
            both = await controllers(stack, store, services, 2)
            for version in range(1, 9):
                publish(store)
                services.say(*(load(number) for number in range(1, version + 1)))
                actions = []
                while DeploymentStore(store).current().revision < 2 * version:
                    actions += await asyncio.gather(*(controller.step() for controller in both))
                done = [action for action in actions if not isinstance(action, Wait)]
                # In the order of the controllers, not of time: one may promote while the other is still staging.
                assert sorted(map(str, done)) == sorted(map(str, (Stage(version), Promote(version)))), "written once"
            history = DeploymentStore(store).history()
            assert [record.revision for record in history] == list(range(1, 17))
            assert [record.live_version for record in history[1::2]] == list(range(1, 9))

    asyncio.run(scenario())


def test_a_thousand_races_for_a_revision_have_one_winner_each(folder_url: str) -> None:
    store = Store(folder_url)
    barrier = threading.Barrier(2, timeout=60)
    wins: list[list[int]] = [[], []]
    conflicts = [0, 0]

    def race(me: int) -> None:
        deployments = DeploymentStore(store)
        current = deployment.staged(deployment.NO_DEPLOYMENT, 1, "racer")
        for revision in range(1, 1001):
            barrier.wait()
            try:
                deployments.write(current.model_copy(update={"revision": revision, "reason": f"racer {me}"}))
                wins[me].append(revision)
            except ConflictError:
                conflicts[me] += 1

    racers = [threading.Thread(target=race, args=(me,)) for me in (0, 1)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert sorted(wins[0] + wins[1]) == list(range(1, 1001))
    assert sum(conflicts) == 1000
    history = DeploymentStore(store).history()
    assert all(record.reason == f"racer {int(record.revision in wins[1])}" for record in history)


def test_the_process_promotes_and_ends_cleanly_on_sigterm(folder_url: str) -> None:
    async def scenario() -> None:
        store = Store(folder_url)
        async with scripted_services() as services:
            services.say(load(1))
            publish(store)
            environment = {
                **os.environ,
                "TWOTOWER_STORE": folder_url,
                "TWOTOWER_SHARDS": ",".join(services.shard_addresses),
                "TWOTOWER_QUERY_SERVICES": services.query_service.address,
                "TWOTOWER_POLL_INTERVAL_S": "0.05",
            }
            code = (
                "import logging, sys; logging.basicConfig(level=logging.INFO, stream=sys.stdout, format='%(message)s');"
                "from rollout.serve import run; from rollout.settings import RolloutSettings; run(RolloutSettings());"
                "import json; print(json.dumps('torch' in sys.modules or 'faiss' in sys.modules))"
            )
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", code, env=environment, stdout=subprocess.PIPE
            )
            try:
                for _ in range(1200):
                    if slots(store) == (1, None, False):
                        break
                    await asyncio.sleep(0.05)
                assert slots(store) == (1, None, False)
                process.send_signal(signal.SIGTERM)
                output, _ = await asyncio.wait_for(process.communicate(), 60)
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
            lines = output.decode().splitlines()
            assert process.returncode == 0
            assert lines.count("staged version 1") == lines.count("promoted version 1") == 1
            assert lines[-2] == "the rollout controller has stopped"
            assert json.loads(lines[-1]) is False, "the controller must load neither torch nor FAISS"

    asyncio.run(scenario())
