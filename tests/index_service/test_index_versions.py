"""What is in memory follows the record: the guarantees of `index_service.versions`, with loads in the test's hand."""

import asyncio
import weakref
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime

import pyarrow as pa
import pytest
from small_indexes import small_index, unit_vectors

from index_service import versions as versions_module
from index_service.feed import Changes
from index_service.live import LiveIndex
from index_service.load import LoadedIndex
from index_service.order import CorruptCheckpointError
from index_service.versions import State, Versions
from towers.deployment import Deployment
from towers.errors import InvalidInputError, StoreUnavailableError, VersionNotLoadedError


class ControlledLoader:
    """Makes small indexes, each when the test says so, and lets them catch up with a log in the test's hand."""

    def __init__(self):
        self.asked = asyncio.Queue()
        self.in_progress = {}
        self.replaced = {}
        self.pruned = []
        self.named = []
        self.cancelled = []
        self.prune_error = None
        self.catalogue_version = None
        self.catch_up_error = None
        self.cannot_catch_up = set()
        """States of the catalogue from which no changes lead on."""
        self.may_catch_up = asyncio.Event()
        self.may_catch_up.set()
        self.saved = []
        self.save_error = None
        self.may_save = asyncio.Event()
        self.may_save.set()
        self.num_resident = self.most_resident = 0

    async def load(self, checkpoint_version, catalogue_version, replaced, report):
        key = (checkpoint_version, catalogue_version)
        self.in_progress[key] = asyncio.get_running_loop().create_future()
        self.report = report
        self.replaced[key] = None if replaced is None else replaced.live.base
        self.asked.put_nowait(key)
        try:
            await self.in_progress[key]
        except asyncio.CancelledError:
            self.cancelled.append(key)
            raise
        finally:
            del self.in_progress[key], self.report, self.replaced[key]
        index = small_index(
            unit_vectors(5, 4), checkpoint_version=checkpoint_version, catalogue_version=catalogue_version
        )
        self.num_resident += 1
        self.most_resident = max(self.most_resident, self.num_resident)
        weakref.finalize(index, self._freed)
        return LoadedIndex(LiveIndex(index, None), is_from_store=False)

    def _freed(self):
        self.num_resident -= 1

    async def catch_up(self, loaded):
        await self.may_catch_up.wait()
        if self.catch_up_error:
            raise self.catch_up_error
        if loaded.live.catalogue_version in self.cannot_catch_up:
            return False
        if self.catalogue_version is not None:
            loaded.live.apply(Changes(self.catalogue_version, pa.table({"item_id": pa.array([], pa.string())}), ()))
        return True

    async def save_delta(self, loaded):
        self.saved.append(loaded.live.catalogue_version)
        await self.may_save.wait()
        if self.save_error:
            raise self.save_error

    async def prune(self, checkpoint_version, created_before):
        if self.prune_error:
            raise self.prune_error
        self.pruned.append((checkpoint_version, created_before))

    async def prune_others(self, checkpoint_versions):
        self.named.append(checkpoint_versions)

    async def next(self):
        return await asyncio.wait_for(self.asked.get(), 20)

    def finish(self, *key):
        self.in_progress[key].set_result(None)

    def fail(self, error, *key):
        self.in_progress[key].set_exception(error)


def record(revision, live, standby=None, **layouts):
    named = {"live_version": live, "standby_version": standby, "held": False, "reason": "", **layouts}
    return Deployment(revision=revision, created=datetime.now(UTC), **named)


@asynccontextmanager
async def following(num_shards=1):
    loader = ControlledLoader()
    readiness = []

    async def note():
        readiness.append(versions.is_ready)

    versions = Versions(loader, num_shards, 0.1, note)
    versions.readiness = readiness
    task = asyncio.create_task(versions.run())
    try:
        yield versions, loader
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def until(condition, what):
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"{what}: not within 10 s")


async def until_state(versions, version, state):
    await until(lambda: states(versions).get(version) is state, f"version {version} {state}")


def searched(versions, version):
    """The state of the catalogue that is searched."""
    with versions.pin(version) as view:
        return view.catalogue_version


