"""A query service over two shards, for tests that only ask."""

from collections.abc import Iterator

import numpy as np
import pytest
from quick_stack import quick_stack
from toy_checkpoint import ToyModel, toy_items, toy_model

from towers.catalogue import Catalogue
from towers.checkpoint import CheckpointStore
from towers.store import Store

NUM_ITEMS = 300
BROKEN, DELETED = "8", "9"


@pytest.fixture(scope="session")
def asked_model() -> ToyModel:
    """The one version there is; it cannot embed one of the items."""
    model = toy_model(num_items=NUM_ITEMS)
    model.item_table[int(BROKEN) + 1] = np.nan
    return model


@pytest.fixture(scope="session")
def found_ids(asked_model: ToyModel) -> list[str]:
    """The items that can be found."""
    return [item_id for item_id in asked_model.item_ids if item_id not in (BROKEN, DELETED)]


@pytest.fixture(scope="session")
def address(tmp_path_factory: pytest.TempPathFactory, asked_model: ToyModel) -> Iterator[str]:
    """Of the query service; its shards filter by year and genres."""
    store = Store(str(tmp_path_factory.mktemp("store")))
    Catalogue(store).upsert(toy_items(NUM_ITEMS))
    Catalogue(store).delete([DELETED])
    CheckpointStore(store).publish(asked_model.draft())
    with quick_stack(store.url, tmp_path_factory.mktemp("stack"), {"TWOTOWER_FILTERABLE": "year,genres"}) as stack:
        stack.wait_ready(timeout_s=90.0)
        yield stack.query_address
