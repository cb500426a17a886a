"""What is in memory follows the record: the guarantees of `index_service.versions`, with loads in the test's hand."""

import asyncio
import gc
import weakref
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime

import pytest
from small_indexes import small_index, unit_vectors

from index_service import versions as versions_module
from index_service.load import LoadedIndex
from index_service.order import CorruptCheckpointError
from index_service.versions import State, Versions
from towers.deployment import Deployment
from towers.errors import InvalidInputError, StoreUnavailableError, VersionNotLoadedError


class ControlledLoader:
    """Makes small indexes, each when the test says so."""

    def __init__(self):
        self.asked = asyncio.Queue()
        self.in_progress = {}
        self.pruned = []
        self.cancelled = []
        self.prune_error = None

    async def load(self, checkpoint_version, catalogue_version, report):
        key = (checkpoint_version, catalogue_version)
        self.in_progress[key] = asyncio.get_running_loop().create_future()
        self.report = report
        self.asked.put_nowait(key)
        try:
            await self.in_progress[key]
        except asyncio.CancelledError:
            self.cancelled.append(key)
            raise
        finally:
            del self.in_progress[key], self.report
        index = small_index(
            unit_vectors(5, 4), checkpoint_version=checkpoint_version, catalogue_version=catalogue_version
        )
        return LoadedIndex(index, is_from_store=False)

    async def prune(self, checkpoint_version, created_before):
        if self.prune_error:
            raise self.prune_error
        self.pruned.append((checkpoint_version, created_before))

    async def next(self):
        return await asyncio.wait_for(self.asked.get(), 20)

    def finish(self, *key):
        self.in_progress[key].set_result(None)

    def fail(self, error, *key):
        self.in_progress[key].set_exception(error)


def record(revision, live, standby=None):
    return Deployment(
        revision=revision, live_version=live, standby_version=standby, held=False, reason="", created=datetime.now(UTC)
    )


@asynccontextmanager
async def following():
    loader = ControlledLoader()
    readiness = []

    async def note():
        readiness.append(versions.is_live_available)

    versions = Versions(loader, note)
    versions.readiness = readiness
    task = asyncio.create_task(versions.run())
    try:
        yield versions, loader
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def until_state(versions, version, state):
    for _ in range(1000):
        found = states(versions).get(version)
        if found is state:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"version {version} is {found}, not {state}")


def states(versions):
    return {status.version: status.state for status in versions.statuses()}


def held(versions, version):
    with versions.pin(version) as index:
        return index


async def load_both(versions, loader):
    versions.follow(record(1, 1, 2))
    versions.follow_catalogue("0.1")
    for version in (1, 2):
        assert await loader.next() == (version, "0.1")
        loader.finish(version, "0.1")
        await until_state(versions, version, State.AVAILABLE)


def test_live_first_then_standby_and_one_at_a_time():
    async def run():
        async with following() as (versions, loader):
            versions.follow_catalogue("0.1")
            versions.follow(record(1, 7, 3))
            assert await loader.next() == (7, "0.1")
            assert states(versions) == {3: State.LOADING, 7: State.LOADING}
            assert list(loader.in_progress) == [(7, "0.1")]
            assert not versions.readiness[-1]
            loader.report(0.25)
            assert [(s.version, s.state, s.progress) for s in versions.statuses()] == [
                (3, State.LOADING, 0),
                (7, State.BUILDING, 0.25),
            ]
            loader.finish(7, "0.1")
            assert await loader.next() == (3, "0.1")
            assert states(versions) == {3: State.LOADING, 7: State.AVAILABLE}
            assert versions.readiness[-1]
            loader.finish(3, "0.1")
            await until_state(versions, 3, State.AVAILABLE)
            assert not loader.pruned

    asyncio.run(run())


def test_an_omitted_version_goes_at_once_and_before_the_new_one_is_loaded():
    async def run():
        async with following() as (versions, loader):
            await load_both(versions, loader)
            gone = weakref.ref(held(versions, 2))
            versions.follow(record(2, 1, 3))
            gc.collect()
            assert gone() is None
            assert states(versions) == {1: State.AVAILABLE, 3: State.LOADING}
            with pytest.raises(VersionNotLoadedError, match=r"checkpoint_version 2 is not loaded; loaded: \[1\]"):
                versions.pin(2).__enter__()
            assert await loader.next() == (3, "0.1")

    asyncio.run(run())


