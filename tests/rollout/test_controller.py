"""The controller against a real store and real gRPC servers: rollouts, refusals, faults, two of them at once."""

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from fleets import load, recall, thresholds
from scripted_services import ScriptedServices, scripted_services
from toy_checkpoint import toy_model

from rollout import operations
from rollout.controller import Controller
from rollout.fleet import Shadow, State, Traffic
from rollout.gates import Thresholds
from rollout.overview import Observer
from rollout.policy import Canary, Hold, Promote, Stage, Wait
from rollout.statuses import StatusCollector
from towers import deployment
from towers.checkpoint import CheckpointStore
from towers.deployment import DeploymentStore
from towers.errors import ConflictError
from towers.store import Store


def publish(store: Store, metrics: Mapping[str, float] | None = None) -> int:
    return CheckpointStore(store).publish(toy_model(num_items=5, num_users=2).draft(metrics)).version


def slots(store: Store) -> tuple[int | None, int | None, bool]:
    current = DeploymentStore(store).current()
    return current.live_version, current.standby_version, current.held


class Clock:
    """The time now, and later when a test says so."""

    def __init__(self) -> None:
        self.passed_s = 0.0

    def __call__(self) -> datetime:
        return datetime.now(UTC) + timedelta(seconds=self.passed_s)


async def controllers(
    stack: AsyncExitStack,
    store: Store,
    services: ScriptedServices,
    count: int,
    limits: Thresholds = thresholds(),
    clock: Callable[[], datetime] = Clock(),
) -> list[Controller]:
    made = []
    for _ in range(count):
        collector = await stack.enter_async_context(
            StatusCollector(services.layouts, [services.query_service.address], timeout_s=5.0)
        )
        made.append(Controller(store, Observer(store, collector, limits, clock)))
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
            assert "shard 0/2 at" in waiting.reason
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
        (load(2, golden_difference=0.5), recall(0.1), "golden replay: shard 0/2"),
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


CANARY_LIMITS = thresholds(canary_share=0.1, canary_min_requests=100)


async def on_standby(
    stack: AsyncExitStack, store: Store, services: ScriptedServices, **limits: Any
) -> tuple[Controller, Clock]:
    """Version 1 is live; version 2 stands by and is available everywhere."""
    clock = Clock()
    (controller,) = await controllers(stack, store, services, 1, thresholds(**limits), clock)
    publish(store)
    services.say(load(1))
    assert [await controller.step(), await controller.step()] == [Stage(1), Promote(1)]
    publish(store)
    services.say(load(1), load(2))
    assert await controller.step() == Stage(2)
    return controller, clock


def answered(
    store: Store, services: ScriptedServices, num_requests: int, num_errors: int = 0, p99_s: float = 0.01
) -> None:
    """The query service follows the record, and has answered so many requests at version 2."""
    services.query_service.deployment_revision = DeploymentStore(store).current().revision
    services.query_service.traffic = [
        Traffic(1, 2, 900, 0, 0.005, 0.01),
        Traffic(2, 2, num_requests, num_errors, p99_s / 2, p99_s),
    ]


def test_a_canary_that_does_well_is_promoted(folder_url: str) -> None:
    async def scenario() -> None:
        store = Store(folder_url)
        async with AsyncExitStack() as stack:
            services = await stack.enter_async_context(scripted_services())
            controller, _ = await on_standby(stack, store, services, canary_share=0.1, canary_min_requests=100)
            answered(store, services, 0)
            assert await controller.step() == Canary(2, 0.1)
            assert DeploymentStore(store).current().canary_share == 0.1
            # Figures of the time before the canary do not count.
            services.query_service.traffic = [Traffic(2, 2, 500, 500, 0.1, 0.1)]
            waiting = await controller.step()
            assert isinstance(waiting, Wait)
            assert "canary: 0 of 100 requests answered, 0 failed" in waiting.reason
            answered(store, services, 99, num_errors=1)
            assert isinstance(await controller.step(), Wait)
            answered(store, services, 100, num_errors=1)
            assert await controller.step() == Promote(2)
            assert slots(store) == (2, 1, False)
            assert DeploymentStore(store).current().canary_share == 0.0

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("num_requests", "num_errors", "p99_s", "words"),
    [
        (20, 2, 0.01, "canary: 20 of 100 requests answered, 2 failed (10.00%, live 0.00%)"),
        (100, 0, 0.05, "p99 50.0 ms (live 10.0); a p99 of 2.0 times the live one's is allowed"),
    ],
    ids=["errors", "latency"],
)
def test_a_canary_that_does_badly_is_rolled_back(
    folder_url: str, num_requests: int, num_errors: int, p99_s: float, words: str
) -> None:
    async def scenario() -> None:
        store = Store(folder_url)
        async with AsyncExitStack() as stack:
            services = await stack.enter_async_context(scripted_services())
            controller, _ = await on_standby(stack, store, services, canary_share=0.1, canary_min_requests=100)
            assert await controller.step() == Canary(2, 0.1)
            answered(store, services, num_requests, num_errors, p99_s)
            action = await controller.step()
            assert isinstance(action, Hold)
            assert words in action.reason
            record = DeploymentStore(store).current()
            assert words in record.reason
            assert (record.live_version, record.standby_version, record.held, record.canary_share) == (1, 2, True, 0.0)
            answered(store, services, 0)
            assert isinstance(await controller.step(), Wait), "it is not tried again"

    asyncio.run(scenario())


