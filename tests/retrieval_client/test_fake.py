"""The fake service answers as the real one does: through both clients, and its filters beside those of the shards."""

import asyncio
import math
import time
from datetime import UTC, datetime

import pyarrow as pa
import pytest
from retrieval.feature.v1 import filter_pb2

from index_service.attributes import Attributes
from index_service.filter_message import condition_of
from retrieval_client import (
    AsyncRetrievalClient,
    DeadlineExceededError,
    Filter,
    InvalidRequestError,
    OverloadedError,
    Retrieval,
    RetrievalClient,
    RetrievedItem,
    UnavailableError,
    all_of,
    any_of,
    attribute,
)
from retrieval_client.fake import FakeItem, FakeQueryService

ROWS = [
    {"item_id": "50", "title": "Star Wars", "year": 1977, "genres": ["Action", "War"]},
    {"item_id": "181", "title": "Return of the Jedi", "year": 1983, "genres": ["Action"]},
    {"item_id": "1", "title": "Toy Story", "year": 1995, "genres": ["Comedy"]},
    {"item_id": "7", "title": "Twelve Monkeys", "year": 1995, "genres": []},
    {"item_id": "8", "title": None, "year": None, "genres": None},
]
ITEMS = [FakeItem(row["item_id"], {name: row[name] for name in ("title", "year", "genres")}) for row in ROWS]
IDS = [row["item_id"] for row in ROWS]
YEAR, GENRES, TITLE = attribute("year"), attribute("genres"), attribute("title")


def ids_of(answer: Retrieval) -> list[str]:
    return [item.item_id for item in answer.items]


def test_items_come_in_their_order_or_as_the_test_ranks_them() -> None:
    with FakeQueryService(ITEMS) as fake, RetrievalClient(fake.address) as client:
        answer = client.retrieve({"user_id": "42"}, 2, excluded_item_ids=["181"], attribute_names=["title", "year"])
        assert answer.items[0] == RetrievedItem("50", 1.0, {"title": "Star Wars", "year": 1977.0})
        assert ids_of(answer) == ["50", "1"]
        assert (answer.checkpoint_version, answer.shards_answered, answer.shards_total) == (1, 1, 1)
        fake.rank = lambda features: ["7", "unknown", features["user_id"], "7"]
        fake.checkpoint_version = 2
        answer = client.retrieve({"user_id": "8"}, 10)
        assert ids_of(answer) == ["7", "8", "50", "181", "1"]
        assert [item.score for item in answer.items] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
        assert answer.checkpoint_version == 2
        assert fake.queries == [{"user_id": "42"}, {"user_id": "8"}]


def test_every_call_of_both_clients_is_answered() -> None:
    async def ask(fake: FakeQueryService) -> None:
        async with AsyncRetrievalClient(fake.address) as client:
            assert ids_of(await client.retrieve({}, 1)) == ["50"]
            assert [ids_of(answer) for answer in await client.batch_retrieve([{}, {}], 1)] == [["50"], ["50"]]
            assert [ids_of(answer) async for answer in client.retrieve_all([{}] * 3, 1, batch_size=2)] == [["50"]] * 3
            outcomes = [outcome async for outcome in client.stream_retrieve([{}, {"shoe_size": 42}, {}], 1)]
            assert [type(outcome) for outcome in outcomes] == [Retrieval, InvalidRequestError, Retrieval]
            assert (await client.explain({}, "181", 1)).exact_rank == 2
            vectors = (await client.embed([{"user_id": "1"}, {"user_id": "2"}, {"user_id": "1"}])).vectors
            assert vectors[0] == vectors[2] != vectors[1]
            assert math.hypot(*vectors[0]) == pytest.approx(1.0, abs=1e-6)
            status = await client.get_status()
            assert (status.live_version, [feature.name for feature in status.features]) == (1, ["user_id"])

    with FakeQueryService(ITEMS, features=["user_id"]) as fake:
        asyncio.run(ask(fake))


def test_it_explains() -> None:
    late = YEAR.within(at_least=1980)
    with FakeQueryService(ITEMS) as fake, RetrievalClient(fake.address) as client:
        assert client.explain({}, "50", 1).finding == "returned"
        below = client.explain({}, "1", 2)
        assert (below.finding, below.exact_rank, below.num_items) == ("below_k", 3, 5)
        assert below.last_score == pytest.approx(0.8)
        assert client.explain({}, "1", 2, filter=late).finding == "returned"
        assert client.explain({}, "50", filter=late).finding == "filtered_out"
        assert client.explain({}, "50", excluded_item_ids=["50"]).finding == "excluded"
        unknown = client.explain({}, "never", filter=YEAR.equals(1800))
        assert (unknown.finding, unknown.score, unknown.last_score) == ("unknown_item", None, None)


