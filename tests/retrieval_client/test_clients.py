"""Both clients against a real gRPC server: answers, errors, deadlines, retries, reconnecting."""

import asyncio
import copy
import inspect
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from retrieval.feature.v1 import feature_pb2
from retrieval.query.v1 import query_service_pb2
from scripted_service import ScriptedService, empty, failing, slow

import retrieval_client
from retrieval_client import (
    AsyncRetrievalClient,
    CacheStatus,
    DeadlineExceededError,
    Embeddings,
    InvalidRequestError,
    OverloadedError,
    QueryFeature,
    Retrieval,
    RetrievalClient,
    RetrievalError,
    RetrievedItem,
    ServiceStatus,
    ShadowStatus,
    ShardConnection,
    TowerStatus,
    UnavailableError,
    VersionTraffic,
    WorkerStatus,
)

PATIENCE_S = 30.0


def call_sync(address: str, method: str, *args: Any, client_timeout_s: float = PATIENCE_S, **fields: Any) -> Any:
    with RetrievalClient(address, timeout_s=client_timeout_s) as client:
        return getattr(client, method)(*args, **fields)


def call_async(address: str, method: str, *args: Any, client_timeout_s: float = PATIENCE_S, **fields: Any) -> Any:
    async def call() -> Any:
        async with AsyncRetrievalClient(address, timeout_s=client_timeout_s) as client:
            return await getattr(client, method)(*args, **fields)

    return asyncio.run(call())


