"""Fixtures of the query service's tests."""

import pytest
from query_system import World
from toy_checkpoint import ToyModel, toy_model

from towers.store import Store

MODELS = {1: toy_model(dim=8, seed=1), 2: toy_model(dim=12, seed=2)}
"""Two versions of another dimension each."""


@pytest.fixture
def models() -> dict[int, ToyModel]:
    """The versions of `world`."""
    return dict(MODELS)


@pytest.fixture
def empty_world(folder_url: str) -> World:
    """A store with nothing in it."""
    return World(Store(folder_url))


@pytest.fixture
def world(empty_world: World) -> World:
    """A store with both versions; 1 is live, 2 stands by."""
    assert [empty_world.publish(model) for model in MODELS.values()] == [1, 2]
    empty_world.deploy(live=1, standby=2)
    return empty_world
