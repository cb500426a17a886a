"""The servicer's own part: deadlines, cancelled calls, and attributes on the wire."""

import asyncio
import datetime as dt
import threading
import time
from decimal import Decimal

import pytest
from retrieval.feature.v1 import feature_pb2
from shard_process import search_request
from small_indexes import small_index, unit_vectors

from index_service.ann import AnnIndex
from index_service.live import LiveIndex
from index_service.load import LoadedIndex
from index_service.plan import EXACT, IndexPlan, SearchSetting
from index_service.service import IndexServicer, _answer, _feature_value, search_executor
from index_service.versions import State, Versions
from towers.deployment import NO_DEPLOYMENT
from towers.errors import DeadlineError


class OneIndexLoader:
    def __init__(self, latency_s):
        self._latency_s = latency_s

    async def load(self, checkpoint_version, catalogue_version, replaced, report):
        index = small_index(unit_vectors(5, 4), checkpoint_version=checkpoint_version)
        setting = SearchSetting(k=100, parameters="", recall=1, latency_s=self._latency_s)
        index.ann = AnnIndex(IndexPlan(index_type=EXACT, settings=(setting,)), None, index.ann.exact)
        return LoadedIndex(LiveIndex(index, None), True)

    async def catch_up(self, loaded):
        return True

    async def save_delta(self, loaded):
        raise AssertionError("nothing here is worth saving")

    async def prune(self, checkpoint_version, created_before):
        raise AssertionError("nothing is replaced here")

    async def prune_others(self, checkpoint_versions):
        pass


class Context:
    """What the servicer asks of a call."""

    def __init__(self, remaining_s=None):
        self._remaining_s = remaining_s

    def time_remaining(self):
        return self._remaining_s


async def available_versions(latency_s=1.0):
    """Versions with checkpoint 1 loaded, whose searches are said to take so long; nothing loads after that."""

    async def ignore():
        pass

    versions = Versions(OneIndexLoader(latency_s), 1, 0.1, ignore)
    versions.follow(NO_DEPLOYMENT.model_copy(update={"revision": 1, "live_version": 1}))
    versions.follow_catalogue("0.1")
    task = asyncio.create_task(versions.run())
    while not versions.is_ready:
        await asyncio.sleep(0.001)
    task.cancel()
    return versions


def test_work_whose_deadline_has_passed_is_not_begun():
    view = LiveIndex(small_index(unit_vectors(5, 4)), None).view
    request = search_request(unit_vectors(1, 4), 1)
    assert _answer(view, request, time.monotonic() + 60).hit_counts == b"\5\0\0\0"
    with pytest.raises(DeadlineError, match="before the search began"):
        _answer(view, request, time.monotonic() - 1e-9)

    async def run():
        versions = await available_versions()
        with search_executor(1) as executor:
            servicer = IndexServicer(versions, executor, 0, 1)
            assert (await servicer.Search(request, Context())).checkpoint_version == 1
            busy = threading.Event()
            executor.submit(busy.wait)
            late = asyncio.create_task(servicer.Search(request, Context(remaining_s=0.01)))
            await asyncio.sleep(0.05)
            busy.set()
            with pytest.raises(DeadlineError):
                await late

    asyncio.run(run())


def test_a_brief_search_needs_no_thread():
    async def run():
        versions = await available_versions(latency_s=1e-5)
        with search_executor(1) as executor:
            servicer = IndexServicer(versions, executor, 0, 1)
            busy = threading.Event()
            executor.submit(busy.wait)
            answer = await servicer.Search(search_request(unit_vectors(1, 4), 1), Context())
            assert answer.hit_counts == b"\5\0\0\0"
            later = [
                asyncio.create_task(servicer.Search(request, Context()))
                for request in (
                    search_request(unit_vectors(100, 4), 1),
                    search_request(unit_vectors(1, 4), 1, k=101),
                    search_request(unit_vectors(1, 4), 1, excluded_item_ids=["0"]),
                )
            ]
            await asyncio.sleep(0.01)
            assert not any(call.done() for call in later)
            busy.set()
            await asyncio.gather(*later)

    asyncio.run(run())


def test_a_cancelled_call_that_waits_is_dropped():
    async def run():
        versions = await available_versions()
        with search_executor(1) as executor:
            busy = threading.Event()
            executor.submit(busy.wait)
            servicer = IndexServicer(versions, executor, 0, 1)
            call = asyncio.create_task(servicer.Search(search_request(unit_vectors(1, 4), 1), Context()))
            await asyncio.sleep(0.01)
            versions.follow(NO_DEPLOYMENT.model_copy(update={"revision": 2}))
            assert [status.state for status in versions.statuses()] == [State.UNLOADING]
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert versions.statuses() == []
            busy.set()

    asyncio.run(run())


def test_a_cancelled_call_holds_its_index_until_its_search_has_ended(monkeypatch):
    begun, may_end = threading.Event(), threading.Event()

    def slow_answer(view, request, deadline_s):
        begun.set()
        may_end.wait(20)

    monkeypatch.setattr("index_service.service._answer", slow_answer)

    async def run():
        versions = await available_versions()
        with search_executor(1) as executor:
            servicer = IndexServicer(versions, executor, 0, 1)
            call = asyncio.create_task(servicer.Search(search_request(unit_vectors(1, 4), 1), Context()))
            await asyncio.to_thread(begun.wait, 20)
            versions.follow(NO_DEPLOYMENT.model_copy(update={"revision": 2}))
            call.cancel()
            await asyncio.sleep(0.05)
            assert [status.state for status in versions.statuses()] == [State.UNLOADING]
            may_end.set()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert versions.statuses() == []

    asyncio.run(run())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, {}),
        ("", {"string_value": ""}),
        ("ü", {"string_value": "ü"}),
        (True, {"string_value": "true"}),
        (False, {"string_value": "false"}),
        (7, {"number_value": 7.0}),
        (0, {"number_value": 0.0}),
        (1.5, {"number_value": 1.5}),
        (Decimal("2.25"), {"number_value": 2.25}),
        (dt.datetime(1970, 1, 2, tzinfo=dt.UTC), {"number_value": 86_400.0}),
        (dt.datetime(1970, 1, 2), {"number_value": 86_400.0}),
        (dt.datetime(1970, 1, 2, 1, tzinfo=dt.timezone(dt.timedelta(hours=1))), {"number_value": 86_400.0}),
        (dt.date(1970, 1, 3), {"number_value": 172_800.0}),
        ([], {"string_list": {"values": []}}),
        (["a", None, "b"], {"string_list": {"values": ["a", "b"]}}),
        ([1, 2.5], {"number_list": {"values": [1.0, 2.5]}}),
    ],
)
def test_attribute_values_on_the_wire(value, message):
    assert _feature_value(value) == feature_pb2.FeatureValue(**message)
