"""The service in a process of its own, with real shards: dying, stopping, swapping, draining."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from exact_shard import ExactShard
from grpc_health.v1 import health_pb2, health_pb2_grpc
from query_system import World, query_of, until
from retrieval.index.v1 import index_service_pb2, index_service_pb2_grpc
from retrieval.query.v1 import query_service_pb2, query_service_pb2_grpc
from service_process import PATIENCE_S, ServiceProcess, free_port
from toy_checkpoint import ToyModel, toy_items
from valkey_server import ValkeyServer

from retrieval_client import AsyncRetrievalClient, Retrieval, RetrievalClient
from towers.catalogue import Catalogue

INDEX_SERVICE = "retrieval.index.v1.IndexService"
QUERY_SERVICE = "retrieval.query.v1.QueryService"
QUERIES: list[dict[str, Any]] = [
    {"user_id": "1", "history": ["3", "4", "5"]},
    {"user_id": "2"},
    {"history": ["9", "nothing"]},
    {},
]


@pytest.fixture
def shards(world: World) -> Iterator[list[ServiceProcess]]:
    """Two real shards, ready."""
    Catalogue(world.store).upsert(toy_items())
    with ExitStack() as running:
        settings = ({"STORE": world.store.url, "SHARD": f"{number}/2"} for number in range(2))
        started = [running.enter_context(ServiceProcess("index", INDEX_SERVICE, each)) for each in settings]
        for shard in started:
            shard.until_ready()
        yield started


@pytest.fixture
def service(world: World, shards: list[ServiceProcess], valkey: ValkeyServer) -> Iterator[ServiceProcess]:
    """The query service, ready."""
    addresses = ",".join(shard.address for shard in shards)
    settings = {"STORE": world.store.url, "SHARDS": addresses, "REDIS_URL": valkey.url, "CACHE_TIMEOUT_S": 1}
    with ServiceProcess("query", QUERY_SERVICE, settings) as process:
        process.until_ready()
        yield process


def assert_exact(answer: Retrieval, models: dict[int, ToyModel], features: dict[str, Any], k: int = 10) -> None:
    model = models[answer.checkpoint_version]
    item_ids, scores = model.nearest(features, model.item_ids, k)
    assert [item.item_id for item in answer.items] == item_ids
    assert np.abs(np.array([item.score for item in answer.items]) - scores).max() <= 1e-5
    assert (answer.shards_answered, answer.shards_total, answer.degraded_reasons) == (2, 2, ())


def until_true(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.02)


def test_the_whole_path_with_real_shards(
    service: ServiceProcess, shards: list[ServiceProcess], world: World, models: dict[int, ToyModel]
) -> None:
    titles = {row["item_id"]: row["title"] for row in toy_items().to_pylist()}
    with RetrievalClient(service.address, timeout_s=PATIENCE_S) as client:
        # The health of a shard speaks of its live version; the other one may still be on its way.
        for features in QUERIES:
            answer = client.retrieve(features, k=10, attribute_names=["title"])
            assert_exact(answer, models, features)
            assert answer.checkpoint_version == 1
            assert all(item.attributes == {"title": titles[item.item_id]} for item in answer.items)
        for answer, features in zip(client.batch_retrieve(QUERIES, k=7), QUERIES, strict=True):
            assert_exact(answer, models, features, 7)
        until_true(lambda: client.retrieve(QUERIES[0], k=1).embedding_cached)
        assert_exact(client.retrieve(QUERIES[0]), models, QUERIES[0])

        dies_and_comes_back(client, shards[1], models)
        stops_and_goes_on(client, shards[0], models)
        swaps(client, shards, world, models)
    asyncio.run(the_same_for_asyncio(service, models))
    imports_neither_torch_nor_faiss(service)


def dies_and_comes_back(client: RetrievalClient, shard: ServiceProcess, models: dict[int, ToyModel]) -> None:
    shard.signal(signal.SIGKILL)
    assert shard.exit_code() == -signal.SIGKILL
    answer = client.retrieve(QUERIES[0])
    assert (answer.shards_answered, answer.shards_total) == (1, 2)
    assert answer.degraded_reasons == (f"shard 1 ({shard.address}): UNAVAILABLE",)
    assert len(answer.items) == 10
    shard.start()
    until_true(lambda: client.retrieve(QUERIES[0]).shards_answered == 2)
    assert_exact(client.retrieve(QUERIES[0]), models, QUERIES[0])


def stops_and_goes_on(client: RetrievalClient, shard: ServiceProcess, models: dict[int, ToyModel]) -> None:
    shard.signal(signal.SIGSTOP)
    # That there is an answer at all says that it came before the deadline.
    answer = client.retrieve(QUERIES[0], timeout_s=4.0)
    assert (answer.shards_answered, answer.shards_total) == (1, 2)
    assert answer.degraded_reasons == (f"shard 0 ({shard.address}): DEADLINE_EXCEEDED",)
    shard.signal(signal.SIGCONT)
    until_true(lambda: client.retrieve(QUERIES[0]).shards_answered == 2)
    assert_exact(client.retrieve(QUERIES[0]), models, QUERIES[0])


def swaps(client: RetrievalClient, shards: list[ServiceProcess], world: World, models: dict[int, ToyModel]) -> None:
    for shard in shards:
        with grpc.insecure_channel(shard.address) as channel:
            stub = index_service_pb2_grpc.IndexServiceStub(channel)
            until_true(lambda stub=stub: has_both_versions(stub))
    until_true(lambda: all(tower.state == "available" for tower in client.get_status().towers))
    world.deploy(live=2, standby=1)
    until_true(lambda: client.get_status().live_version == 2)
    for features in QUERIES:
        answer = client.retrieve(features)
        assert answer.checkpoint_version == 2
        assert_exact(answer, models, features)


async def the_same_for_asyncio(service: ServiceProcess, models: dict[int, ToyModel]) -> None:
    async with AsyncRetrievalClient(service.address, timeout_s=PATIENCE_S) as client:
        for answer, features in zip(await client.batch_retrieve(QUERIES, k=7), QUERIES, strict=True):
            assert_exact(answer, models, features, 7)
        assert_exact(await client.retrieve(QUERIES[0]), models, QUERIES[0])
        embeddings = await client.embed(QUERIES)
        assert np.abs(np.array(embeddings.vectors) - models[2].query_embeddings(QUERIES)).max() <= 1e-6


def has_both_versions(stub: index_service_pb2_grpc.IndexServiceStub) -> bool:
    answer = stub.GetShardStatus(index_service_pb2.GetShardStatusRequest(), timeout=PATIENCE_S)
    return [version.state for version in answer.versions] == [index_service_pb2.VERSION_STATE_AVAILABLE] * 2


def imports_neither_torch_nor_faiss(service: ServiceProcess) -> None:
    mapped = Path(f"/proc/{service.pid}/maps").read_text()
    assert "onnxruntime" in mapped
    assert "torch" not in mapped
    assert "faiss" not in mapped


def test_importing_the_service_imports_nothing_of_training_indexes_or_the_catalogue() -> None:
    modules = {"torch", "faiss", "deltalake", "pyarrow", "onnxruntime"}
    code = f"import sys, query_service.serve; print({modules} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "{'onnxruntime'}"


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_a_drain_fails_no_call(world: World, models: dict[int, ToyModel], number: signal.Signals, workers: int) -> None:
    """Callers go by the health service, as load balancers do; calls in flight take longer than the drain."""
    is_told_to_stop = False

    async def is_serving(channel: grpc.aio.Channel) -> bool:
        request = health_pb2.HealthCheckRequest(service=QUERY_SERVICE)
        try:
            answer = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=PATIENCE_S)
        except grpc.aio.AioRpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    async def keep_calling(channel: grpc.aio.Channel) -> int:
        num_answers = 0
        while await is_serving(channel):
            request = query_service_pb2.RetrieveRequest(query=query_of(QUERIES[0]), k=5)
            stub = query_service_pb2_grpc.QueryServiceStub(channel)
            response = await stub.Retrieve(request, timeout=PATIENCE_S)
            assert response.shards_answered == 2
            num_answers += 1
        assert is_told_to_stop
        return num_answers

    async def check() -> None:
        nonlocal is_told_to_stop
        async with ExactShard(0, 2, models) as first, ExactShard(1, 2, models) as second:
            first.delay_s = second.delay_s = 1.2
            addresses = f"{first.address},{second.address}"
            settings = {"STORE": world.store.url, "SHARDS": addresses, "DRAIN_S": 1, "GRACE_S": PATIENCE_S}
            settings["WORKERS"] = workers
            with ServiceProcess("query", QUERY_SERVICE, settings) as process:
                await asyncio.to_thread(process.until_ready)
                async with grpc.aio.insecure_channel(process.address) as channel:
                    callers = [asyncio.create_task(keep_calling(channel)) for _ in range(8)]
                    await until(lambda: asyncio.sleep(0, first.num_calls), lambda calls: calls >= 10)
                    is_told_to_stop = True
                    process.signal(number)
                    assert min(await asyncio.gather(*callers)) > 0
                assert await asyncio.to_thread(process.exit_code) == 0
                assert "Traceback" not in process.log

    asyncio.run(check())


def test_wrong_settings_end_with_exit_code_2_and_words() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TWOTOWER_")}
    environment |= {"TWOTOWER_SHARDS": "one", "REDIS_URL": "http://cache"}
    result = subprocess.run(
        [sys.executable, "-m", "cli.main", "serve", "query"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert "TWOTOWER_STORE is not set" in result.stderr
    assert "TWOTOWER_SHARDS: 'one' is not host:port" in result.stderr
    assert "REDIS_URL: must start with" in result.stderr
    assert "Traceback" not in result.stderr


def test_an_address_in_use_ends_with_exit_code_2_and_words(world: World) -> None:
    settings = {"STORE": world.store.url, "SHARDS": f"127.0.0.1:{free_port()}"}
    with ServiceProcess("query", QUERY_SERVICE, settings) as first:
        first.until_ready()
        second = ServiceProcess("query", QUERY_SERVICE, settings)
        second.address = first.address
        with second:
            assert second.exit_code() == 2
            assert f"cannot listen on {first.address}" in second.log
            assert "Traceback" not in second.log
