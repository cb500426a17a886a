"""Where an item stands, against exact search in float64: one version, both shards, each feature left out."""

import asyncio
from typing import Any

import grpc
import numpy as np
import pytest
from query_system import PATIENCE_S, System, World, query_of, running, status_code, until
from retrieval.query.v1 import query_service_pb2 as query_pb2
from toy_checkpoint import ToyModel

from towers.placement import shard_of

QUERY: dict[str, Any] = {"user_id": "3", "history": ["21", "4"]}


def explain(system: System, item_id: str, features: Any = None, timeout: float = PATIENCE_S, **fields: Any) -> Any:
    query = query_of(QUERY if features is None else features)
    return system.stub.Explain(query_pb2.ExplainRequest(query=query, item_id=item_id, **fields), timeout=timeout)


def ranked(model: ToyModel, excluded: tuple[str, ...] = ()) -> tuple[list[str], np.ndarray]:
    items = [item_id for item_id in model.item_ids if item_id not in excluded]
    return model.nearest(QUERY, items, len(items))


@pytest.mark.parametrize("version", [0, 1, 2])
def test_score_rank_and_contributions_are_exact(world: World, models: dict[int, ToyModel], version: int) -> None:
    model = models[version or 1]

    async def check() -> None:
        async with running(world, models) as system:
            if version == 2:
                await until(
                    system.status,
                    lambda status: [tower.state for tower in status.towers] == [query_pb2.TOWER_STATE_AVAILABLE] * 2,
                )
            items, scores = ranked(model)
            for place in (0, 4, 5, len(items) - 1):
                answer = await explain(system, items[place], k=5, checkpoint_version=version)
                assert answer.finding == (query_pb2.FINDING_RETURNED if place < 5 else query_pb2.FINDING_BELOW_K)
                assert str(place + 1) in answer.reason
                assert answer.score == pytest.approx(scores[place], abs=1e-5)
                assert answer.last_score == pytest.approx(scores[4], abs=1e-5)
                assert (answer.exact_rank, answer.num_items) == (place + 1, len(items))
                assert answer.found_by_index
                assert (answer.shard, answer.num_shards) == (shard_of(items[place], 2), 2)
                assert (answer.checkpoint_version, answer.catalogue_version) == (version or 1, "0.1")
                item = model.item_embeddings([items[place]])[0]
                expected = {
                    name: scores[place]
                    - item @ model.query_embeddings([{other: QUERY[other] for other in QUERY if other != name}])[0]
                    for name in QUERY
                }
                told = {part.feature: part.contribution for part in answer.contributions}
                assert told == pytest.approx(expected, abs=1e-5)

    asyncio.run(check())


def test_the_default_is_ten_items(world: World, models: dict[int, ToyModel]) -> None:
    async def check() -> None:
        async with running(world, models) as system:
            items, _ = ranked(models[1])
            findings = [(await explain(system, items[place])).finding for place in (9, 10)]
            assert findings == [query_pb2.FINDING_RETURNED, query_pb2.FINDING_BELOW_K]

    asyncio.run(check())


def test_what_stands_in_the_way_is_said(world: World, models: dict[int, ToyModel]) -> None:
    async def check() -> None:
        async with running(world, models, max_k=20) as system:
            items, scores = ranked(models[1])
            excluded = await explain(system, items[1], excluded_item_ids=[items[0], items[1]])
            assert excluded.finding == query_pb2.FINDING_EXCLUDED
            assert excluded.exact_rank == 1, "where it would be: nothing that counts is better"
            assert not excluded.HasField("found_by_index")
            unknown = await explain(system, "nothing like it")
            assert unknown.finding == query_pb2.FINDING_UNKNOWN_ITEM
            assert "not in the catalogue at version 0.1" in unknown.reason
            assert not unknown.HasField("score")
            assert not unknown.HasField("exact_rank")
            assert not unknown.contributions
            assert unknown.last_score == pytest.approx(scores[9], abs=1e-5)
            far = await explain(system, items[30])
            assert (far.exact_rank, far.HasField("found_by_index")) == (31, False), "more than may be asked for"

    asyncio.run(check())