def test_an_omitted_version_stays_until_the_last_request_that_holds_it_ends():
    async def run():
        async with following() as (versions, loader):
            await load_both(versions, loader)
            with versions.pin(2) as index:
                gone = weakref.ref(index)
                with versions.pin(2):
                    versions.follow(record(2, 1))
                    assert states(versions) == {1: State.AVAILABLE, 2: State.UNLOADING}
                    with pytest.raises(VersionNotLoadedError):
                        versions.pin(2).__enter__()
                assert states(versions)[2] is State.UNLOADING
                assert index.search(unit_vectors(1, 4), 5).counts.tolist() == [5]
            assert states(versions) == {1: State.AVAILABLE}
            del index
            gc.collect()
            assert gone() is None

    asyncio.run(run())


def test_a_version_that_is_named_again_while_requests_hold_it_is_not_loaded_again():
    async def run():
        async with following() as (versions, loader):
            await load_both(versions, loader)
            with versions.pin(2) as index:
                versions.follow(record(2, 1))
                versions.follow(record(3, 1, 2))
                assert states(versions)[2] is State.AVAILABLE
            assert held(versions, 2) is index
            assert loader.asked.empty()

    asyncio.run(run())


def test_the_load_of_an_omitted_version_is_cancelled():
    async def run():
        async with following() as (versions, loader):
            versions.follow_catalogue("0.1")
            versions.follow(record(1, None, 2))
            assert await loader.next() == (2, "0.1")
            versions.follow(record(2, None, 3))
            assert await loader.next() == (3, "0.1")
            assert loader.cancelled == [(2, "0.1")]
            assert states(versions) == {3: State.LOADING}
            # And named again before its cancelled load was seen to end.
            versions.follow(record(3, None, 4))
            versions.follow(record(4, None, 3))
            assert await loader.next() == (3, "0.1")
            loader.finish(3, "0.1")
            await until_state(versions, 3, State.AVAILABLE)

    asyncio.run(run())


def test_promotion_moves_nothing():
    async def run():
        async with following() as (versions, loader):
            await load_both(versions, loader)
            before = [held(versions, version) for version in (1, 2)]
            versions.follow(record(2, 2, 1))
            await asyncio.sleep(0.05)
            assert [held(versions, version) for version in (1, 2)] == before
            assert versions.readiness[-1]
            versions.follow(record(3, 9, 1))
            assert await loader.next() == (9, "0.1")
            await asyncio.sleep(0.05)
            assert not versions.readiness[-1]

    asyncio.run(run())


def test_a_new_catalogue_is_swapped_in_between_requests():
    async def run():
        async with following() as (versions, loader):
            await load_both(versions, loader)
            replaced = [held(versions, version).manifest.created for version in (1, 2)]
            with versions.pin(1) as old:
                versions.follow_catalogue("0.2")
                assert await loader.next() == (1, "0.2")
                loader.report(0.5)
                assert states(versions) == {1: State.AVAILABLE, 2: State.AVAILABLE}
                loader.finish(1, "0.2")
                assert await loader.next() == (2, "0.2")
                assert old.manifest.catalogue_version == "0.1"
                assert held(versions, 1).manifest.catalogue_version == "0.2"
            assert held(versions, 2).manifest.catalogue_version == "0.1"
            # The catalogue moves on during the load: the load ends, then the newest one follows.
            versions.follow_catalogue("0.3")
            versions.follow_catalogue("0.4")
            loader.finish(2, "0.2")
            assert await loader.next() == (1, "0.4")
            assert loader.pruned == list(zip((1, 2), replaced, strict=True))

    asyncio.run(run())


