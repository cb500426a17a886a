"""The catalogue's service on a real server and a real store: what is acknowledged is there, errors stay apart."""

import asyncio
import datetime as dt
from contextlib import asynccontextmanager

import grpc
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from retrieval.feature.v1 import feature_pb2
from retrieval.index.v1 import index_service_pb2 as index_pb2
from retrieval.index.v1 import index_service_pb2_grpc as index_grpc

from index_service import catalogue_service
from index_service.catalogue_service import MAX_ITEMS, CatalogServicer
from index_service.item_message import table_of
from index_service.service import _feature_value
from towers.catalogue import Catalogue
from towers.rpc import RpcServer
from towers.store import Store

PATIENCE_S = 30.0


@asynccontextmanager
async def serving(url):
    """A stub of the service, and the catalogue that it writes."""
    server = RpcServer("127.0.0.1:0", "retrieval.index.v1.CatalogService", drain_s=0, grace_s=5)
    index_grpc.add_CatalogServiceServicer_to_server(CatalogServicer(Catalogue(Store(url))), server.grpc)
    port = await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield index_grpc.CatalogServiceStub(channel), Catalogue(Store(url))
    await server.drain_and_stop()


def value(content):
    match content:
        case None:
            return feature_pb2.FeatureValue()
        case str():
            return feature_pb2.FeatureValue(string_value=content)
        case [] | [str(), *_]:
            return feature_pb2.FeatureValue(string_list=feature_pb2.StringList(values=content))
        case list():
            return feature_pb2.FeatureValue(number_list=feature_pb2.NumberList(values=content))
        case _:
            return feature_pb2.FeatureValue(number_value=content)


def item(item_id, **attributes):
    return index_pb2.Item(item_id=item_id, attributes={name: value(content) for name, content in attributes.items()})


def upsert(stub, *items):
    return stub.UpsertItems(index_pb2.UpsertItemsRequest(items=items), timeout=PATIENCE_S)


def delete(stub, *item_ids):
    return stub.DeleteItems(index_pb2.DeleteItemsRequest(item_ids=item_ids), timeout=PATIENCE_S)


async def refused(call, status, *words):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is status, caught.value
    for word in words:
        assert word in caught.value.details()


def rows_of(catalogue):
    rows = catalogue.read().items.to_pylist()
    return {row.pop("item_id"): {name: content for name, content in row.items() if content is not None} for row in rows}


def test_the_first_upsert_creates_the_catalogue(store_url):
    async def run():
        async with serving(store_url) as (stub, catalogue):
            await refused(delete(stub, "a"), grpc.StatusCode.NOT_FOUND, "load items first")
            response = await upsert(stub, item("a", n=1), item("b", title="B", tags=["x", "y"]), item("a", n=2.5))
            assert (response.num_items, response.num_duplicates) == (2, 1)
            assert response.catalogue_version == catalogue.version()
            assert rows_of(catalogue) == {"a": {"n": 2.5}, "b": {"title": "B", "tags": ["x", "y"]}}
            response = await delete(stub, "a", "a", "nobody")
            assert response.num_items == 2
            assert response.catalogue_version == catalogue.version()
            assert list(rows_of(catalogue)) == ["b"]

    asyncio.run(run())


def test_calls_that_come_together_share_a_commit_and_keep_their_order(folder_url):
    async def run():
        async with serving(folder_url) as (stub, catalogue):
            await upsert(stub, item("start", n=0))
            calls = [upsert(stub, item(f"item{number}", n=number), item("same", n=number)) for number in range(100)]
            bad = [upsert(stub, item("", n=1)), upsert(stub, item("odd", n="text")), delete(stub, "\0")]
            responses = await asyncio.gather(*calls[:50], *bad, *calls[50:], return_exceptions=True)
            failures = [response for response in responses if isinstance(response, BaseException)]
            assert [failure.code() for failure in failures] == [grpc.StatusCode.INVALID_ARGUMENT] * 3
            done = [response for response in responses if not isinstance(response, BaseException)]
            assert {(response.num_items, response.num_duplicates) for response in done} == {(2, 0)}
            versions = {response.catalogue_version for response in done}
            assert len(versions) < 50
            rows = rows_of(catalogue)
            assert {name: row["n"] for name, row in rows.items() if name != "same"} == {
                "start": 0,
                **{f"item{number}": number for number in range(100)},
            }
            # The last of each commit wins, so the item is one of those that the newest commit acknowledged.
            newest = max(versions, key=lambda version: int(version.split(".")[1]))
            last = [r.catalogue_version == newest for r in responses if not isinstance(r, BaseException)]
            assert rows["same"]["n"] in [number for number in range(100) if last[number]]

    asyncio.run(run())


