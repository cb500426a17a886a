"""No shard answers: what was said before to the same question, what is popular, or an error, as the caller wants it."""

import asyncio
from collections.abc import Sequence
from typing import Any

import grpc
import pytest
from query_system import System, World, assert_exact, running, status_code
from retrieval.feature.v1 import filter_pb2
from retrieval.query.v1 import query_service_pb2
from toy_checkpoint import ToyModel

from query_service import fallback
from query_service.fallback import Fallback
from query_service.merge import Ranking

QUERY = {"user_id": "1", "history": ["3", "4"]}
OTHER = {"user_id": "2"}


async def stop_all(system: System) -> None:
    for shard in system.shards:
        await shard.stop()


def first_reason(response: Any) -> str:
    return str(response.degraded_reasons[0].partition(":")[0])


def test_an_earlier_answer_is_given_to_the_same_question_alone(world: World, models: dict[int, ToyModel]) -> None:
    async def check() -> None:
        async with running(world, models, stale_result_s=600.0) as system:
            full = await system.retrieve(QUERY, attribute_names=["title"], excluded_item_ids=["7"])
            await system.batch_retrieve([OTHER, {}])
            await stop_all(system)
            stale = await system.retrieve(QUERY, attribute_names=["title"], excluded_item_ids=["7"])
            assert_exact(stale, models[1], QUERY, item_ids=[i for i in models[1].item_ids if i != "7"])
            assert stale.attributes == full.attributes
            assert (stale.checkpoint_version, stale.shards_answered, stale.shards_total) == (1, 0, 2)
            assert first_reason(stale) == "stale_result"
            assert len(stale.degraded_reasons) == 3, "and why each shard did not answer"
            batch = (await system.batch_retrieve([{}, OTHER])).results
            for response, features in zip(batch, ({}, OTHER), strict=True):
                assert_exact(response, models[1], features)
            for features, fields in (
                (QUERY, {"attribute_names": ["title"]}),
                (QUERY, {"excluded_item_ids": ["7"]}),
                (QUERY, {"attribute_names": ["title"], "excluded_item_ids": ["7"], "k": 9}),
                (QUERY, {"attribute_names": ["title"], "excluded_item_ids": ["7"], "min_shards": 1}),
                (QUERY, {"attribute_names": ["title"], "excluded_item_ids": ["7"], "filter": a_filter()}),
                ({"user_id": "3"}, {}),
            ):
                assert (await status_code(system.retrieve(features, **fields)))[0] is grpc.StatusCode.UNAVAILABLE
            assert (await status_code(system.batch_retrieve([OTHER, QUERY])))[0] is grpc.StatusCode.UNAVAILABLE
            degradation = (await system.status()).degradation
            assert (degradation.num_partial, degradation.num_popular) == (0, 0)
            assert degradation.num_stale == 4

    asyncio.run(check())


def test_an_earlier_answer_of_another_version_is_never_given(world: World, models: dict[int, ToyModel]) -> None:
    async def check() -> None:
        async with running(world, models, stale_result_s=600.0) as system:
            await system.retrieve(QUERY)
            world.go_live(2)
            await system.until_live(2)
            await system.retrieve(OTHER)
            await stop_all(system)
            assert (await status_code(system.retrieve(QUERY)))[0] is grpc.StatusCode.UNAVAILABLE
            response = await system.retrieve(OTHER)
            assert (first_reason(response), response.checkpoint_version) == ("stale_result", 2)
            assert_exact(response, models[2], OTHER)

    asyncio.run(check())