def test_a_canary_without_traffic_ends_by_the_time(folder_url: str) -> None:
    async def scenario() -> None:
        store = Store(folder_url)
        async with AsyncExitStack() as stack:
            services = await stack.enter_async_context(scripted_services())
            controller, clock = await on_standby(stack, store, services, canary_share=0.1, canary_max_s=600.0)
            assert await controller.step() == Canary(2, 0.1)
            clock.passed_s = 500.0
            assert isinstance(await controller.step(), Wait)
            clock.passed_s = 601.0
            assert await controller.step() == Promote(2)

    asyncio.run(scenario())


def test_a_canary_by_hand_of_a_held_version_is_ended_when_it_does_badly(folder_url: str) -> None:
    async def scenario() -> None:
        store = Store(folder_url)
        async with AsyncExitStack() as stack:
            services = await stack.enter_async_context(scripted_services())
            controller, _ = await on_standby(stack, store, services, canary_min_requests=100)
            deployments = DeploymentStore(store)
            deployments.write(deployment.held(deployments.current(), "looks odd"))
            deployments.write(deployment.canaried(deployments.current(), 0.01, "let us see"))
            answered(store, services, 100)
            assert isinstance(await controller.step(), Wait), "whoever held it decides"
            assert deployments.current().canary_share == 0.01
            answered(store, services, 100, num_errors=9)
            assert isinstance(await controller.step(), Hold)
            assert deployments.current().canary_share == 0.0

    asyncio.run(scenario())


def test_another_controller_goes_on_with_a_canary(folder_url: str) -> None:
    async def scenario() -> None:
        store = Store(folder_url)
        async with AsyncExitStack() as stack:
            services = await stack.enter_async_context(scripted_services())
            first, _ = await on_standby(stack, store, services, canary_share=0.1, canary_min_requests=100)
            assert await first.step() == Canary(2, 0.1)
            answered(store, services, 50)
            (second,) = await controllers(stack, store, services, 1, CANARY_LIMITS)
            waiting = await second.step()
            assert isinstance(waiting, Wait)
            assert "50 of 100 requests" in waiting.reason
            answered(store, services, 100)
            (third,) = await controllers(stack, store, services, 1, CANARY_LIMITS)
            assert await third.step() == Promote(2)

    asyncio.run(scenario())


def test_a_version_whose_answers_differ_is_refused_by_its_shadow(folder_url: str) -> None:
    async def scenario() -> None:
        store = Store(folder_url)
        async with AsyncExitStack() as stack:
            services = await stack.enter_async_context(scripted_services())
            limits = {"min_shadow_queries": 50, "min_shadow_overlap": 0.5}
            controller, _ = await on_standby(stack, store, services, **limits)
            # Those of the pair before are not these.
            services.query_service.shadow = Shadow(1, 7, 90, 0, 0.1, 0.001, 0.002, 0.001, 0.002)
            waiting = await controller.step()
            assert isinstance(waiting, Wait)
            assert "shadow: 0 live queries answered by both; waits for 50, or 60 min more" in waiting.reason
            services.query_service.shadow = Shadow(2, 1, 49, 1, 0.4, 0.001, 0.002, 0.003, 0.004)
            action = await controller.step()
            assert isinstance(action, Hold)
            assert "shadow: 50 live queries, overlap 0.40, 1 failed, p50 3.0 ms (live 1.0)" in action.reason
            assert slots(store) == (1, 2, True)

    asyncio.run(scenario())


