"""What the feed says about a real catalogue."""

import pyarrow as pa
from deltalake import DeltaTable, write_deltalake

from index_service.feed import ChangeFeed
from towers.catalogue import Catalogue
from towers.placement import shard_of
from towers.store import Store


class CountingStore(Store):
    """Counts what is asked of it."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.num_gets = 0

    def get(self, path: str) -> bytes:
        self.num_gets += 1
        return super().get(path)


def upsert(catalogue: Catalogue, **prices: int) -> str:
    table = pa.table({"item_id": list(prices), "price": list(prices.values())})
    return catalogue.upsert(table).catalogue_version


def test_only_the_last_state_of_what_changed(store_url: str) -> None:
    catalogue = Catalogue(Store(store_url))
    first = upsert(catalogue, a=1, b=1, c=1, d=1)
    feed = ChangeFeed(Catalogue(Store(store_url)), 0, 1)
    unchanged = feed.since(first)
    assert unchanged is not None
    assert (unchanged.catalogue_version, unchanged.upserts.num_rows, unchanged.deleted_ids) == (first, 0, ())
    upsert(catalogue, a=2, b=2, e=2)
    catalogue.delete(["b", "c"])
    second = catalogue.version()
    catalogue.compact()
    last = upsert(catalogue, c=3, d=3)
    for state, rows, deleted in ((first, {"a": 2, "c": 3, "d": 3, "e": 2}, {"b"}), (second, {"c": 3, "d": 3}, set())):
        changes = feed.since(state)
        assert changes is not None
        assert changes.catalogue_version == last
        assert {row["item_id"]: row["price"] for row in changes.upserts.to_pylist()} == rows
        assert set(changes.deleted_ids) == deleted


def test_each_shard_gets_its_own(folder_url: str) -> None:
    catalogue = Catalogue(Store(folder_url))
    first = upsert(catalogue, start=0)
    upsert(catalogue, **{f"item{number}": number for number in range(20)})
    catalogue.delete([f"item{number}" for number in range(10)])
    for shard in range(3):
        changes = ChangeFeed(catalogue, shard, 3).since(first)
        assert changes is not None
        own = [f"item{number}" for number in range(20) if shard_of(f"item{number}", 3) == shard]
        assert sorted(changes.upserts["item_id"].to_pylist()) == sorted(i for i in own if int(i[4:]) >= 10)
        assert sorted(changes.deleted_ids) == sorted(i for i in own if int(i[4:]) < 10)


def test_a_commit_is_read_once(folder_url: str) -> None:
    catalogue = Catalogue(Store(folder_url))
    states = [upsert(catalogue, a=number) for number in range(12)]
    catalogue.compact()
    store = CountingStore(folder_url)
    feed = ChangeFeed(Catalogue(store), 0, 1)
    assert feed.since(states[0]) is not None
    upsert(catalogue, b=1)
    store.num_gets = 0
    assert feed.since(states[5]) is not None
    assert store.num_gets == 2 + 2, "is there a new commit of either table; the one there is, and its rows"
    assert feed.since(states[9]) is not None
    assert store.num_gets == 4 + 2


def test_a_rewrite_cannot_be_followed(folder_url: str) -> None:
    catalogue = Catalogue(Store(folder_url))
    first = upsert(catalogue, a=1)
    catalogue.compact()
    feed = ChangeFeed(catalogue, 0, 1)
    assert feed.since(first) is not None
    write_deltalake(f"{folder_url}/catalog/items", pa.table({"item_id": ["b"], "price": [2]}), mode="overwrite")
    assert feed.since(first) is None
    version = catalogue.version()
    assert version is not None
    assert feed.since(version) is not None
    assert feed.since("0.99") is None
    assert feed.since("nonsense") is None


def test_a_log_that_was_cleaned_cannot_be_followed(folder_url: str) -> None:
    catalogue = Catalogue(Store(folder_url))
    states = [upsert(catalogue, a=number) for number in range(4)]
    DeltaTable(f"{folder_url}/catalog/changes").create_checkpoint()
    for number in range(3):
        Store(folder_url).delete(f"catalog/changes/_delta_log/{number:020}.json")
    feed = ChangeFeed(Catalogue(Store(folder_url)), 0, 1)
    assert feed.since(states[0]) is None
    assert feed.since(states[2]) is not None