def test_an_item_that_the_index_misses(world: World, models: dict[int, ToyModel]) -> None:
    async def check() -> None:
        async with running(world, models) as system:
            items, _ = ranked(models[1])

            def miss(response: Any) -> None:
                """Loses the best item: as an approximate index may."""
                sizes = np.frombuffer(response.item_id_sizes, "<u4")
                ends = np.cumsum(sizes)
                ids = [response.item_ids[end - size : end] for size, end in zip(sizes, ends, strict=True)]
                kept = [row for row, item_id in enumerate(ids) if item_id != items[0].encode()]
                response.item_ids = b"".join(ids[row] for row in kept)
                response.item_id_sizes = sizes[kept].tobytes()
                response.scores = np.frombuffer(response.scores, "<f4")[kept].tobytes()
                response.hit_counts = np.array([len(kept)], "<u4").tobytes()

            for shard in system.shards:
                shard.spoil = miss
            missed = await explain(system, items[0])
            assert missed.finding == query_pb2.FINDING_MISSED_BY_INDEX
            assert (missed.exact_rank, missed.found_by_index) == (1, False)
            assert "the index does not find it" in missed.reason
            lucky = await explain(system, items[10])
            assert (lucky.finding, lucky.exact_rank) == (query_pb2.FINDING_RETURNED, 11), "in the place of the one lost"

    asyncio.run(check())


def test_wrong_requests_are_the_callers_fault(world: World, models: dict[int, ToyModel]) -> None:
    async def check() -> None:
        async with running(world, models) as system:
            invalid = grpc.StatusCode.INVALID_ARGUMENT
            for call, told in (
                (explain(system, ""), "item_id is empty"),
                (explain(system, "1", {"age": 3.0}), "'age'"),
                (explain(system, "1", k=-1), "k must be from 1"),
            ):
                status, message = await status_code(call)
                assert status is invalid
                assert told in message
            status, message = await status_code(explain(system, "1", checkpoint_version=3))
            assert status is grpc.StatusCode.FAILED_PRECONDITION
            assert "checkpoint_version 3 is not loaded; 1 is live" in message

    asyncio.run(check())


def test_no_explanation_without_all_shards_or_of_two_versions(world: World, models: dict[int, ToyModel]) -> None:
    async def check() -> None:
        async with running(world, models) as system:
            other = system.shards[1 - shard_of("1", 2)]
            other.failure = grpc.StatusCode.UNAVAILABLE
            status, message = await status_code(explain(system, "1"))
            assert status is grpc.StatusCode.UNAVAILABLE
            assert other.address in message
            other.failure, other.version_shift = None, 1
            status, _ = await status_code(explain(system, "1"))
            assert status is grpc.StatusCode.INTERNAL
            other.version_shift, other.delay_s = 0, PATIENCE_S
            status, _ = await status_code(explain(system, "1", timeout=0.3))
            assert status is grpc.StatusCode.DEADLINE_EXCEEDED

    asyncio.run(check())


def test_a_replica_that_fails_is_replaced_by_another(world: World, models: dict[int, ToyModel]) -> None:
    async def check() -> None:
        async with running(world, models, replicas=2) as system:
            for shard in system.shards[::2]:
                shard.failure = grpc.StatusCode.UNAVAILABLE
            items, _ = ranked(models[1])
            for _ in range(4):
                assert (await explain(system, items[2])).exact_rank == 3

    asyncio.run(check())


def test_a_shard_that_has_moved_on_makes_the_service_look_at_the_record(
    world: World, models: dict[int, ToyModel]
) -> None:
    async def check() -> None:
        async with running(world, models, poll_interval_s=PATIENCE_S) as system:
            await until(
                system.status,
                lambda status: len(status.towers) == 2 and status.towers[1].state == query_pb2.TOWER_STATE_AVAILABLE,
            )
            world.deploy(live=2)
            for shard in system.shards:
                del shard.models[1]
            answer = await explain(system, "1")
            assert answer.checkpoint_version == 2

    asyncio.run(check())