def states(versions):
    return {status.version: status.state for status in versions.statuses()}


def held(versions, version):
    with versions.pin(version) as view:
        return view.base


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
            assert states(versions) == {1: State.AVAILABLE, 3: State.LOADING}
            with pytest.raises(VersionNotLoadedError, match=r"checkpoint_version 2 is not loaded; loaded: \[1\]"):
                versions.pin(2).__enter__()
            assert await loader.next() == (3, "0.1")
            assert gone() is None

    asyncio.run(run())


def test_an_omitted_version_stays_until_the_last_request_that_holds_it_ends_and_nothing_is_loaded_before():
    async def run():
        async with following() as (versions, loader):
            await load_both(versions, loader)

            async def long_search(is_held, may_end):
                with versions.pin(2) as view:
                    is_held.set()
                    await may_end.wait()
                    return view.search(unit_vectors(1, 4), 5).counts.tolist()

            ends = [asyncio.Event(), asyncio.Event()]
            is_held = asyncio.Event()
            searches = [asyncio.create_task(long_search(is_held, end)) for end in ends]
            await is_held.wait()
            await asyncio.sleep(0)
            gone = weakref.ref(held(versions, 2))
            versions.follow(record(2, 1, 3))
            assert states(versions) == {1: State.AVAILABLE, 2: State.UNLOADING, 3: State.LOADING}
            with pytest.raises(VersionNotLoadedError):
                versions.pin(2).__enter__()
            ends[0].set()
            assert await searches[0] == [5]
            await asyncio.sleep(0.05)
            assert states(versions)[2] is State.UNLOADING
            assert loader.asked.empty()
            ends[1].set()
            assert await searches[1] == [5]
            assert states(versions) == {1: State.AVAILABLE, 3: State.LOADING}
            assert await loader.next() == (3, "0.1")
            assert gone() is None
            loader.finish(3, "0.1")
            await until_state(versions, 3, State.AVAILABLE)
            assert loader.most_resident == 2

    asyncio.run(run())


def test_a_version_that_is_named_again_while_requests_hold_it_is_not_loaded_again():
    async def run():
        async with following() as (versions, loader):
            await load_both(versions, loader)
            with versions.pin(2) as view:
                versions.follow(record(2, 1))
                versions.follow(record(3, 1, 2))
                assert states(versions)[2] is State.AVAILABLE
            assert held(versions, 2) is view.base
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


def test_of_many_staged_in_a_row_only_the_last_is_loaded():
    async def run():
        async with following() as (versions, loader):
            await load_both(versions, loader)
            for revision in range(2, 40):
                versions.follow(record(revision, 1, revision + 1))
                await asyncio.sleep(0.001 if revision % 3 else 0)
            while (key := await loader.next()) != (40, "0.1"):
                assert key not in loader.in_progress
            loader.finish(40, "0.1")
            await until_state(versions, 40, State.AVAILABLE)
            assert states(versions) == {1: State.AVAILABLE, 40: State.AVAILABLE}
            assert loader.most_resident == 2
            assert not loader.in_progress
            assert loader.named[-1] == (1, 40)

    asyncio.run(run())


def test_a_shard_loads_what_its_layout_serves():
    async def run():
        async with following(num_shards=3) as (versions, loader):
            versions.follow_catalogue("0.1")
            versions.follow(record(1, 1, 1, live_num_shards=2, standby_num_shards=3))
            assert await loader.next() == (1, "0.1")
            loader.finish(1, "0.1")
            await until_state(versions, 1, State.AVAILABLE)
            assert versions.is_ready
            # Promoted, and then a version that only the other layout serves stands by.
            versions.follow(record(2, 1, 1, live_num_shards=3, standby_num_shards=2))
            versions.follow(record(3, 1, 2, live_num_shards=3, standby_num_shards=2))
            assert states(versions) == {1: State.AVAILABLE}
            # Nothing concerns this layout any longer.
            versions.follow(record(4, 2, 1, live_num_shards=2, standby_num_shards=2))
            assert states(versions) == {}
            assert not versions.is_ready
            assert loader.asked.empty()

    asyncio.run(run())


