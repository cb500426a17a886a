"""Statuses over real gRPC: what replicas say arrives whole; replicas that do not answer are named."""

import asyncio
from collections.abc import Sequence

import grpc
import pytest
from fleets import load
from scripted_services import ScriptedReplica, ScriptedServices, scripted_services, serve_query_service

from rollout.fleet import Fleet, Replica, SearchSetting, Shadow, State, Traffic
from rollout.gates import Outcome, replicas_available
from rollout.statuses import StatusCollector
from towers.deployment import Slot


async def collect(services: ScriptedServices, shards: list[str] | None = None, timeout_s: float = 5.0) -> Fleet:
    layouts = services.layouts if shards is None else (tuple((address,) for address in shards),)
    async with StatusCollector(layouts, [services.query_service.address], timeout_s) as collector:
        return await collector.collect()


@pytest.mark.parametrize("state", list(State))
def test_all_of_a_shards_answer_arrives(state: State) -> None:
    said = load(
        7,
        state,
        reason="because",
        is_corrupt=True,
        progress=0.25,
        golden_difference=0.5,
        num_quarantined=3,
        index_type="IVF64,SQ8",
        catalogue_version="1.2",
        built_catalogue_version="1.1",
        num_delta_items=4,
        num_tombstones=5,
        size_bytes=6,
        is_from_store=True,
        search_settings=(SearchSetting(10, "nprobe=4", 0.97, 1e-4), SearchSetting(100, "nprobe=8", 0.96, 2e-4)),
        target_recall=0.95,
        target_k=100,
        measured_with="validation queries",
        item_similarity=0.1,
        score_mean=0.2,
        score_deviation=0.3,
    )

    async def scenario() -> None:
        async with scripted_services() as services:
            services.shards[1].loads = [said, load(8)]
            fleet = await collect(services)
            assert [shard.loads for shard in fleet.shards] == [[], [said, load(8)]]
            assert [shard.name for shard in fleet.shards] == [
                f"shard {number}/2 at {shard.address}" for number, shard in enumerate(services.shards)
            ]
            assert {shard.deployment_revision for shard in fleet.shards} == {3}

    asyncio.run(scenario())


@pytest.mark.parametrize("state", [State.UNKNOWN, State.LOADING, State.AVAILABLE, State.FAILED])
def test_all_of_a_query_services_answer_arrives(state: State) -> None:
    said = load(
        7,
        state,
        reason="because",
        is_corrupt=True,
        golden_difference=0.5,
        num_items=0,
        index_type="",
        item_similarity=0,
        score_deviation=0,
    )

    async def scenario() -> None:
        async with scripted_services() as services:
            services.query_service.loads = [said]
            services.query_service.shadow = shadow = Shadow(2, 1, 3, 4, 0.5, 0.6, 0.7, 0.8, 0.9)
            services.query_service.traffic = traffic = [Traffic(1, 2, 2, 1, 0.4, 0.5), Traffic(2, 3, 7, 0, 0.1, 0.2)]
            (replica,) = (await collect(services)).query_services
            assert (replica.loads, replica.error, replica.deployment_revision) == ([said], "", 3)
            assert (replica.shadow, replica.traffic, replica.layouts) == (shadow, traffic, {2, 3})
            assert replica.name == f"query service at {services.query_service.address}"

    asyncio.run(scenario())


def test_each_worker_of_a_query_service_is_a_replica() -> None:
    async def scenario() -> None:
        async with scripted_services() as services:
            services.say(load(1))
            service = services.query_service
            first, second = ScriptedReplica(loads=[load(2)]), ScriptedReplica(loads=[load(2)])
            second.failure = grpc.StatusCode.UNAVAILABLE
            first.traffic = second.traffic = [Traffic(2, 2, 5, 1, 1.0, 2.0)]
            service.workers = [first, second]
            fleet = await collect(services)
            assert [replica.name for replica in fleet.query_services] == [
                f"worker {number} of the query service at {service.address}" for number in (0, 1)
            ]
            assert [(replica.serves(2), replica.error) for replica in fleet.query_services] == [
                (True, ""),
                (False, "is not reachable"),
            ]
            waiting = replicas_available(2, Fleet([], fleet.query_services))
            assert waiting.outcome is Outcome.WAIT
            assert f"worker 1 of the query service at {service.address} is not reachable" in waiting.explanation

            second.failure = None
            fleet = await collect(services)
            assert all(replica.serves(2) for replica in fleet.query_services)
            assert fleet.traffic_of(Slot(2, 2), 3) == Traffic(2, 2, 10, 2, 1.0, 2.0), "of all workers together"

    asyncio.run(scenario())


