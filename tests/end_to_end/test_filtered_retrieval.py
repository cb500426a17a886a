"""Filters through the whole system: the client or the command, the query service, two real shards."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from toy_checkpoint import ToyModel, toy_items
from typer.testing import CliRunner

from cli.main import app
from retrieval_client import (
    AsyncRetrievalClient,
    Filter,
    InvalidRequestError,
    RetrievalClient,
    any_of,
    attribute,
)

NUM_ITEMS = 300
QUERY: dict[str, Any] = {"user_id": "3", "history": ["21"]}
ITEMS = {item["item_id"]: item for item in toy_items(NUM_ITEMS).to_pylist()}
YEAR, GENRES = attribute("year"), attribute("genres")


@pytest.mark.parametrize(
    ("condition", "is_met"),
    [
        (YEAR.within(at_least=2000), lambda item: item["year"] >= 2000),
        (YEAR.within(greater_than=1995, less_than=1998), lambda item: item["year"] in (1996, 1997)),
        (GENRES.one_of(["Comedy", "Drama"]), lambda item: {"Comedy", "Drama"} & set(item["genres"])),
        (GENRES.none_of(["Comedy"]), lambda item: item["genres"] and "Comedy" not in item["genres"]),
        (
            (GENRES.equals("Drama") & ~YEAR.equals(1999)) | any_of(YEAR.equals(2001)),
            lambda item: ("Drama" in item["genres"] and item["year"] != 1999) or item["year"] == 2001,
        ),
        (YEAR.within(at_least=3000), lambda item: False),
    ],
)
def test_the_answer_is_the_exact_one_among_what_is_allowed(
    address: str,
    asked_model: ToyModel,
    found_ids: list[str],
    condition: Filter,
    is_met: Callable[[dict[str, Any]], Any],
) -> None:
    excluded = [str(number) for number in range(1, NUM_ITEMS, 5)]
    allowed = [item_id for item_id in found_ids if is_met(ITEMS[item_id]) and item_id not in excluded]
    with RetrievalClient(address, timeout_s=10.0) as client:
        for k in (10, NUM_ITEMS):
            expected, scores = asked_model.nearest(QUERY, allowed, k)
            answer = client.retrieve(
                QUERY, k, excluded_item_ids=excluded, attribute_names=["year", "genres"], filter=condition
            )
            assert [item.item_id for item in answer.items] == expected
            assert [item.score for item in answer.items] == pytest.approx(scores.tolist(), abs=1e-5)
            for item in answer.items:
                known = ITEMS[item.item_id]
                assert item.attributes == {"year": known["year"], "genres": tuple(known["genres"])}
            assert answer.shards_answered == 2
        batch = client.batch_retrieve([QUERY] * 3, 5, excluded_item_ids=excluded, filter=condition)
        assert [[item.item_id for item in result.items] for result in batch] == [
            asked_model.nearest(QUERY, allowed, 5)[0]
        ] * 3


@pytest.mark.parametrize(
    ("condition", "told"),
    [
        (
            attribute("title").equals("a"),
            "attribute 'title' is not filterable; filterable: ['genres', 'year'];",
        ),
        (YEAR.equals("1990"), "attribute 'year' holds numbers; compare it with a number, not with '1990'"),
        (GENRES.within(at_least=1), "attribute 'genres' holds strings, which have no range"),
        (YEAR.exists() & YEAR.within(), "filter.all_met.filters[1].range: no bound is set; set at least one of"),
    ],
)
def test_a_wrong_filter_is_the_callers_fault_and_named(address: str, condition: Filter, told: str) -> None:
    with RetrievalClient(address, timeout_s=10.0) as client, pytest.raises(InvalidRequestError) as caught:
        client.retrieve(QUERY, filter=condition)
    assert told in caught.value.message


def test_the_asyncio_client_filters_too(address: str, asked_model: ToyModel, found_ids: list[str]) -> None:
    async def ask() -> list[str]:
        async with AsyncRetrievalClient(address, timeout_s=10.0) as client:
            answer = await client.retrieve(QUERY, 5, filter=YEAR.equals(2001))
            [again] = await client.batch_retrieve([QUERY], 5, filter=YEAR.equals(2001))
            assert answer.items == again.items
            return [item.item_id for item in answer.items]

    allowed = [item_id for item_id in found_ids if ITEMS[item_id]["year"] == 2001]
    assert asyncio.run(ask()) == asked_model.nearest(QUERY, allowed, 5)[0]


def test_the_command_filters_too(address: str, asked_model: ToyModel, found_ids: list[str]) -> None:
    command = ["retrieve", "user_id=3", "history=21", "-k", "5", "--address", address, "--json"]
    run = CliRunner().invoke(app, [*command, "--filter", "year>=1990", "--filter", "genres in Comedy,Drama"])
    assert run.exit_code == 0, run.output
    years, kinds = ({item_id: ITEMS[item_id][name] for item_id in found_ids} for name in ("year", "genres"))
    allowed = [item_id for item_id in found_ids if years[item_id] >= 1990 and {"Comedy", "Drama"} & set(kinds[item_id])]
    assert [item["item_id"] for item in json.loads(run.stdout)["items"]] == asked_model.nearest(QUERY, allowed, 5)[0]