def test_a_delete_after_an_upsert_wins_and_the_other_way_round(folder_url):
    async def run():
        servicer = CatalogServicer(Catalogue(Store(folder_url)))

        def call(rpc, request):
            return asyncio.create_task(rpc(request, None))

        def put(item_id, **attributes):
            return call(servicer.UpsertItems, index_pb2.UpsertItemsRequest(items=[item(item_id, **attributes)]))

        def drop(item_id):
            return call(servicer.DeleteItems, index_pb2.DeleteItemsRequest(item_ids=[item_id]))

        first = [put("a", n=1), put("b", n=1), drop("a"), drop("b"), put("b", n=2), put("c", n=1), drop("c"), drop("x")]
        assert len({response.catalogue_version for response in await asyncio.gather(*first)}) == 1
        second = [drop("a"), put("a", n=3), drop("a"), drop("b"), put("c", n=4)]
        assert len({response.catalogue_version for response in await asyncio.gather(*second)}) == 1
        assert rows_of(servicer._catalogue) == {"c": {"n": 4}}

    asyncio.run(run())


def test_two_processes_that_write_lose_nothing(folder_url):
    async def run():
        async with serving(folder_url) as (first, catalogue), serving(folder_url) as (second, _):
            await upsert(first, item("start", n=0))
            calls = [
                upsert(stub, item(f"{name}{number}", **{name: number}))
                for number in range(30)
                for name, stub in (("first", first), ("second", second))
            ]
            await asyncio.gather(*calls)
            assert len(rows_of(catalogue)) == 61

    asyncio.run(run())


