"""One request from end to end, against exact search in float64."""

import asyncio
import math
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
import pytest
from exact_shard import ExactShard
from grpc_health.v1 import health_pb2, health_pb2_grpc
from onnx import TensorProto, helper, numpy_helper
from query_system import PATIENCE_S, World, assert_exact, query_of, running, status_code, until, value_of
from retrieval.query.v1 import query_service_pb2
from toy_checkpoint import TOY_FEATURES, ToyModel, toy_items, toy_model

from query_service.cache import EmbeddingCache
from query_service.deadline import Deadline
from query_service.embed import Embedder
from query_service.fallback import Fallback
from query_service.fan_out import Shards
from query_service.hot import HotQueries
from query_service.offload import Offload
from query_service.parse import Limits
from query_service.retrieve import Retriever
from query_service.shadow import Shadow
from query_service.traffic import Traffic
from query_service.versions import Versions
from towers.checkpoint import CheckpointDraft, CheckpointStore, GoldenExamples
from towers.errors import DeadlineError
from towers.schema import parse_schema

QUERIES: list[dict[str, Any]] = [
    {"user_id": "1", "history": ["3", "4", "5"]},
    {"user_id": "2", "history": []},
    {"user_id": "nobody", "history": ["7", "nothing"]},
    {"history": ["9"]},
    {},
    {"user_id": "3", "history": [str(item) for item in range(1, 31)]},
]


def test_a_single_query_equals_exact_search(world: World, models: dict[int, ToyModel]) -> None:
    async def check() -> None:
        async with running(world, models, cache_entries=0) as system:
            for features in QUERIES:
                for k in (1, 10, 1000):
                    response = await system.retrieve(features, k=k)
                    assert_exact(response, models[1], features, k)
                    assert (response.shards_answered, response.shards_total) == (2, 2)
                    assert response.checkpoint_version == 1
                    assert not response.degraded_reasons
                    assert not response.embedding_cached

    asyncio.run(check())


def test_a_batch_equals_exact_search_with_one_search_per_shard(world: World, models: dict[int, ToyModel]) -> None:
    async def check() -> None:
        async with running(world, models) as system:
            for queries in (QUERIES, QUERIES * 20):
                calls_before = [shard.num_calls for shard in system.shards]
                response = await system.batch_retrieve(queries, k=7)
                assert [shard.num_calls for shard in system.shards] == [calls + 1 for calls in calls_before]
                assert len(response.results) == len(queries)
                for result, features in zip(response.results, queries, strict=True):
                    assert_exact(result, models[1], features, 7)
                    assert (result.checkpoint_version, result.shards_answered, result.shards_total) == (1, 2, 2)

    asyncio.run(check())


def test_excluded_items_are_replaced_by_the_next_best(world: World, models: dict[int, ToyModel]) -> None:
    async def check() -> None:
        async with running(world, models) as system:
            full = await system.retrieve(QUERIES[0], k=10)
            excluded = [*full.item_ids[::2], "nothing"]
            response = await system.retrieve(QUERIES[0], k=10, excluded_item_ids=excluded)
            allowed = [item_id for item_id in models[1].item_ids if item_id not in excluded]
            assert_exact(response, models[1], QUERIES[0], 10, allowed)
            batch = await system.batch_retrieve(QUERIES[:2], k=60, excluded_item_ids=excluded)
            for result, features in zip(batch.results, QUERIES[:2], strict=True):
                assert_exact(result, models[1], features, 60, allowed)

    asyncio.run(check())


def test_attributes_come_in_the_order_of_the_items(world: World, models: dict[int, ToyModel]) -> None:
    rows = {row["item_id"]: row for row in toy_items().to_pylist()}

    async def check() -> None:
        async with running(world, models) as system:
            single = await system.retrieve(QUERIES[0], attribute_names=["year", "title", "genres"])
            batch = await system.batch_retrieve(QUERIES, attribute_names=["year", "title", "genres"])
            for response in (single, *batch.results):
                assert [column.name for column in response.attributes] == ["year", "title", "genres"]
                for column in response.attributes:
                    expected = [value_of(rows[item_id][column.name]) for item_id in response.item_ids]
                    assert list(column.values) == expected

    asyncio.run(check())


