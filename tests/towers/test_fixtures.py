import numpy as np
import pytest
import redis
from toy_checkpoint import toy_model
from valkey_server import ValkeyServer

from towers.checkpoint import CheckpointStore
from towers.store import Store
from towers.tower import Tower


def test_toy_towers_equal_their_numpy_model(store_url: str) -> None:
    checkpoints = CheckpointStore(Store(store_url))
    for version, model in enumerate((toy_model(), toy_model(dim=5, seed=2)), start=1):
        assert checkpoints.publish(model.draft()).version == version
        query_tower = Tower(checkpoints.load(version, "query"))
        item_tower = Tower(checkpoints.load(version, "item"))
        queries = [{"user_id": "3", "history": [str(i) for i in range(1, 41)]}, {"history": ["7"]}, {"user_id": "99"}]
        np.testing.assert_allclose(query_tower.embed_rows(queries), model.query_embeddings(queries), atol=1e-6)
        items = model.item_ids
        rows = [{"item_id": item_id} for item_id in items]
        np.testing.assert_allclose(item_tower.embed_rows(rows), model.item_embeddings(items), atol=1e-6)


def test_valkey_dies_and_comes_back_empty(valkey: ValkeyServer) -> None:
    with redis.Redis.from_url(valkey.url, socket_timeout=5.0) as client:
        client.set("key", "value")
        assert client.get("key") == b"value"
    valkey.kill()
    with redis.Redis.from_url(valkey.url, socket_timeout=5.0) as client, pytest.raises(redis.ConnectionError):
        client.get("key")
    valkey.start()
    with redis.Redis.from_url(valkey.url, socket_timeout=5.0) as client:
        assert client.get("key") is None


def test_stopped_valkey_times_out(valkey: ValkeyServer) -> None:
    valkey.stop()
    with redis.Redis.from_url(valkey.url, socket_timeout=0.05) as client, pytest.raises(redis.TimeoutError):
        client.ping()
    valkey.resume()
    with redis.Redis.from_url(valkey.url, socket_timeout=20.0) as client:
        assert client.ping()