@pytest.fixture(params=[call_sync, call_async], ids=["sync", "async"])
def call(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Makes one call with a client of its own."""
    function: Callable[..., Any] = request.param
    return function


def test_columns_become_items(call: Callable[..., Any]) -> None:
    value = feature_pb2.FeatureValue
    response = query_service_pb2.RetrieveResponse(
        item_ids=["50", "181"],
        scores=[0.5, 0.25],
        attributes=[
            feature_pb2.AttributeColumn(name="title", values=[value(string_value="Star Wars"), value()]),
            feature_pb2.AttributeColumn(name="year", values=[value(number_value=1977), value(number_value=1983)]),
            feature_pb2.AttributeColumn(
                name="genres",
                values=[value(string_list=feature_pb2.StringList(values=["Action", "War"])), value()],
            ),
            feature_pb2.AttributeColumn(
                name="vector", values=[value(number_list=feature_pb2.NumberList(values=[1, 2])), value()]
            ),
        ],
        checkpoint_version=3,
        shards_answered=1,
        shards_total=2,
        degraded_reasons=["shard 1 (host:1): UNAVAILABLE"],
        embedding_cached=True,
    )
    first = {"title": "Star Wars", "year": 1977.0, "genres": ("Action", "War"), "vector": (1.0, 2.0)}
    second = {"title": None, "year": 1983.0, "genres": None, "vector": None}
    expected = Retrieval(
        items=(RetrievedItem("50", 0.5, first), RetrievedItem("181", 0.25, second)),
        checkpoint_version=3,
        shards_answered=1,
        shards_total=2,
        degraded_reasons=("shard 1 (host:1): UNAVAILABLE",),
        embedding_cached=True,
    )
    with ScriptedService(lambda request, context: response) as service:
        fields = {"excluded_item_ids": ["1"], "min_shards": 1, "attribute_names": ["title", "year"]}
        assert call(service.address, "retrieve", {"user_id": "42"}, 2, **fields) == expected
        [request] = service.requests
        assert request.query.features["user_id"].string_value == "42"
        assert (request.k, request.min_shards) == (2, 1)
        assert (list(request.excluded_item_ids), list(request.attribute_names)) == (["1"], ["title", "year"])

        batch = query_service_pb2.BatchRetrieveResponse(results=[response, response])
        service.script = lambda request, context: batch
        assert call(service.address, "batch_retrieve", [{}, {}], k=2) == (expected, expected)


def test_items_without_attributes(call: Callable[..., Any]) -> None:
    response = query_service_pb2.RetrieveResponse(item_ids=["50"], scores=[0.5], checkpoint_version=1)
    with ScriptedService(lambda request, context: response) as service:
        assert call(service.address, "retrieve", {}).items == (RetrievedItem("50", 0.5, {}),)
        assert service.requests[0].k == 10


def test_embeddings_are_rows_of_floats(call: Callable[..., Any]) -> None:
    response = query_service_pb2.EmbedResponse(embeddings=struct.pack("<6f", *range(6)), dim=3, checkpoint_version=2)
    with ScriptedService(lambda request, context: response) as service:
        expected = Embeddings(vectors=((0.0, 1.0, 2.0), (3.0, 4.0, 5.0)), checkpoint_version=2)
        assert call(service.address, "embed", [{}, {}]) == expected


def test_the_status_is_typed(call: Callable[..., Any]) -> None:
    response = query_service_pb2.GetStatusResponse(
        deployment_revision=4,
        live_version=2,
        towers=[
            query_service_pb2.TowerStatus(
                checkpoint_version=2, state=query_service_pb2.TOWER_STATE_AVAILABLE, golden_difference=0.5
            ),
            query_service_pb2.TowerStatus(
                checkpoint_version=3, state=query_service_pb2.TOWER_STATE_FAILED, reason="torn", is_corrupt=True
            ),
        ],
        shards=[query_service_pb2.ShardConnection(shard=0, address="host:1", reachable=True, num_shards=2)],
        cache=query_service_pb2.CacheStatus(enabled=True, reachable=False, hits=1, misses=2, errors=3),
        features=[query_service_pb2.QueryFeature(name="user_id", kind="categorical")],
        shadow=query_service_pb2.ShadowStatus(
            checkpoint_version=3,
            live_version=2,
            num_queries=5,
            num_errors=1,
            mean_overlap=0.5,
            live_p50_s=0.25,
            live_p99_s=0.75,
            standby_p50_s=1.25,
            standby_p99_s=1.75,
        ),
        traffic=[
            query_service_pb2.VersionTraffic(
                checkpoint_version=2, num_shards=4, num_requests=9, num_errors=1, p50_s=0.25, p99_s=0.5
            )
        ],
        workers=[
            query_service_pb2.WorkerStatus(worker=0, status=query_service_pb2.GetStatusResponse(live_version=2)),
            query_service_pb2.WorkerStatus(worker=1, error="is not reachable"),
        ],
    )
    expected = ServiceStatus(
        deployment_revision=4,
        live_version=2,
        standby_version=None,
        towers=(TowerStatus(2, "available", "", False, 0.5), TowerStatus(3, "failed", "torn", True, 0.0)),
        shards=(ShardConnection(0, "host:1", True, 2),),
        cache=CacheStatus(enabled=True, reachable=False, hits=1, misses=2, errors=3),
        features=(QueryFeature("user_id", "categorical"),),
        shadow=ShadowStatus(3, 2, 5, 1, 0.5, 0.25, 0.75, 1.25, 1.75),
        traffic=(VersionTraffic(2, 4, 9, 1, 0.25, 0.5),),
        workers=(),
    )
    with ScriptedService(lambda request, context: response) as service:
        status = call(service.address, "get_status")
    first, second = status.workers
    assert replace(status, workers=()) == expected
    assert (first.worker, first.status.live_version, first.error) == (0, 2, "")
    assert second == WorkerStatus(1, None, "is not reachable")


def test_connections_of_one_client_are_used_in_turn() -> None:
    peers: list[str] = []

    def answer(request: Any, context: grpc.ServicerContext) -> query_service_pb2.EmbedResponse:
        peers.append(context.peer())
        return query_service_pb2.EmbedResponse(embeddings=bytes(4), dim=1)

    async def three_times(address: str) -> None:
        async with AsyncRetrievalClient(address, num_connections=2) as client:
            for _ in range(3):
                await client.embed([{}])

    with ScriptedService(answer) as service:
        with RetrievalClient(service.address, num_connections=2) as client:
            for _ in range(3):
                client.embed([{}])
        asyncio.run(three_times(service.address))
    assert len(set(peers)) == 4
    assert (peers[0], peers[3]) == (peers[2], peers[5])
    with pytest.raises(ValueError, match="num_connections = 0: give at least 1"):
        RetrievalClient("127.0.0.1:1", num_connections=0)


def test_of_several_replicas_only_those_that_are_ready_are_asked(call: Callable[..., Any]) -> None:
    def answering(number: int) -> Callable[..., Any]:
        def answer(request: Any, context: grpc.ServicerContext) -> Any:
            if isinstance(request, query_service_pb2.GetStatusRequest):
                return query_service_pb2.GetStatusResponse()
            return query_service_pb2.RetrieveResponse(checkpoint_version=number)

        return answer

    def answered(times: int = 6) -> set[int]:
        return {call(address, "retrieve", {}).checkpoint_version for _ in range(times)}

    with ScriptedService(answering(1)) as first, ScriptedService(answering(2)) as second:
        address = f"ipv4:{first.address},{second.address}"
        first.set_ready(True)
        second.set_ready(False)
        assert answered() == {1}
        first.set_ready(False)
        with pytest.raises(UnavailableError):
            answered()
        # How they are is asked of any, ready or not.
        assert call(address, "get_status").live_version is None
        second.set_ready(True)
        assert answered() == {2}


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidRequestError),
        (grpc.StatusCode.UNAVAILABLE, UnavailableError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, DeadlineExceededError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, OverloadedError),
        (grpc.StatusCode.FAILED_PRECONDITION, RetrievalError),
        (grpc.StatusCode.INTERNAL, RetrievalError),
        (grpc.StatusCode.CANCELLED, RetrievalError),
    ],
)
def test_every_status_is_an_error_with_code_and_message(
    call: Callable[..., Any], status: grpc.StatusCode, kind: type[RetrievalError]
) -> None:
    with ScriptedService(failing(status, "what is wrong")) as service:
        for method, args in (
            ("retrieve", ({},)),
            ("batch_retrieve", ([{}],)),
            ("embed", ([{}],)),
            ("get_status", ()),
        ):
            with pytest.raises(RetrievalError) as caught:
                call(service.address, method, *args)
            assert type(caught.value) is kind
            assert (caught.value.code, caught.value.message) == (status.name, "what is wrong")
            assert str(caught.value) == f"{status.name}: what is wrong"


def test_errors_can_be_copied() -> None:
    copied = copy.copy(UnavailableError("UNAVAILABLE", "no shard"))
    assert type(copied) is UnavailableError
    assert (copied.code, copied.message) == ("UNAVAILABLE", "no shard")


@pytest.mark.parametrize("status", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED])
def test_what_may_pass_is_tried_twice_more(call: Callable[..., Any], status: grpc.StatusCode) -> None:
    with ScriptedService(failing(status, "busy", num_times=2)) as service:
        assert call(service.address, "retrieve", {}).items == ()
        assert len(service.requests) == 3
        service.script = failing(status, "busy", num_times=3)
        with pytest.raises(RetrievalError) as caught:
            call(service.address, "retrieve", {})
        assert caught.value.code == status.name
        assert len(service.requests) == 6


def test_second_attempts_stop_while_everything_fails() -> None:
    with (
        ScriptedService(failing(grpc.StatusCode.UNAVAILABLE, "down")) as service,
        RetrievalClient(service.address, timeout_s=PATIENCE_S) as client,
    ):
        for _ in range(30):
            with pytest.raises(UnavailableError):
                client.retrieve({})
        assert 30 <= len(service.requests) < 50


def test_replicas_behind_one_name_take_turns() -> None:
    with ScriptedService(empty) as first, ScriptedService(empty) as second:
        both = f"ipv4:{first.address},{second.address}"
        with RetrievalClient(both, timeout_s=PATIENCE_S) as client:
            while not (first.requests and second.requests):
                client.retrieve({})
            first.stop()
            for _ in range(5):
                client.retrieve({})
            first.start()


def test_a_wrong_request_is_not_tried_again(call: Callable[..., Any]) -> None:
    with ScriptedService(failing(grpc.StatusCode.INVALID_ARGUMENT, "k must be from 1")) as service:
        with pytest.raises(InvalidRequestError):
            call(service.address, "retrieve", {}, k=0)
        assert len(service.requests) == 1


def test_nobody_listens(call: Callable[..., Any]) -> None:
    service = ScriptedService(empty)
    service.start()
    service.stop()
    with pytest.raises(UnavailableError):
        call(service.address, "retrieve", {})


def test_deadlines_of_the_client_and_of_a_call(call: Callable[..., Any]) -> None:
    with ScriptedService(slow(0.5)) as service:
        with pytest.raises(DeadlineExceededError):
            call(service.address, "retrieve", {}, client_timeout_s=0.1)
        with pytest.raises(DeadlineExceededError):
            call(service.address, "retrieve", {}, timeout_s=0.1)
        assert call(service.address, "retrieve", {}, client_timeout_s=0.1, timeout_s=PATIENCE_S).items == ()
        assert service.timeouts_s[-1] > PATIENCE_S / 2, "the service is told the deadline"
        with pytest.raises(DeadlineExceededError):
            call(service.address, "retrieve", {}, timeout_s=0)


def test_wrong_values_are_refused_before_any_call(call: Callable[..., Any]) -> None:
    with ScriptedService(empty) as service:
        with pytest.raises(ValueError, match="feature 'age': expected a finite number, got nan"):
            call(service.address, "retrieve", {"age": float("nan")})
        with pytest.raises(TypeError, match="query 0: feature 'age'"):
            call(service.address, "batch_retrieve", [{"age": object()}])
        assert service.requests == []


def test_one_client_outlives_a_restart_of_the_service() -> None:
    with ScriptedService(empty) as service, RetrievalClient(service.address, timeout_s=PATIENCE_S) as client:
        client.retrieve({})
        service.stop()
        with pytest.raises(UnavailableError):
            client.retrieve({})
        service.start()
        for _ in range(1000):
            try:
                client.retrieve({})
                break
            except UnavailableError:
                threading.Event().wait(0.02)
        else:
            pytest.fail("the client did not connect again")


def test_one_client_serves_many_threads() -> None:
    with ScriptedService(empty) as service, RetrievalClient(service.address, timeout_s=PATIENCE_S) as client:
        with ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(lambda _: client.retrieve({}), range(100)))
        assert len(answers) == len(service.requests) == 100


def test_one_client_serves_many_tasks() -> None:
    async def check() -> None:
        async with AsyncRetrievalClient(service.address, timeout_s=PATIENCE_S) as client:
            assert len(await asyncio.gather(*(client.retrieve({}) for _ in range(100)))) == 100

    with ScriptedService(empty) as service:
        asyncio.run(check())
        assert len(service.requests) == 100


def test_a_task_that_is_cancelled_cancels_its_call() -> None:
    is_cancelled = threading.Event()
    entered = threading.Event()

    def script(request: Any, context: grpc.ServicerContext) -> Any:
        context.add_callback(is_cancelled.set)
        entered.set()
        is_cancelled.wait(PATIENCE_S)
        return empty(request, context)

    async def check() -> None:
        async with AsyncRetrievalClient(service.address, timeout_s=600.0) as client:
            task = asyncio.create_task(client.retrieve({}))
            await asyncio.to_thread(entered.wait)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(is_cancelled.wait, PATIENCE_S)

    with ScriptedService(script) as service:
        asyncio.run(check())


def test_the_async_client_needs_an_event_loop() -> None:
    with pytest.raises(RuntimeError, match="no running event loop"):
        AsyncRetrievalClient("127.0.0.1:1")


def test_both_clients_have_the_same_methods() -> None:
    def signatures(kind: type) -> dict[str, str]:
        methods = inspect.getmembers(kind, inspect.isfunction)
        return {name: str(inspect.signature(method)) for name, method in methods if not name.startswith("_")}

    ours, theirs = signatures(RetrievalClient), signatures(AsyncRetrievalClient)
    # Beside the iterators, which differ, streams are alike as well.
    for name in ("stream_retrieve", "retrieve_all"):
        assert ours.pop(name).partition("k: int")[2].partition(" ->")[0] in theirs.pop(name)
    assert ours == theirs
    assert set(ours) == {"retrieve", "batch_retrieve", "explain", "embed", "get_status", "close"}
    assert inspect.signature(RetrievalClient) == inspect.signature(AsyncRetrievalClient)


def test_the_client_needs_only_grpc_and_the_stubs() -> None:
    others = {"towers", "query_service", "numpy", "pyarrow", "pydantic", "onnxruntime", "redis", "torch"}
    code = f"import sys, retrieval_client; print({others} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_the_package_is_typed() -> None:
    assert (Path(retrieval_client.__file__).parent / "py.typed").is_file()