def test_embeddings_equal_the_exact_ones(world: World, models: dict[int, ToyModel]) -> None:
    async def check() -> None:
        async with running(world, models) as system:
            for queries in (QUERIES, QUERIES * 20):
                request = query_service_pb2.EmbedRequest(queries=[query_of(features) for features in queries])
                response = await system.stub.Embed(request, timeout=PATIENCE_S)
                assert (response.dim, response.checkpoint_version) == (8, 1)
                embeddings = np.frombuffer(response.embeddings, "<f4").reshape(len(queries), 8)
                assert np.abs(embeddings - models[1].query_embeddings(queries)).max() <= 1e-6

    asyncio.run(check())


@pytest.mark.parametrize(
    ("features", "fields", "names"),
    [
        ({"age": 3.0}, {}, "unknown feature 'age'"),
        ({"item_id": "3"}, {}, "unknown feature 'item_id'"),
        ({"user_id": ["1"]}, {}, "feature 'user_id'"),
        ({"user_id": 1.5}, {}, "feature 'user_id'"),
        ({"user_id": math.nan}, {}, "feature 'user_id'"),
        ({"user_id": math.inf}, {}, "feature 'user_id'"),
        ({"history": "3"}, {}, "feature 'history'"),
        ({"history": 3.0}, {}, "feature 'history'"),
        ({"history": [1.0, math.nan]}, {}, "feature 'history'"),
        ({}, {"k": 0}, "k must be from 1 to 1000, got 0"),
        ({}, {"k": -1}, "k must be from 1 to 1000, got -1"),
        ({}, {"k": 2**31 - 1}, "k must be from 1 to 1000"),
        ({}, {"min_shards": -1}, "min_shards must be from 0 to 2, got -1"),
        ({}, {"min_shards": 3}, "min_shards must be from 0 to 2, got 3"),
        ({}, {"attribute_names": ["colour"]}, "unknown attribute 'colour'"),
    ],
)
def test_a_wrong_request_is_refused_by_name(
    world: World, models: dict[int, ToyModel], features: dict[str, Any], fields: dict[str, Any], names: str
) -> None:
    async def check() -> None:
        async with running(world, models) as system:
            code, message = await status_code(system.retrieve(features, **fields))
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert names in message
            assert "row" not in message
            code, message = await status_code(system.batch_retrieve([{}, {"user_id": "1"}, features], **fields))
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert names in message
            if features:
                assert message.startswith("query 2: ")
            assert_exact(await system.retrieve(QUERIES[0]), models[1], QUERIES[0])

    asyncio.run(check())


def test_batches_have_a_limit(world: World, models: dict[int, ToyModel]) -> None:
    async def check() -> None:
        async with running(world, models, max_batch_size=5, max_k=20) as system:
            assert len((await system.batch_retrieve([{}] * 5, k=20)).results) == 5
            for queries in ([], [{}] * 6):
                for call in (
                    system.batch_retrieve(queries),
                    system.stub.Embed(
                        query_service_pb2.EmbedRequest(queries=[query_of(query) for query in queries]), timeout=5
                    ),
                ):
                    code, message = await status_code(call)
                    assert code is grpc.StatusCode.INVALID_ARGUMENT
                    assert message == f"queries must be from 1 to 5, got {len(queries)}"
            assert (await status_code(system.retrieve({}, k=21)))[0] is grpc.StatusCode.INVALID_ARGUMENT

    asyncio.run(check())


def test_before_the_first_version_it_says_that_it_is_not_ready(empty_world: World, models: dict[int, ToyModel]) -> None:
    async def check() -> None:
        async with running(empty_world, models) as system, grpc.aio.insecure_channel(system.address) as channel:
            health = health_pb2_grpc.HealthStub(channel)

            async def is_serving(service: str) -> bool:
                answer = await health.Check(health_pb2.HealthCheckRequest(service=service), timeout=PATIENCE_S)
                return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

            name = "retrieval.query.v1.QueryService"
            assert await is_serving("")
            assert not await is_serving(name)
            code, message = await status_code(system.retrieve({}))
            assert code is grpc.StatusCode.UNAVAILABLE
            assert message == "no checkpoint version is loaded yet: no version is live; see twotower status"
            status = await system.status()
            assert (status.deployment_revision, status.live_version, status.standby_version) == (0, 0, 0)
            assert not status.towers
            assert not status.features

            empty_world.publish(models[1])
            empty_world.deploy(live=1)
            await until(lambda: is_serving(name), bool)
            assert_exact(await system.retrieve(QUERIES[0]), models[1], QUERIES[0])

    asyncio.run(check())