def test_values_take_the_types_of_the_catalogue_and_come_back(folder_url):
    moment = dt.datetime(2024, 5, 17, 1, 2, 3, 500_000, tzinfo=dt.UTC)
    loaded = {
        "text": ["x"],
        "count": [7],
        "weight": [0.25],
        "half": pa.array([0.5], pa.float32()),
        "is_new": [True],
        "at": [moment],
        "day": [dt.date(2024, 5, 17)],
        "tags": [["a", "b"]],
        "years": [[1999, 2001]],
        "vector": pa.array([[0.5, 1.5]], pa.list_(pa.float32())),
    }
    catalogue = Catalogue(Store(folder_url))
    catalogue.upsert(pa.table({"item_id": ["loaded"], **loaded}))

    async def run():
        async with serving(folder_url) as (stub, _):
            sent = {name: _feature_value(pa.array(column).to_pylist()[0]) for name, column in loaded.items()}
            await upsert(stub, index_pb2.Item(item_id="sent", attributes=sent), item("nothing", text=None))
            rows = rows_of(catalogue)
            assert rows["sent"] == rows["loaded"]
            assert rows["nothing"] == {}
            await upsert(stub, item("new", fresh=3, empty="", none=[]))
            assert rows_of(catalogue)["new"] == {"fresh": 3.0, "empty": "", "none": []}
            await upsert(stub, item("less", years=[]), item("more", fresh=3.5, years=[1]), item("none", years=[]))
            rows = rows_of(catalogue)
            assert [rows[name] for name in ("less", "more", "none")] == [
                {"years": []},
                {"fresh": 3.5, "years": [1]},
                {"years": []},
            ]
            invalid = grpc.StatusCode.INVALID_ARGUMENT
            for name, content, words in (
                ("count", 7.5, "is 7.5, but an integer in the catalogue"),
                ("count", 2.0**60, "too large for an integer"),
                ("count", "7", "is a string, but is a number in the catalogue"),
                ("text", 7, "is a number, but is a string in the catalogue"),
                ("weight", float("nan"), "is nan, which is not finite"),
                ("half", 1e300, "is 1e+300, too large for float"),
                ("is_new", "yes", 'is \'yes\'; a boolean is "true" or "false"'),
                ("at", 1e15, "Unix seconds of the years 1 to 9999"),
                ("day", 1000, "Unix seconds of its midnight in UTC"),
                ("tags", "a", "is a string, but is a list of strings in the catalogue"),
                ("years", [1999, 2000.5], "is 2000.5, but an integer in the catalogue"),
                ("vector", ["a"], "is a list of strings, but is a list of numbers in the catalogue"),
                ("other", float("inf"), "is inf, which is not finite"),
            ):
                call = upsert(stub, item("fine"), item("wrong", **{name: content}))
                await refused(call, invalid, f"items[1] 'wrong': attribute {name!r} ", words)
            await refused(
                upsert(stub, item("a", more=1), item("b", more="1")),
                invalid,
                "items[1] 'b': attribute 'more' is a string, in another item of the call a number",
            )
            await refused(upsert(stub, item("a", **{"a b": 1})), invalid, "column 'a b': a name has no space")
            await refused(upsert(stub, item("a"), item("")), invalid, "row 1: the id is empty")
            await refused(upsert(stub), invalid, "items: send at least one")
            await refused(delete(stub), invalid, "item_ids: send at least one")
            await refused(delete(stub, *map(str, range(MAX_ITEMS + 1))), invalid, f"{MAX_ITEMS + 1}, more than")
            assert rows_of(catalogue).keys() == {"loaded", "sent", "nothing", "new", "less", "more", "none"}

    asyncio.run(run())


@given(
    rows=st.lists(
        st.dictionaries(
            st.sampled_from(["text", "count", "weight", "tags", "years"]),
            st.integers(0, 5),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_any_mixture_of_missing_values_becomes_the_right_rows(rows):
    of_number = {
        "text": str,
        "count": float,
        "weight": lambda number: number / 4,
        "tags": lambda number: ["t"] * number,
        "years": lambda number: [2000 + number] * (1 + number),
    }
    expected = [{name: of_number[name](number) for name, number in row.items()} for row in rows]
    table = table_of([item(str(i), **row) for i, row in enumerate(expected)], {"years": pa.list_(pa.int64())})
    found = [{name: content for name, content in row.items() if content is not None} for row in table.to_pylist()]
    assert found == [{"item_id": str(i), **row} for i, row in enumerate(expected)]


def test_more_than_can_wait_is_shed(folder_url, monkeypatch):
    monkeypatch.setattr(catalogue_service, "MAX_WAITING_ITEMS", 3)

    async def run():
        async with serving(folder_url) as (stub, catalogue):
            exhausted = grpc.StatusCode.RESOURCE_EXHAUSTED
            await refused(
                upsert(stub, *(item(str(number)) for number in range(4))), exhausted, "send more a little later"
            )
            await upsert(stub, *(item(str(number)) for number in range(3)))
            await upsert(stub, *(item(str(number)) for number in range(3, 6)))
            assert len(rows_of(catalogue)) == 6

    asyncio.run(run())


def test_a_caller_that_goes_away_takes_nobody_along(folder_url):
    async def run():
        async with serving(folder_url) as (stub, catalogue):
            await upsert(stub, item("first"))
            gone = upsert(stub, item("gone"))
            await gone.wait_for_connection()
            others = [upsert(stub, item(f"other{number}")) for number in range(5)]
            gone.cancel()
            await asyncio.gather(*others)
            assert {"first", *(f"other{number}" for number in range(5))} <= rows_of(catalogue).keys()

    asyncio.run(run())