def test_replicas_that_do_not_answer_are_named_and_delay_nobody_else() -> None:
    async def scenario() -> None:
        async with scripted_services() as services:
            services.say(load(1))
            services.shards[0].delay_s = 60.0
            services.shards[1].failure = grpc.StatusCode.INTERNAL
            fleet = await collect(services, timeout_s=0.5)
            assert [shard.error for shard in fleet.shards] == [
                "does not answer in time",
                "answers INTERNAL: as scripted",
            ]
            assert fleet.query_services[0].serves(1)

    asyncio.run(scenario())


def test_a_replica_that_is_away_is_seen_again_when_it_is_back() -> None:
    async def scenario() -> None:
        async with scripted_services() as services:
            address = services.query_service.address
        async with StatusCollector((), [address]) as collector:
            assert (await collector.collect()).query_services[0].error == "is not reachable"
            async with serve_query_service(ScriptedReplica(loads=[load(1)]), address):
                for _ in range(100):
                    replica = (await collector.collect()).query_services[0]
                    if not replica.error:
                        break
                    await asyncio.sleep(0.1)
                assert replica.serves(1)

    asyncio.run(scenario())


def test_shards_in_the_wrong_order_are_noticed() -> None:
    async def scenario() -> None:
        async with scripted_services() as services:
            services.say(load(1))
            fleet = await collect(services, [shard.address for shard in services.shards[::-1]])
            assert "says it is shard 1 of 2, not 0 of 2" in fleet.shards[0].error
            assert "says it is shard 0 of 2, not 1 of 2" in fleet.shards[1].error
            assert not any(shard.serves(1) for shard in fleet.shards)
            too_few = await collect(services, [services.shards[0].address])
            assert "says it is shard 0 of 2, not 0 of 1" in too_few.shards[0].error

    asyncio.run(scenario())


def test_replicas_and_layouts_are_all_asked() -> None:
    async def scenario() -> None:
        async with scripted_services(num_replicas=2, more_shards=3) as services:
            services.say(load(1))
            services.shards[1].failure = grpc.StatusCode.INTERNAL
            fleet = await collect(services)
            assert [shard.title for shard in fleet.shards] == [
                f"shard {title}" for title in ("0/2", "0/2", "1/2", "1/2", "0/3", "1/3", "2/3")
            ]
            assert [shard.error != "" for shard in fleet.shards] == [False, True, False, False, False, False, False]
            assert len(fleet.on(None).shards) == len(fleet.on(2).shards) == 4
            assert {shard.num_shards for shard in fleet.on(3).shards} == {3}
            assert fleet.on(5) == Fleet((), fleet.query_services)
            assert fleet.query_services[0].shadow is None

    asyncio.run(scenario())


def asked(*shadows: Shadow | None, revision: int = 1, traffic: Sequence[Traffic] = ()) -> Fleet:
    """Query services alone."""
    return Fleet(
        (),
        [
            Replica("query service", "a:1", deployment_revision=revision, shadow=shadow, traffic=traffic)
            for shadow in shadows
        ],
    )


def test_figures_of_all_query_services_are_taken_together() -> None:
    fleet = asked(
        Shadow(2, 1, 30, 1, 0.9, 1.0, 2.0, 3.0, 4.0),
        None,
        Shadow(2, 1, 10, 2, 0.5, 5.0, 6.0, 7.0, 8.0),
        Shadow(3, 1, 99, 9, 0.1, 9.0, 9.0, 9.0, 9.0),
    )
    assert fleet.shadow_of(2, 1) == Shadow(2, 1, 40, 3, 0.8, 2.0, 3.0, 4.0, 5.0)
    assert fleet.shadow_of(4, 1) is None
    assert asked(Shadow(2, 1, 0, 2, 0, 0, 0, 0, 0)).shadow_of(2, 1) == Shadow(2, 1, 0, 2, 0, 0, 0, 0, 0)


def test_traffic_of_another_record_or_layout_does_not_count() -> None:
    fast, slow = Traffic(2, 4, 30, 1, 1.0, 2.0), Traffic(2, 4, 10, 2, 5.0, 6.0)
    replicas = [
        *asked(None, traffic=[fast, Traffic(1, 2, 7, 0, 1.0, 1.0), Traffic(2, 2, 5, 0, 1.0, 1.0)]).query_services,
        *asked(None, traffic=[slow]).query_services,
        *asked(None, revision=9, traffic=[Traffic(2, 4, 99, 9, 9.0, 9.0)]).query_services,
    ]
    fleet = Fleet([Replica("shard", "a:2", 0, 2)], replicas)
    assert fleet.traffic_of(Slot(2, 4), 1) == Traffic(2, 4, 40, 3, 2.0, 3.0)
    assert fleet.traffic_of(Slot(2, None), 1) == Traffic(2, 2, 5, 0, 1.0, 1.0), "None is the first layout"
    assert fleet.traffic_of(Slot(1, None), 1) == Traffic(1, 2, 7, 0, 1.0, 1.0)
    assert fleet.traffic_of(Slot(5, 4), 1) == Traffic(5, 4, 0, 0, 0.0, 0.0)