def test_a_failed_refresh_keeps_what_there_is_and_says_so():
    async def run():
        async with following() as (versions, loader):
            await load_both(versions, loader)
            versions.follow_catalogue("0.2")
            assert await loader.next() == (1, "0.2")
            loader.fail(InvalidInputError("no column"), 1, "0.2")
            assert await loader.next() == (2, "0.2")
            live = versions.statuses()[0]
            assert (live.state, live.reason, live.is_corrupt) == (
                State.AVAILABLE,
                "its refresh failed: no column",
                False,
            )
            assert held(versions, 1).manifest.catalogue_version == "0.1"
            assert versions.is_live_available

    asyncio.run(run())


def test_old_indexes_that_cannot_be_deleted_are_no_failure():
    async def run():
        async with following() as (versions, loader):
            await load_both(versions, loader)
            loader.prune_error = StoreUnavailableError("down")
            versions.follow_catalogue("0.2")
            assert await loader.next() == (1, "0.2")
            loader.finish(1, "0.2")
            assert await loader.next() == (2, "0.2")
            assert versions.statuses()[0].reason == ""

    asyncio.run(run())


def test_failures_are_tried_again_later_each_time_and_do_not_block_the_other_version(monkeypatch):
    monkeypatch.setattr(versions_module, "FIRST_RETRY_S", 0.02)
    monkeypatch.setattr(versions_module, "LAST_RETRY_S", 0.05)

    async def run():
        async with following() as (versions, loader):
            versions.follow_catalogue("0.1")
            versions.follow(record(1, 1, 2))
            assert await loader.next() == (1, "0.1")
            loader.fail(CorruptCheckpointError("item_tower.onnx differs"), 1, "0.1")
            assert await loader.next() == (2, "0.1")
            failed = versions.statuses()[0]
            assert (failed.state, failed.reason, failed.is_corrupt) == (State.FAILED, "item_tower.onnx differs", True)
            loader.finish(2, "0.1")
            for error in (RuntimeError("a bug, with detail"), StoreUnavailableError("down")):
                assert await loader.next() == (1, "0.1")
                loader.fail(error, 1, "0.1")
                await until_state(versions, 1, State.FAILED)
                reason = versions.statuses()[0].reason
                assert reason == ("down" if isinstance(error, StoreUnavailableError) else reason)
                assert "detail" not in reason
                assert not versions.statuses()[0].is_corrupt
            assert await loader.next() == (1, "0.1")
            loader.finish(1, "0.1")
            await until_state(versions, 1, State.AVAILABLE)
            assert versions.statuses()[0].reason == ""

    asyncio.run(run())


@pytest.mark.parametrize("change", ["record", "catalogue"])
def test_a_change_ends_the_wait_after_a_failure(change, monkeypatch):
    monkeypatch.setattr(versions_module, "FIRST_RETRY_S", 3600.0)
    monkeypatch.setattr(versions_module, "LAST_RETRY_S", 3600.0)

    async def run():
        async with following() as (versions, loader):
            versions.follow_catalogue("0.1")
            versions.follow(record(1, 1))
            assert await loader.next() == (1, "0.1")
            loader.fail(InvalidInputError("bad"), 1, "0.1")
            await until_state(versions, 1, State.FAILED)
            if change == "record":
                versions.follow(record(2, 1, 2))
                assert await loader.next() == (1, "0.1")
            else:
                versions.follow_catalogue("0.2")
                assert await loader.next() == (1, "0.2")

    asyncio.run(run())


def test_the_catalogue_is_waited_for_in_words():
    async def run():
        async with following() as (versions, loader):
            versions.follow(record(1, 1))
            assert states(versions) == {1: State.LOADING}
            versions.report_catalogue_problem("the catalogue is not loaded")
            assert states(versions) == {1: State.FAILED}
            assert versions.statuses()[0].reason == "the catalogue is not loaded"
            versions.follow_catalogue("0.1")
            assert await loader.next() == (1, "0.1")
            loader.finish(1, "0.1")
            await until_state(versions, 1, State.AVAILABLE)
            versions.report_catalogue_problem("the store is down")
            assert states(versions) == {1: State.AVAILABLE}

    asyncio.run(run())


def test_a_load_in_progress_is_cancelled_at_the_end():
    async def run():
        async with following() as (versions, loader):
            versions.follow_catalogue("0.1")
            versions.follow(record(1, 1))
            await loader.next()
        assert loader.cancelled == [(1, "0.1")]

    asyncio.run(run())