def test_changes_are_taken_up_between_requests_by_all_versions():
    async def run():
        async with following() as (versions, loader):
            await load_both(versions, loader)
            bases = [held(versions, version) for version in (1, 2)]
            with versions.pin(1) as old:
                loader.catalogue_version = "0.2"
                versions.follow_catalogue("0.2")
                await until(lambda: searched(versions, 2) == "0.2", "version 2 follows")
                assert searched(versions, 1) == "0.2"
                assert old.catalogue_version == "0.1"
            assert [held(versions, version) for version in (1, 2)] == bases
            assert loader.asked.empty()

    asyncio.run(run())


def test_a_delta_is_saved_beside_updates_and_a_failure_stops_nothing(monkeypatch, caplog):
    monkeypatch.setattr("index_service.live._MOST_UNSAVED_COMMITS", 2)

    async def run():
        async with following() as (versions, loader):

            async def follow(*numbers):
                for number in numbers:
                    loader.catalogue_version = f"0.{number}"
                    versions.follow_catalogue(f"0.{number}")
                    await until(lambda: searched(versions, 1) == loader.catalogue_version, "version 1 follows")

            versions.follow(record(1, 1))
            versions.follow_catalogue("0.1")
            await loader.next()
            loader.finish(1, "0.1")
            await until_state(versions, 1, State.AVAILABLE)
            loader.may_save.clear()
            loader.save_error = StoreUnavailableError("the store is down")
            await follow(2, 3)
            await until(lambda: loader.saved, "it is being saved")
            await follow(4, 5)
            assert len(loader.saved) == 1, "updates do not wait for it"
            loader.may_save.set()
            await until(lambda: "a restart will take longer: the store is down" in caplog.text, "it is told")
            loader.save_error = None
            await follow(6)
            await until(lambda: loader.saved[-1] == "0.6", "it is saved again")

    asyncio.run(run())


def test_a_version_that_was_loaded_meanwhile_catches_up_with_what_it_missed():
    async def run():
        async with following() as (versions, loader):
            versions.follow_catalogue("0.1")
            versions.follow(record(1, 1))
            assert await loader.next() == (1, "0.1")
            loader.catalogue_version = "0.2"
            versions.follow_catalogue("0.2")
            loader.finish(1, "0.1")
            await until_state(versions, 1, State.AVAILABLE)
            assert searched(versions, 1) == "0.2"

    asyncio.run(run())


def test_an_index_that_cannot_catch_up_is_replaced_while_it_serves():
    async def run():
        async with following() as (versions, loader):
            await load_both(versions, loader)
            old = weakref.ref(held(versions, 1))
            created = old().manifest.created
            loader.cannot_catch_up = {"0.1"}
            loader.catalogue_version = "1.1"
            versions.follow_catalogue("1.1")
            assert await loader.next() == (1, "1.1")
            assert loader.replaced[1, "1.1"] is old()
            loader.report(0.5)
            assert states(versions) == {1: State.AVAILABLE, 2: State.AVAILABLE}
            is_held, may_end = asyncio.Event(), asyncio.Event()

            async def long_search():
                with versions.pin(1) as view:
                    is_held.set()
                    await may_end.wait()
                    return view.catalogue_version

            search = asyncio.create_task(long_search())
            await is_held.wait()
            loader.finish(1, "1.1")
            await until(lambda: searched(versions, 1) == "1.1", "the new index")
            # The other one waits for its turn, and that for the memory of the replaced one.
            await asyncio.sleep(0.05)
            assert loader.asked.empty()
            assert old() is not None
            may_end.set()
            assert await search == "0.1"
            assert await loader.next() == (2, "1.1")
            assert old() is None
            assert searched(versions, 2) == "0.1"
            loader.finish(2, "1.1")
            await until(lambda: searched(versions, 2) == "1.1", "the new index of version 2")
            assert loader.pruned[0] == (1, created)

    asyncio.run(run())


