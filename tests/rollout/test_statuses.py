"""Statuses over real gRPC: what replicas say arrives whole; replicas that do not answer are named."""

import asyncio

import grpc
import pytest
from fleets import load
from scripted_services import ScriptedReplica, ScriptedServices, scripted_services, serve_query_service

from rollout.fleet import Fleet, State
from rollout.statuses import StatusCollector


async def collect(services: ScriptedServices, shards: list[str] | None = None, timeout_s: float = 5.0) -> Fleet:
    addresses = services.shard_addresses if shards is None else shards
    async with StatusCollector(addresses, [services.query_service.address], timeout_s) as collector:
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
        index_type="Flat",
        catalogue_version="1.2",
    )

    async def scenario() -> None:
        async with scripted_services() as services:
            services.shards[1].loads = [said, load(8)]
            fleet = await collect(services)
            assert [shard.loads for shard in fleet.shards] == [[], [said, load(8)]]
            assert [shard.name for shard in fleet.shards] == [
                f"shard {number} at {address}" for number, address in enumerate(services.shard_addresses)
            ]
            assert {shard.deployment_revision for shard in fleet.shards} == {3}

    asyncio.run(scenario())


@pytest.mark.parametrize("state", [State.UNKNOWN, State.LOADING, State.AVAILABLE, State.FAILED])
def test_all_of_a_query_services_answer_arrives(state: State) -> None:
    said = load(7, state, reason="because", is_corrupt=True, golden_difference=0.5, num_items=0)

    async def scenario() -> None:
        async with scripted_services() as services:
            services.query_service.loads = [said]
            (replica,) = (await collect(services)).query_services
            assert (replica.loads, replica.error, replica.deployment_revision) == ([said], "", 3)
            assert replica.name == f"query service at {services.query_service.address}"

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
        async with StatusCollector([], [address]) as collector:
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
            fleet = await collect(services, services.shard_addresses[::-1])
            assert "says it is shard 1 of 2, not 0 of 2" in fleet.shards[0].error
            assert "says it is shard 0 of 2, not 1 of 2" in fleet.shards[1].error
            assert not any(shard.serves(1) for shard in fleet.shards)
            too_few = await collect(services, services.shard_addresses[:1])
            assert "says it is shard 0 of 2, not 0 of 1" in too_few.shards[0].error

    asyncio.run(scenario())
