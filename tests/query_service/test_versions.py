"""Which query towers are in memory, and which of them answers."""

import asyncio
import gc
import shutil
import threading
import time
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import onnx
import pytest
from query_system import World, assert_exact, running, status_code, until
from retrieval.query.v1 import query_service_pb2
from toy_checkpoint import TOY_FEATURES, ToyModel, toy_model

from query_service.deadline import Deadline
from query_service.versions import TowerState, Versions
from towers.checkpoint import CheckpointDraft, CheckpointStore, GoldenExamples
from towers.errors import NotReadyError
from towers.schema import parse_schema

QUERY = {"user_id": "1", "history": ["3", "4"]}
NEVER_S = 600.0


@asynccontextmanager
async def following(world: World, poll_interval_s: float = 0.02) -> AsyncIterator[Versions]:
    versions = Versions(world.store, poll_interval_s, [2])
    task = asyncio.create_task(versions.follow())
    try:
        yield versions
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def until_states(versions: Versions, states: dict[int, TowerState]) -> None:
    async def look() -> dict[int, TowerState]:
        return {status.version: status.state for status in versions.statuses()}

    await until(look, lambda seen: seen == states)


async def until_live(versions: Versions, version: int) -> None:
    async def look() -> int | None:
        return versions.live_version

    await until(look, lambda seen: seen == version)


def path_of(world: World, version: int, file: str) -> Path:
    return Path(world.store.url) / "checkpoints" / str(version) / file


def test_exactly_the_versions_of_the_record_are_loaded(world: World) -> None:
    available = TowerState.AVAILABLE

    async def check() -> None:
        async with following(world) as versions:
            await until_states(versions, {1: available, 2: available})
            assert versions.pin().version == versions.pin().tower.version == 1
            assert world.publish(toy_model(seed=3)) == 3
            world.deploy(live=2, standby=3)
            await until_states(versions, {2: available, 3: available})
            assert versions.pin().version == 2
            world.deploy(live=2)
            await until_states(versions, {2: available})

    asyncio.run(check())


def test_an_omitted_version_goes_when_its_last_request_ends(world: World) -> None:
    async def check() -> None:
        async with following(world) as versions:
            await until_states(versions, {1: TowerState.AVAILABLE, 2: TowerState.AVAILABLE})
            pin = versions.pin()
            tower = weakref.ref(pin.tower)
            world.deploy(live=2)
            await until_states(versions, {2: TowerState.AVAILABLE})
            gc.collect()
            assert tower() is not None, "a request holds it"
            assert pin.tower.embed_rows([QUERY]).shape == (1, 8)
            del pin
            gc.collect()
            assert tower() is None

    asyncio.run(check())


def test_the_old_version_answers_until_the_new_one_is_loaded(world: World) -> None:
    released = threading.Event()

    async def check() -> None:
        async with following(world) as versions:
            await until_live(versions, 1)
            world.publish(toy_model(seed=3))
            load = versions._load

            def slow_load(version: int):
                released.wait()
                return load(version)

            # Slows the real load down; what is loaded is real.
            versions._load = slow_load  # type: ignore[method-assign]
            world.deploy(live=3)
            await until_states(versions, {1: TowerState.AVAILABLE, 3: TowerState.LOADING})
            assert versions.pin().version == 1, "the record does not name it, but nothing else can answer"
            released.set()
            await until_states(versions, {3: TowerState.AVAILABLE})
            assert versions.pin().version == 3

    asyncio.run(check())


def test_a_bad_version_is_refused_with_a_reason_and_a_good_one_then_loads(world: World) -> None:
    tower_file = path_of(world, 2, "query_tower.onnx")
    content = tower_file.read_bytes()
    tower_file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    async def check() -> None:
        async with following(world) as versions:
            await until_states(versions, {1: TowerState.AVAILABLE, 2: TowerState.FAILED})
            status = versions.statuses()[1]
            assert status.is_corrupt
            assert "query_tower.onnx differs from the manifest" in status.reason
            world.deploy(live=2, standby=1)
            await versions.refresh(Deadline.after(NEVER_S))
            assert versions.deployment.live_version == 2
            assert versions.pin().version == 1, "it goes on answering"
            assert world.publish(toy_model(seed=3)) == 3
            world.deploy(live=3, standby=1)
            await until_live(versions, 3)

    asyncio.run(check())