def test_the_catalogue_that_is_searched_never_goes_back_in_time():
    async def run():
        async with following() as (versions, loader):
            await load_both(versions, loader)
            versions.follow(record(2, 1))
            loader.cannot_catch_up = {"0.1"}
            loader.catalogue_version = "1.1"
            versions.follow_catalogue("1.1")
            assert await loader.next() == (1, "1.1")
            # It was built from 1.1; when it takes its place, 1.5 is there.
            loader.catalogue_version = "1.5"
            versions.follow_catalogue("1.5")
            seen = []
            loader.finish(1, "1.1")
            while "1.5" not in seen:
                seen.append(searched(versions, 1))
                await asyncio.sleep(0)
            assert set(seen) <= {"0.1", "1.5"}

    asyncio.run(run())


def test_a_replacement_makes_way_for_a_version_that_cannot_answer_yet():
    async def run():
        async with following() as (versions, loader):
            await load_both(versions, loader)
            loader.cannot_catch_up = {"0.1"}
            loader.catalogue_version = "1.1"
            versions.follow_catalogue("1.1")
            assert await loader.next() == (1, "1.1")
            versions.follow(record(2, 1, 3))
            assert await loader.next() == (3, "1.1")
            assert loader.cancelled == [(1, "1.1")]
            loader.finish(3, "1.1")
            assert await loader.next() == (1, "1.1")

    asyncio.run(run())


def test_changes_that_cannot_be_taken_up_keep_what_there_is_and_say_so(monkeypatch):
    monkeypatch.setattr(versions_module, "FIRST_RETRY_S", 0.02)

    async def run():
        async with following() as (versions, loader):
            await load_both(versions, loader)
            loader.catch_up_error = InvalidInputError("no column")
            loader.catalogue_version = "0.2"
            versions.follow_catalogue("0.2")
            await until(lambda: versions.statuses()[1].reason, "said")
            live = versions.statuses()[0]
            assert (live.state, live.reason, live.is_corrupt) == (
                State.AVAILABLE,
                "its refresh failed: no column",
                False,
            )
            assert searched(versions, 1) == "0.1"
            assert versions.is_ready
            loader.catch_up_error = None
            await until(lambda: searched(versions, 1) == searched(versions, 2) == "0.2", "tried again")
            assert not versions.statuses()[0].reason

    asyncio.run(run())


def test_an_index_is_not_freed_while_changes_are_applied_to_it():
    async def run():
        async with following() as (versions, loader):
            await load_both(versions, loader)
            loader.may_catch_up.clear()
            versions.follow_catalogue("0.2")
            await asyncio.sleep(0.05)
            versions.follow(record(2, 2))
            assert states(versions) == {1: State.UNLOADING, 2: State.AVAILABLE}
            loader.may_catch_up.set()
            await until(lambda: states(versions) == {2: State.AVAILABLE}, "unloaded")

    asyncio.run(run())


def test_old_indexes_that_cannot_be_deleted_are_no_failure():
    async def run():
        async with following() as (versions, loader):
            loader.prune_error = StoreUnavailableError("down")
            await load_both(versions, loader)
            loader.cannot_catch_up = {"0.1"}
            loader.catalogue_version = "1.1"
            versions.follow_catalogue("1.1")
            assert await loader.next() == (1, "1.1")
            loader.finish(1, "1.1")
            assert await loader.next() == (2, "1.1")
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


def test_a_new_record_ends_the_wait_after_a_failure_and_a_new_catalogue_does_not(monkeypatch):
    monkeypatch.setattr(versions_module, "FIRST_RETRY_S", 3600.0)
    monkeypatch.setattr(versions_module, "LAST_RETRY_S", 3600.0)

    async def run():
        async with following() as (versions, loader):
            versions.follow_catalogue("0.1")
            versions.follow(record(1, 1))
            assert await loader.next() == (1, "0.1")
            loader.fail(InvalidInputError("bad"), 1, "0.1")
            await until_state(versions, 1, State.FAILED)
            # Live updates come all the time; a build that fails must not be started again with each of them.
            versions.follow_catalogue("0.2")
            await asyncio.sleep(0.05)
            assert loader.asked.empty()
            versions.follow(record(2, 1, 2))
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