def test_the_shadow_stage_ends_by_the_time_since_staging_however_many_records_follow(folder_url: str) -> None:
    async def scenario() -> None:
        store = Store(folder_url)
        async with AsyncExitStack() as stack:
            services = await stack.enter_async_context(scripted_services())
            limits = {"min_shadow_queries": 50, "max_shadow_wait_s": 60.0, "canary_share": 0.1}
            controller, clock = await on_standby(stack, store, services, **limits)
            assert isinstance(await controller.step(), Wait)
            clock.passed_s = 61.0
            assert await controller.step() == Canary(2, 0.1)
            # Had the time begun anew with this record, it would not be over.
            deployments = DeploymentStore(store)
            later = deployment.canaried(deployments.current(), 0.2, "more of it")
            deployments.write(later.model_copy(update={"created": clock()}))
            waiting = await controller.step()
            assert isinstance(waiting, Wait)
            assert "canary: 0 of 1000 requests" in waiting.reason

    asyncio.run(scenario())


def test_the_live_version_moves_to_more_shards_and_stays_there(folder_url: str) -> None:
    async def scenario() -> None:
        store = Store(folder_url)
        async with AsyncExitStack() as stack:
            services = await stack.enter_async_context(scripted_services(num_replicas=2, more_shards=3))
            publish(store)
            two, three = services.shards[:4], services.shards[4:]
            services.query_service.loads = [load(1)]
            for shard in two:
                shard.loads = [load(1, num_items=150)]
            (controller,) = await controllers(stack, store, services, 1)
            assert [await controller.step(), await controller.step()] == [Stage(1), Promote(1)]
            operations.stage(store, 1, 3)
            waiting = await controller.step()
            assert isinstance(waiting, Wait)
            assert "shard 0/3 at" in waiting.reason
            for shard in three[:2]:
                shard.loads = [load(1)]
            assert isinstance(await controller.step(), Wait)
            three[2].loads = [load(1)]
            assert await controller.step() == Promote(1)
            record = DeploymentStore(store).current()
            assert (record.live, record.standby) == ((1, 3), (1, None))
            resting = await controller.step()
            assert resting == Wait(
                "version 1 is live, its other layout is left alone: promoted by the rollout controller: all gates pass"
            )
            # The next version is served by the new layout alone.
            publish(store)
            assert await controller.step() == Stage(2)
            assert DeploymentStore(store).current().standby == (2, 3)
            services.query_service.loads = [load(1), load(2)]
            for shard in three:
                shard.loads = [load(1), load(2)]
            assert await controller.step() == Promote(2)
            assert DeploymentStore(store).current().live == (2, 3)

    asyncio.run(scenario())


def test_a_layout_that_lost_items_is_refused(folder_url: str) -> None:
    async def scenario() -> None:
        store = Store(folder_url)
        async with AsyncExitStack() as stack:
            services = await stack.enter_async_context(scripted_services(more_shards=3))
            publish(store)
            services.say(load(1))
            (controller,) = await controllers(stack, store, services, 1)
            assert [await controller.step(), await controller.step()] == [Stage(1), Promote(1)]
            operations.stage(store, 1, 3)
            for shard in services.shards[2:]:
                shard.loads = [load(1, num_items=50)]
            action = await controller.step()
            assert isinstance(action, Hold)
            assert "item count: 150 items beside 200 of version 1" in action.reason

    asyncio.run(scenario())


def test_of_two_controllers_one_begins_the_canary_and_one_ends_it(folder_url: str) -> None:
    async def scenario() -> None:
        store = Store(folder_url)
        async with AsyncExitStack() as stack:
            services = await stack.enter_async_context(scripted_services())
            both = await controllers(stack, store, services, 2, CANARY_LIMITS)
            publish(store)
            services.say(load(1))
            await both[0].step()
            await both[0].step()
            for version in range(2, 8):
                publish(store)
                services.say(load(version - 1), load(version))
                actions = []
                while DeploymentStore(store).current().live_version != version:
                    answered(store, services, 0)
                    services.query_service.traffic = [Traffic(version, 2, 100, 0, 0.01, 0.01)]
                    actions += await asyncio.gather(*(controller.step() for controller in both))
                done = [action for action in actions if not isinstance(action, Wait)]
                assert sorted(map(str, done)) == sorted(
                    map(str, (Stage(version), Canary(version, 0.1), Promote(version)))
                )
            assert len(DeploymentStore(store).history()) == 2 + 3 * 6

    asyncio.run(scenario())


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
                "TWOTOWER_SHARDS": ",".join(shard.address for shard in services.shards),
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