def test_popular_items_are_given_to_whoever_would_take_them(world: World, models: dict[int, ToyModel]) -> None:
    async def check() -> None:
        async with running(world, models, popular_items=8) as system:
            full = await system.retrieve(QUERY)
            await stop_all(system)
            response = await system.retrieve(OTHER)
            assert list(response.item_ids) == list(full.item_ids)[:8]
            assert set(response.scores) == {0.0}
            assert len(response.scores) == 8
            assert (response.checkpoint_version, response.shards_answered, response.shards_total) == (1, 0, 2)
            assert first_reason(response) == "popular_items"
            excluded = list(full.item_ids)[:3]
            response = await system.retrieve(OTHER, k=4, excluded_item_ids=excluded)
            assert list(response.item_ids) == list(full.item_ids)[3:7]
            wants_more: Sequence[dict[str, Any]] = (
                {"min_shards": 1},
                {"attribute_names": ["title"]},
                {"filter": a_filter()},
                {"excluded_item_ids": list(full.item_ids)},
            )
            for fields in wants_more:
                assert (await status_code(system.retrieve(OTHER, **fields)))[0] is grpc.StatusCode.UNAVAILABLE
            status = await system.status()
            assert status.degradation.num_popular == 2
            [traffic] = status.traffic
            assert (traffic.num_requests, traffic.num_errors) == (7, 6), "to the gates it is an error all the same"

    asyncio.run(check())


def test_shards_that_are_late_leave_time_to_fall_back(world: World, models: dict[int, ToyModel]) -> None:
    async def check() -> None:
        async with running(world, models, popular_items=8) as system:
            await system.retrieve(QUERY)
            for shard in system.shards:
                shard.delay_s = 600.0
            assert first_reason(await system.retrieve(OTHER, timeout=2.0)) == "popular_items"

    asyncio.run(check())


def test_a_partial_answer_is_neither_remembered_nor_replaced(world: World, models: dict[int, ToyModel]) -> None:
    async def check() -> None:
        async with running(world, models, stale_result_s=600.0, popular_items=8) as system:
            await system.shards[0].stop()
            for _ in range(2):
                response = await system.retrieve(QUERY)
                assert_exact(response, models[1], QUERY, item_ids=system.shards[1].item_ids)
            await system.shards[1].stop()
            assert (await status_code(system.retrieve(QUERY)))[0] is grpc.StatusCode.UNAVAILABLE
            assert (await system.status()).degradation == query_service_pb2.DegradationStatus(num_partial=2)

    asyncio.run(check())


def test_answers_grow_old_and_the_oldest_leave_first(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    remembered = Fallback(stale_s=10.0, num_stale=2, num_popular=0)
    for number in (1, 2, 1, 3):
        remembered.remember(number, query_service_pb2.RetrieveResponse(item_ids=[str(number)]))
        clock.now_s += 4
    found = remembered.earlier(1)
    assert found is not None
    assert list(found.item_ids) == ["1"]
    assert "8 s ago" in found.degraded_reasons[0]
    assert remembered.earlier(2) is None
    clock.now_s += 4
    assert remembered.earlier(1) is None
    assert remembered.earlier(3) is not None


def test_what_is_popular_is_what_came_often_lately(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    counted = Fallback(stale_s=0.0, num_stale=1, num_popular=3)
    for version, number in ((1, 20), (2, 21)):
        for _ in range(40):
            items = [str(number), *(["common"] if version == 2 else [])]
            counted.count(version, [Ranking(items, [0.0] * len(items), [])] * 16)
    assert items_of(counted, 1) == ["20"]
    assert items_of(counted, 2) == ["21", "common"]
    clock.now_s += 61
    for _ in range(50):
        counted.count(2, [Ranking(["new"], [0.0], [])] * 16)
    assert items_of(counted, 2) == ["new", "21", "common"]
    clock.now_s += 61
    counted.count(2, [Ranking(["newer"], [0.0], [])] * 16)
    assert items_of(counted, 2) == ["new", "newer"]
    clock.now_s += 500
    counted.count(2, [Ranking(["newest"], [0.0], [])] * 16)
    assert items_of(counted, 2) == ["newest"]
    counted.count(3, [Ranking(["other"], [0.0], [])] * 16)
    assert items_of(counted, 1) == []


def items_of(counted: Fallback, version: int) -> list[str]:
    response = counted.popular(version, 5, [])
    return list(response.item_ids) if response else []


def a_filter() -> filter_pb2.Filter:
    return filter_pb2.Filter(exists=filter_pb2.Exists(attribute="title"))


class Clock:
    """A clock that a test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1000.0
        monkeypatch.setattr(fallback, "time", self)

    def monotonic(self) -> float:
        return self.now_s