def test_a_version_that_was_bad_is_tried_again(world: World) -> None:
    manifest = path_of(world, 2, "manifest.json")
    content = manifest.read_bytes()
    manifest.unlink()

    async def check() -> None:
        async with following(world) as versions:
            await until_states(versions, {1: TowerState.AVAILABLE, 2: TowerState.FAILED})
            assert versions.statuses()[1].reason.startswith("checkpoint 2 is not published")
            assert not versions.statuses()[1].is_corrupt
            manifest.write_bytes(content)
            await until_states(versions, {1: TowerState.AVAILABLE, 2: TowerState.AVAILABLE})
            assert versions.statuses()[1].reason == ""

    asyncio.run(check())


def test_a_store_that_is_gone_changes_nothing(
    world: World, models: dict[int, ToyModel], caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(world.store.url)
    hidden = folder.with_name("hidden")
    caplog.set_level("INFO")

    async def check() -> None:
        async with running(world, models) as system:
            folder.rename(hidden)
            folder.write_text("not a folder")
            for _ in range(10):
                assert_exact(await system.retrieve(QUERY), models[1], QUERY)
                await asyncio.sleep(0.02)
            assert caplog.text.count("cannot be read") == 1
            folder.unlink()
            hidden.rename(folder)
            world.deploy(live=2, standby=1)
            await system.until_live(2)
            assert_exact(await system.retrieve(QUERY), models[2], QUERY)
            assert "can be read again" in caplog.text

    asyncio.run(check())


def test_a_store_without_its_records_changes_nothing(world: World, models: dict[int, ToyModel]) -> None:
    async def check() -> None:
        async with running(world, models) as system:
            shutil.rmtree(world.store.url)
            await asyncio.sleep(0.1)
            assert_exact(await system.retrieve(QUERY), models[1], QUERY)

    asyncio.run(check())


def test_a_record_that_cannot_be_read_from_the_start_is_tried_again(world: World, models: dict[int, ToyModel]) -> None:
    record = Path(world.store.url) / "deployments" / "1.json"
    content = record.read_bytes()
    record.write_bytes(content[:-10])

    async def check() -> None:
        async with following(world) as versions:
            with pytest.raises(NotReadyError, match="no version is live"):
                versions.pin()
            await versions.refresh(Deadline.after(NEVER_S))
            with pytest.raises(NotReadyError, match="the deployment record cannot be read: deployment revision 1 is"):
                versions.pin()
            record.write_bytes(content)
            await until_live(versions, 1)

    asyncio.run(check())


def test_before_the_first_version_the_reason_is_told(empty_world: World, models: dict[int, ToyModel]) -> None:
    async def check() -> None:
        async with following(empty_world) as versions:
            with pytest.raises(NotReadyError, match="no version is live; see twotower status"):
                versions.pin()
            empty_world.deploy(live=7)
            await until_states(versions, {7: TowerState.FAILED})
            with pytest.raises(NotReadyError, match="version 7: checkpoint 7 is not published"):
                versions.pin()
            assert not versions.ready.is_set()

    asyncio.run(check())


def test_requests_that_ask_at_once_share_a_read_that_began_after_them(world: World) -> None:
    async def check() -> None:
        async with following(world, poll_interval_s=NEVER_S) as versions:
            await until_live(versions, 1)
            reads: list[int] = []
            entered, released = threading.Event(), threading.Event()
            newest_record = versions._newest_record

            def slow_read():
                record = newest_record()
                reads.append(record.revision)
                entered.set()
                released.wait()
                return record

            # Slows the real reads down, so that a record can be written in the middle of one.
            versions._newest_record = slow_read  # type: ignore[method-assign]
            early = asyncio.create_task(versions.refresh(Deadline.after(NEVER_S)))
            await asyncio.to_thread(entered.wait)
            world.deploy(live=2, standby=1)
            late = [asyncio.create_task(versions.refresh(Deadline.after(NEVER_S))) for _ in range(50)]
            await asyncio.sleep(0)
            released.set()
            await asyncio.gather(early, *late)
            assert reads == [1, 2]
            assert versions.deployment.live_version == 2

    asyncio.run(check())


def test_a_read_that_hangs_costs_no_more_than_the_deadline(world: World) -> None:
    released = threading.Event()

    async def check() -> None:
        async with following(world, poll_interval_s=NEVER_S) as versions:
            await until_live(versions, 1)
            versions._newest_record = lambda: released.wait() or versions.deployment  # type: ignore
            started_s = time.monotonic()
            await versions.refresh(Deadline.after(0.1))
            assert 0.1 <= time.monotonic() - started_s < NEVER_S
            assert versions.pin().version == 1
            released.set()

    asyncio.run(check())


def test_features_of_the_other_version_are_left_out(empty_world: World) -> None:
    """A caller may send what either version knows, before and after the swap."""
    models = {1: toy_model(), 2: toy_model(seed=2)}
    empty_world.publish(models[1])
    CheckpointStore(empty_world.store).publish(with_clicks(models[2].draft()))
    empty_world.deploy(live=1, standby=2)
    old, new = QUERY, {"user_id": "1", "clicks": ["3", "4"]}

    async def check() -> None:
        available = query_service_pb2.TOWER_STATE_AVAILABLE
        async with running(empty_world, models) as system:
            await until(system.status, lambda status: [tower.state for tower in status.towers] == [available] * 2)
            for live, expected_of in (
                (1, {"old": QUERY, "new": {"user_id": "1"}, "both": QUERY}),
                (2, {"old": {"user_id": "1"}, "new": QUERY, "both": QUERY}),
            ):
                empty_world.deploy(live=live, standby=3 - live)
                await system.until_live(live)
                for sent, expected in zip((old, new, {**old, **new}), expected_of.values(), strict=True):
                    response = await system.retrieve(sent)
                    assert response.checkpoint_version == live
                    assert_exact(response, models[live], expected)
                code, message = await status_code(system.retrieve({**old, "clikcs": ["3"]}))
                assert code is grpc.StatusCode.INVALID_ARGUMENT
                assert "unknown feature 'clikcs'" in message
            empty_world.deploy(live=2)
            await until(system.status, lambda status: len(status.towers) == 1)
            code, message = await status_code(system.retrieve(old))
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert "unknown feature 'history'" in message

    asyncio.run(check())


def test_a_canary_takes_the_features_of_either_version_too(empty_world: World) -> None:
    models = {1: toy_model(), 2: toy_model(seed=2)}
    empty_world.publish(models[1])
    CheckpointStore(empty_world.store).publish(with_clicks(models[2].draft()))
    empty_world.deploy(live=1, standby=2, canary_share=1.0)

    async def check() -> None:
        available = query_service_pb2.TOWER_STATE_AVAILABLE
        async with running(empty_world, models) as system:
            await until(system.status, lambda status: [tower.state for tower in status.towers] == [available] * 2)
            for sent, expected in ((QUERY, {"user_id": "1"}), ({"user_id": "1", "clicks": ["3", "4"]}, QUERY)):
                response = await system.retrieve(sent)
                assert response.checkpoint_version == 2
                assert_exact(response, models[2], expected)
            code, message = await status_code(system.retrieve({"clikcs": ["3"]}))
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert "unknown feature 'clikcs'" in message
            assert [(count.checkpoint_version, count.num_errors) for count in (await system.status()).traffic] == [
                (2, 0)
            ]

    asyncio.run(check())


def with_clicks(draft: CheckpointDraft) -> CheckpointDraft:
    """The same model, whose feature `history` is called `clicks`."""
    declarations = [{**feature, "name": _renamed(feature["name"])} for feature in TOY_FEATURES]
    tower = onnx.load_from_string(draft.towers["query"])
    for node in tower.graph.node:
        node.input[:] = [_renamed(name) for name in node.input]
    for tensor in tower.graph.input:
        tensor.name = _renamed(tensor.name)
    golden = draft.golden["query"]
    rows = [{_renamed(name): value for name, value in row.items()} for row in golden.features]
    return replace(
        draft,
        schema=parse_schema(declarations),
        towers={**draft.towers, "query": tower.SerializeToString()},
        golden={**draft.golden, "query": GoldenExamples(features=rows, embeddings=golden.embeddings)},
    )


def _renamed(name: str) -> str:
    return {"history": "clicks", "feature_history": "feature_clicks"}.get(name, name)