def test_the_status_tells_versions_shards_cache_and_features(world: World, models: dict[int, ToyModel]) -> None:
    async def check() -> None:
        async with running(world, models) as system:
            available = query_service_pb2.TOWER_STATE_AVAILABLE
            status = await until(system.status, lambda status: all(t.state == available for t in status.towers))
            assert (status.deployment_revision, status.live_version, status.standby_version) == (1, 1, 2)
            assert [tower.checkpoint_version for tower in status.towers] == [1, 2]
            assert all(0 < tower.golden_difference < 1e-5 for tower in status.towers)
            expected = [(2, shard, system.shards[shard].address, True) for shard in (0, 1)]
            seen = [(shard.num_shards, shard.shard, shard.address, shard.reachable) for shard in status.shards]
            assert seen == expected
            assert not status.cache.enabled
            features = [(feature.name, feature.kind) for feature in status.features]
            assert features == [("user_id", "categorical"), ("history", "sequence")]

    asyncio.run(check())


def test_a_deadline_that_has_passed_starts_no_work(world: World, models: dict[int, ToyModel]) -> None:
    async def check() -> None:
        async with ExactShard(0, 1, models) as shard:
            versions, shards, offload = Versions(world.store, 0.02, [1]), Shards([((shard.address,),)]), Offload()
            cache = EmbeddingCache("", ttl_s=1, timeout_s=1, dtype="float32")
            embedder = Embedder(cache, offload, HotQueries(0), num_entries=0, may_leave_out=False)
            shadow = Shadow(0.0, PATIENCE_S)
            fallback, limits = Fallback(0.0, 1, 0), Limits(10, 10, 1)
            retriever = Retriever(versions, embedder, shards, offload, Traffic(), shadow, fallback, limits, 1)
            following = asyncio.create_task(versions.follow())
            await versions.ready.wait()
            request = query_service_pb2.RetrieveRequest(query=query_of(QUERIES[0]), k=5)
            [response] = await retriever.retrieve(request, [request.query], Deadline.after(PATIENCE_S))
            assert len(response.item_ids) == 5
            with pytest.raises(DeadlineError):
                await retriever.retrieve(request, [request.query], Deadline.after(0))
            with pytest.raises(DeadlineError):
                await retriever.embed([request.query], Deadline.after(-1))
            assert shard.num_calls == 1
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
            await shards.close()
            offload.close()

    asyncio.run(check())


def test_an_embedding_that_is_not_finite_is_the_querys_fault(empty_world: World) -> None:
    model = toy_model(dim=2)
    CheckpointStore(empty_world.store).publish(with_taste(model.draft()))
    empty_world.deploy(live=1)

    async def check() -> None:
        async with running(empty_world, {1: model}) as system:
            assert (await system.retrieve({"taste": [0.5, 0.5]})).shards_answered == 2
            for wrong in ({"taste": [3e38, 1.0]}, {}):
                code, message = await status_code(system.batch_retrieve([{"taste": [1.0, 1.0]}, wrong]))
                assert code is grpc.StatusCode.INVALID_ARGUMENT
                assert message.startswith("query 1: version 1 gives it no finite embedding")

    asyncio.run(check())


def with_taste(draft: CheckpointDraft) -> CheckpointDraft:
    """A query tower that takes a vector, ten times too large for its own good, and normalises it by hand."""
    nodes = [
        helper.make_node("Mul", ["feature_taste", "ten"], ["scaled"]),
        helper.make_node("ReduceL2", ["scaled", "last_axis"], ["norm"], keepdims=1),
        helper.make_node("Div", ["scaled", "norm"], ["tower_output"]),
    ]
    constants = {"ten": np.array(10.0, dtype=np.float32), "last_axis": np.array([-1], dtype=np.int64)}
    graph = helper.make_graph(
        nodes,
        "query_tower",
        [helper.make_tensor_value_info("feature_taste", TensorProto.FLOAT, ["batch", 2])],
        [helper.make_tensor_value_info("tower_output", TensorProto.FLOAT, ["batch", 2])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    tower = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    taste = {"name": "taste", "owner": "query", "kind": "vector", "size": 2}
    return replace(
        draft,
        schema=parse_schema([taste, TOY_FEATURES[2]]),
        vocabularies={"item_id": draft.vocabularies["item_id"]},
        towers={**draft.towers, "query": tower.SerializeToString()},
        golden={**draft.golden, "query": GoldenExamples(features=[{"taste": [3.0, 4.0]}], embeddings=[[0.6, 0.8]])},
    )