def test_what_is_wrong_is_refused() -> None:
    with FakeQueryService(ITEMS, features=["user_id"]) as fake, RetrievalClient(fake.address) as client:
        with pytest.raises(InvalidRequestError, match="'shoe_size'"):
            client.retrieve({"shoe_size": 42})
        with pytest.raises(InvalidRequestError, match="k must be from 1 to 1000, got 0"):
            client.retrieve({}, 0)
        with pytest.raises(InvalidRequestError, match="unknown attribute 'rating'; known: "):
            client.retrieve({}, attribute_names=["rating"])
        with pytest.raises(InvalidRequestError, match="in the batch that begins with query 2: feature 'shoe_size'"):
            list(client.retrieve_all([{}, {}, {"shoe_size": "42"}], batch_size=2))
        with pytest.raises(ValueError, match="batch_size: 0 is below 1"):
            list(client.retrieve_all([{}], batch_size=0))
        with pytest.raises(TypeError, match="expected feature mappings, got one mapping"):
            list(client.retrieve_all({"user_id": "1"}))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="item '1': attribute 'title'"):
        FakeQueryService([FakeItem("1", {"title": object()})])


def test_failures_and_delays_as_the_test_wants_them() -> None:
    with FakeQueryService(ITEMS) as fake, RetrievalClient(fake.address, timeout_s=20.0) as client:
        fake.fail("UNAVAILABLE", times=2)
        assert ids_of(client.retrieve({}, 1)) == ["50"], "the client tries again"
        fake.fail("UNAVAILABLE", times=3)
        with pytest.raises(UnavailableError, match="told to fail"):
            client.retrieve({})
        fake.fail("RESOURCE_EXHAUSTED", "busy", times=3)
        with pytest.raises(OverloadedError, match="busy"):
            client.batch_retrieve([{}])
        fake.fail("UNAVAILABLE")
        assert len(list(client.stream_retrieve([{}] * 3))) == 3, "the stream goes on"
        fake.delay_s = 0.3
        with pytest.raises(DeadlineExceededError):
            client.retrieve({}, timeout_s=0.05)


def test_any_number_of_queries_goes_in_batches() -> None:
    with FakeQueryService(ITEMS) as fake, RetrievalClient(fake.address, timeout_s=20.0) as client:
        fake.rank = lambda features: [IDS[int(str(features["user_id"])) % len(IDS)]]
        users = [{"user_id": str(number)} for number in range(1000)]
        answers = list(client.retrieve_all(iter(users), 1, batch_size=7))
        assert [ids_of(answer)[0] for answer in answers] == [IDS[number % len(IDS)] for number in range(1000)]
        fake.queries.clear()
        some = client.retrieve_all(iter(users), 1, batch_size=10)
        next(some)
        some.close()  # type: ignore[attr-defined]
        time.sleep(0.1)
        assert len(fake.queries) <= 40, "no more than a few batches ahead"


@pytest.mark.parametrize(
    "condition",
    [
        YEAR.equals(1995),
        YEAR.equals(datetime(1970, 1, 1, 0, 33, 15, tzinfo=UTC)),
        TITLE.one_of(["Star Wars", "Toy Story", "Alien"]),
        GENRES.equals("War"),
        GENRES.one_of(["War", "Comedy"]),
        GENRES.none_of(["War"]),
        YEAR.none_of([1995]),
        ~GENRES.none_of(["War"]),
        YEAR.within(at_least=1983, less_than=1995),
        YEAR.within(greater_than=1983, at_most=1995),
        GENRES.exists(),
        ~TITLE.exists(),
        all_of(YEAR.within(at_least=1980), GENRES.exists()),
        any_of(YEAR.equals(1977), GENRES.equals("Comedy")) & ~TITLE.equals("Toy Story"),
    ],
)
def test_filters_are_those_of_the_shards(condition: Filter) -> None:
    table = pa.Table.from_pylist(ROWS).drop_columns(["item_id"])
    rows = Attributes(table, ["title", "year", "genres"]).matching(condition_of(condition.message)).rows
    with FakeQueryService(ITEMS) as fake, RetrievalClient(fake.address) as client:
        assert ids_of(client.retrieve({}, 10, filter=condition)) == [IDS[row] for row in rows]


def test_a_filter_without_a_condition_is_refused() -> None:
    with (
        FakeQueryService(ITEMS) as fake,
        RetrievalClient(fake.address) as client,
        pytest.raises(InvalidRequestError, match="no condition is set"),
    ):
        client.retrieve({}, filter=Filter(filter_pb2.Filter()))
