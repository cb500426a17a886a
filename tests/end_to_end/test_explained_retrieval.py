"""Why an item is not in an answer, through the whole system: the client and the command, two real shards."""

import asyncio
import json
from typing import Any

import pytest
from toy_checkpoint import ToyModel, toy_items
from typer.testing import CliRunner

from cli.main import app
from retrieval_client import AsyncRetrievalClient, InvalidRequestError, Retrieval, RetrievalClient, attribute
from towers.placement import shard_of

NUM_ITEMS = 300
BROKEN, DELETED = "8", "9"
"""Of the catalogue in conftest."""
QUERY: dict[str, Any] = {"user_id": "3", "history": ["21"]}
YEARS = {item["item_id"]: item["year"] for item in toy_items(NUM_ITEMS).to_pylist()}


@pytest.fixture
def ranked(asked_model: ToyModel, found_ids: list[str]) -> list[str]:
    """What can be returned, best first."""
    return asked_model.nearest(QUERY, found_ids, len(found_ids))[0]


def test_every_reason_has_its_name(address: str, ranked: list[str]) -> None:
    late = attribute("year").within(at_least=YEARS[ranked[0]] + 1)
    with RetrievalClient(address, timeout_s=20.0) as client:
        assert client.explain(QUERY, ranked[4], 5).finding == "returned"
        below = client.explain(QUERY, ranked[5], 5)
        assert (below.finding, below.exact_rank, below.found_by_index) == ("below_k", 6, True)
        assert below.num_items == len(ranked)
        excluded = client.explain(QUERY, ranked[0], 5, excluded_item_ids=[ranked[0]])
        assert (excluded.finding, excluded.exact_rank, excluded.num_items) == ("excluded", 1, len(ranked) - 1)
        filtered = client.explain(QUERY, ranked[0], 5, filter=late)
        assert (filtered.finding, filtered.exact_rank) == ("filtered_out", 1)
        assert filtered.num_items == sum(YEARS[item_id] > YEARS[ranked[0]] for item_id in ranked)
        quarantined = client.explain(QUERY, BROKEN)
        assert (quarantined.finding, quarantined.score, dict(quarantined.contributions)) == ("quarantined", None, {})
        assert "its embedding is not finite" in quarantined.reason
        for item_id in (DELETED, "never"):
            assert client.explain(QUERY, item_id).finding == "unknown_item"
            assert client.explain(QUERY, item_id).shard == shard_of(item_id, 2)
        with pytest.raises(InvalidRequestError, match="item_id is empty"):
            client.explain(QUERY, "")


def test_scores_are_those_of_retrieve(address: str, ranked: list[str], asked_model: ToyModel) -> None:
    async def ask() -> None:
        async with AsyncRetrievalClient(address, timeout_s=20.0) as client:
            answer = await client.retrieve(QUERY, 3)
            for item in answer.items:
                told = await client.explain(QUERY, item.item_id, 3, checkpoint_version=answer.checkpoint_version)
                assert told.score == pytest.approx(item.score, abs=1e-6)
                embeddings = asked_model.query_embeddings([QUERY, {"user_id": "3"}])
                both = embeddings @ asked_model.item_embeddings([item.item_id])[0]
                assert told.contributions["history"] == pytest.approx(both[0] - both[1], abs=1e-5)

    asyncio.run(ask())


def test_a_stream_is_answered_as_single_queries_are(address: str) -> None:
    queries = [{"user_id": str(number % 9), "history": [str(number % 100 + 1)]} for number in range(200)]
    with RetrievalClient(address, timeout_s=20.0) as client:
        streamed = list(client.stream_retrieve(queries, 4))
        assert len(streamed) == len(queries)
        for query, outcome in list(zip(queries, streamed, strict=True))[::40]:
            assert isinstance(outcome, Retrieval)
            alone = client.retrieve(query, 4)
            assert [item.item_id for item in outcome.items] == [item.item_id for item in alone.items]


def test_the_command_says_it_in_words_and_in_json(address: str, ranked: list[str]) -> None:
    command = ["explain", ranked[5], "user_id=3", "history=21", "-k", "5", "--address", address]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0, shown.output
    assert f"{ranked[5]}: below k: its exact rank is 6, and 5 items were asked for" in shown.stdout
    assert f"6 of {len(ranked)}" in shown.stdout
    assert "history" in shown.stdout
    told = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert (told["item_id"], told["finding"], told["exact_rank"]) == (ranked[5], "below_k", 6)
    assert set(told["contributions"]) == {"user_id", "history"}
    missing = CliRunner().invoke(app, ["explain", "never", "user_id=3", "--address", address])
    assert "never: unknown item: it is not in the catalogue" in missing.stdout
