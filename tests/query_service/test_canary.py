"""The standby version answers a share of the requests: always the same ones, each as a whole, or the live one does."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from query_system import System, World, assert_exact, running, status_code, until
from retrieval.query.v1 import query_service_pb2
from toy_checkpoint import ToyModel

from query_service.canary import _serialised, is_canary
from query_service.traffic import Latencies, Traffic
from query_service.versions import Place

QUERIES: list[dict[str, Any]] = [{"user_id": str(user), "history": [str(user)]} for user in range(1, 31)]
LONG_S = 600.0

strings = st.text("ab1", max_size=2)
values = st.one_of(
    st.none(), strings, st.sampled_from([0.0, -0.0, 1.0, 1.5]), st.lists(strings, max_size=2), st.just([1.0, 2.0])
)
requests = st.lists(st.dictionaries(strings, values, max_size=3), min_size=1, max_size=2)


def canonical(queries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in query.items() if value not in (None, "", [])} for query in queries]


@given(requests, requests)
@settings(max_examples=300, deadline=None)
def test_only_equal_queries_give_equal_bytes(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> None:
    assert (_serialised(first) == _serialised(second)) == (canonical(first) == canonical(second))
    assert _serialised(first) == _serialised([dict(reversed(query.items())) for query in first])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([{"a": "bc"}], [{"ab": "c"}]),
        ([{"a": ["b", "c"]}], [{"a": ["bc"]}]),
        ([{"a": ["b"]}], [{"a": "b"}]),
        ([{"a": "1"}], [{"a": 1.0}]),
        ([{"a": "b"}, {}], [{"a": "b"}]),
        ([{"a": "b", "c": "d"}], [{"a": "b"}, {"c": "d"}]),
    ],
)
def test_values_do_not_move_from_one_place_to_the_next(
    first: list[dict[str, Any]], second: list[dict[str, Any]]
) -> None:
    assert _serialised(first) != _serialised(second)


def test_a_larger_share_has_all_that_a_smaller_one_had() -> None:
    many = [{"user_id": str(user)} for user in range(2000)]
    chosen = {share: {query["user_id"] for query in many if is_canary([query], share)} for share in (0.0, 0.1, 0.5, 1)}
    assert [len(users) for users in chosen.values()] == [0, 208, 991, 2000], "the same in every process and release"
    assert chosen[0.1] < chosen[0.5]


def test_each_query_has_its_side_and_the_traffic_is_told(world: World, models: dict[int, ToyModel]) -> None:
    share = 0.4
    expected = [2 if is_canary([query], share) else 1 for query in QUERIES]

    async def check() -> None:
        async with canarying(world, models, share) as system:
            for _ in range(2):
                for query, version in zip(QUERIES, expected, strict=True):
                    response = await system.retrieve(query)
                    assert response.checkpoint_version == version
                    assert_full(response)
                    assert_exact(response, models[version], query)
            counts = traffic(await system.status())
            assert counts == {(version, 2): (2 * expected.count(version), 0) for version in (1, 2)}
            assert all(0 < count.p50_s <= count.p99_s < LONG_S for count in (await system.status()).traffic)
            world.deploy(live=1, standby=2)
            await until(system.status, lambda status: not status.traffic)
            assert {(await system.retrieve(query)).checkpoint_version for query in QUERIES} == {1}

    asyncio.run(check())


def test_a_batch_is_of_one_version(world: World, models: dict[int, ToyModel]) -> None:
    share = 0.5
    batches = [QUERIES[start : start + 3] for start in range(20)]

    async def check() -> None:
        async with canarying(world, models, share) as system:
            seen = set()
            for batch in batches:
                version = 2 if is_canary(batch, share) else 1
                for result, query in zip((await system.batch_retrieve(batch)).results, batch, strict=True):
                    assert result.checkpoint_version == version
                    assert_exact(result, models[version], query)
                seen.add(version)
            assert seen == {1, 2}
            assert sum(num_requests for num_requests, _ in traffic(await system.status()).values()) == len(batches)

    asyncio.run(check())


def test_the_standby_version_answers_from_its_own_layout(world: World, models: dict[int, ToyModel]) -> None:
    """Of a catalogue that is re-sharded, one version has two layouts."""

    async def check() -> None:
        async with running(world, models, layouts=(2, 3)) as system:
            world.deploy(live=1, standby=1, standby_num_shards=3, canary_share=0.5)
            status = await until(system.status, lambda status: status.deployment_revision == 2)
            assert (status.live_version, status.standby_version) == (1, 1)
            for query in QUERIES:
                response = await system.retrieve(query)
                assert_full(response, 3 if is_canary([query], 0.5) else 2)
                assert_exact(response, models[1], query)
            num_canaries = sum(is_canary([query], 0.5) for query in QUERIES)
            counts = traffic(await system.status())
            assert counts == {(1, 2): (len(QUERIES) - num_canaries, 0), (1, 3): (num_canaries, 0)}

    asyncio.run(check())


def _lacks_it(system: System) -> None:
    del system.shards[3].models[2]


def _hangs(system: System) -> None:
    system.shards[3].delay_s = LONG_S


def _is_gone(system: System) -> None:
    for shard in system.shards[2:]:
        shard.failure = grpc.StatusCode.UNAVAILABLE


def _mixes_versions(system: System) -> None:
    def mix(response: Any) -> None:
        response.checkpoint_version = 1

    system.shards[4].spoil = mix


@pytest.mark.parametrize("harm", [_lacks_it, _hangs, _is_gone, _mixes_versions])
def test_where_the_standby_version_fails_the_live_one_answers_as_a_whole(
    world: World, models: dict[int, ToyModel], harm: Callable[[System], None], caplog: pytest.LogCaptureFixture
) -> None:
    async def check() -> None:
        async with canarying(world, models, 1.0, layouts=(2, 3), standby_num_shards=3) as system:
            harm(system)
            for query in QUERIES[:2]:
                # All three shards of the standby version's layout, both of the live one's.
                response = await system.retrieve(query, min_shards=3, timeout=4.0)
                assert response.checkpoint_version == 1
                assert_full(response)
                assert_exact(response, models[1], query)
            assert traffic(await system.status()) == {(1, 2): (2, 0), (2, 3): (2, 2)}
            assert caplog.text.count("version 2 fails as a canary") == 1

    asyncio.run(check())


def test_a_standby_version_that_is_not_loaded_is_an_error_of_the_canary(
    world: World, models: dict[int, ToyModel]
) -> None:
    async def check() -> None:
        async with running(world, models) as system:
            world.deploy(live=1, standby=7, canary_share=1.0)
            await until(system.status, lambda status: status.standby_version == 7)
            assert_exact(await system.retrieve(QUERIES[0]), models[1], QUERIES[0])
            world.deploy(live=1, standby=2, standby_num_shards=5, canary_share=1.0)
            await until(system.status, lambda status: status.deployment_revision == 3)
            assert traffic(await system.status()) == {}
            assert_exact(await system.retrieve(QUERIES[0]), models[1], QUERIES[0])
            assert traffic(await system.status()) == {(1, 2): (1, 0), (2, 5): (1, 1)}

    asyncio.run(check())


def test_what_is_the_callers_fault_is_no_error_of_a_version(world: World, models: dict[int, ToyModel]) -> None:
    async def check() -> None:
        async with canarying(world, models, 0.5) as system:
            for user in range(10):
                for wrong in ({"user_id": str(user), "age": 3.0}, {"user_id": [str(user)]}):
                    code, _ = await status_code(system.retrieve(wrong))
                    assert code is grpc.StatusCode.INVALID_ARGUMENT
                code, _ = await status_code(system.retrieve({"user_id": str(user)}, attribute_names=["colour"]))
                assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert traffic(await system.status()) == {}

    asyncio.run(check())


def test_what_no_version_can_answer_is_an_error_of_the_live_one(world: World, models: dict[int, ToyModel]) -> None:
    async def check() -> None:
        async with canarying(world, models, 0.5) as system:
            for shard in system.shards:
                await shard.stop()
            for query in QUERIES[:10]:
                assert (await status_code(system.retrieve(query)))[0] is grpc.StatusCode.UNAVAILABLE
            assert traffic(await system.status()) == {(1, 2): (10, 10)}

    asyncio.run(check())


def test_every_answer_of_a_canary_that_comes_and_goes_is_of_one_version(
    world: World, models: dict[int, ToyModel]
) -> None:
    seen: set[int] = set()

    async def keep_calling(system: System, number: int, is_over: asyncio.Event) -> None:
        while not is_over.is_set():
            number = (number + 7) % len(QUERIES)
            response = await system.retrieve(QUERIES[number])
            assert_full(response)
            assert_exact(response, models[response.checkpoint_version], QUERIES[number])
            seen.add(response.checkpoint_version)

    async def check() -> None:
        async with canarying(world, models, 0.0) as system:
            is_over = asyncio.Event()
            callers = [asyncio.create_task(keep_calling(system, number, is_over)) for number in range(6)]
            for _ in range(4):
                for live, share in ((1, 0.5), (1, 0.0), (2, 0.5), (2, 0.9)):
                    world.deploy(live=live, standby=3 - live, canary_share=share)
                    seen.clear()
                    expected = {1, 2} if share else {live}
                    await until(lambda: asyncio.sleep(0, set(seen)), lambda seen, expected=expected: seen >= expected)
            is_over.set()
            await asyncio.gather(*callers)

    asyncio.run(check())


def test_quantiles_are_right_within_three_percent() -> None:
    latencies = Latencies()
    assert latencies.quantile_s(0.5) == 0.0
    for milliseconds in range(1, 1001):
        latencies.add(milliseconds / 1000)
    for share in (0.001, 0.01, 0.5, 0.9, 0.99, 1.0):
        assert latencies.quantile_s(share) == pytest.approx(share, rel=0.03)
    for extreme in (0.0, 1e-9, 1e9):
        latencies.add(extreme)
    assert latencies.quantile_s(0.0001) == pytest.approx(1e-5, rel=0.05)
    assert latencies.quantile_s(1.0) == pytest.approx(1e3, rel=0.05)


def test_a_request_counts_under_the_record_that_it_began_under() -> None:
    traffic = Traffic()
    before = traffic.under(1)
    assert traffic.under(1) is before
    after = traffic.under(2)
    before.count(Place(1, 2), 0.1, is_error=True)
    assert (after.counts, after.num_errors(Place(1, 2))) == ({}, 0)
    assert traffic.under(2) is after


@asynccontextmanager
async def canarying(
    world: World,
    models: dict[int, ToyModel],
    share: float,
    *,
    layouts: Sequence[int] = (2,),
    standby_num_shards: int | None = None,
) -> AsyncIterator[System]:
    """A system with both towers loaded, of which version 2 answers a share."""
    world.deploy(live=1, standby=2, canary_share=share, standby_num_shards=standby_num_shards)
    available = query_service_pb2.TOWER_STATE_AVAILABLE
    async with running(world, models, layouts=layouts) as system:
        await until(system.status, lambda status: [tower.state for tower in status.towers] == [available] * 2)
        yield system


def traffic(status: Any) -> dict[tuple[int, int], tuple[int, int]]:
    """Requests and errors by version and layout."""
    return {
        (count.checkpoint_version, count.num_shards): (count.num_requests, count.num_errors) for count in status.traffic
    }


def assert_full(response: Any, num_shards: int = 2) -> None:
    assert (response.shards_answered, response.shards_total) == (num_shards, num_shards)
    assert not response.degraded_reasons
