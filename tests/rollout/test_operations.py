"""By hand: stage, promote and roll back, each of which writes one record or says why not."""

from collections.abc import Sequence

import pytest
from fleets import fleet, load
from toy_checkpoint import toy_model

from rollout import operations
from rollout.gates import GateResult, Outcome
from rollout.overview import Overview
from towers.checkpoint import CheckpointStore
from towers.deployment import Deployment, DeploymentStore
from towers.errors import ConflictError, GateRefusedError, InvalidInputError, NotFoundError
from towers.store import Store

PASS = GateResult("replicas", Outcome.PASS, "all 3")
WAIT = GateResult("item count", Outcome.WAIT, "not all shards")
REFUSE = GateResult("offline recall", Outcome.REFUSE, "0.02 beside 0.10")


@pytest.fixture
def store(folder_url: str) -> Store:
    """Three checkpoints, no record."""
    store = Store(folder_url)
    for seed in (1, 2, 3):
        CheckpointStore(store).publish(toy_model(seed=seed, num_items=5, num_users=2).draft())
    return store


def seen(store: Store, gates: Sequence[GateResult]) -> Overview:
    return Overview(tuple(DeploymentStore(store).history()), (1, 2, 3), fleet(load(1)), tuple(gates))


def promote(store: Store, *gates: GateResult, is_forced: bool = False) -> Deployment:
    return operations.promote(store, seen(store, gates), is_forced=is_forced)


def history(store: Store) -> list[tuple[int | None, int | None, bool]]:
    return [(record.live_version, record.standby_version, record.held) for record in DeploymentStore(store).history()]


def test_round_trip(store: Store) -> None:
    operations.stage(store, 1)
    promote(store, PASS)
    operations.stage(store, 2)
    promote(store, PASS)
    operations.roll_back(store)
    operations.roll_back(store)
    assert history(store) == [
        (None, 1, False),
        (1, None, False),
        (1, 2, False),
        (2, 1, False),
        (1, 2, True),
        (2, 1, True),
    ]
    reasons = [record.reason for record in DeploymentStore(store).history()]
    assert reasons[:5] == ["staged by hand", "promoted by hand"] * 2 + ["rolled back by hand; version 2 is held"]


def test_staging_again_ends_the_hold(store: Store) -> None:
    for version in (1, 2):
        operations.stage(store, version)
        promote(store, PASS)
    assert operations.roll_back(store).held
    assert not operations.stage(store, 2).held


def test_only_published_versions_are_staged(store: Store) -> None:
    with pytest.raises(NotFoundError, match=r"checkpoint 9 is not published; published: \[1, 2, 3\]"):
        operations.stage(store, 9)
    assert history(store) == []


def test_the_live_version_is_not_staged(store: Store) -> None:
    operations.stage(store, 1)
    promote(store, PASS)
    with pytest.raises(InvalidInputError, match="version 1 is live already"):
        operations.stage(store, 1)


@pytest.mark.parametrize("gate", [WAIT, REFUSE])
def test_promote_asks_the_gates(store: Store, gate: GateResult) -> None:
    operations.stage(store, 1)
    with pytest.raises(GateRefusedError, match=f"version 1 is not promoted: {gate.name} .*{gate.explanation}"):
        promote(store, PASS, gate)
    assert history(store) == [(None, 1, False)]


def test_force_overrides_the_gates_and_the_record_says_so(store: Store) -> None:
    operations.stage(store, 1)
    record = promote(store, PASS, WAIT, REFUSE, is_forced=True)
    assert record.live_version == 1
    assert DeploymentStore(store).current().reason == (
        "promoted by hand, by force although item count (wait): not all shards; "
        "offline recall (refuse): 0.02 beside 0.10"
    )


def test_force_that_was_not_needed_is_not_claimed(store: Store) -> None:
    operations.stage(store, 1)
    assert promote(store, PASS, is_forced=True).reason == "promoted by hand"


def test_nothing_to_promote(store: Store) -> None:
    with pytest.raises(InvalidInputError, match="no version stands by"):
        promote(store)


def test_promote_refuses_when_the_record_has_changed_since_it_was_seen(store: Store) -> None:
    operations.stage(store, 1)
    overview = seen(store, [PASS])
    operations.stage(store, 2)
    with pytest.raises(ConflictError, match="revision 2 was written by somebody else"):
        operations.promote(store, overview, is_forced=True)
    assert history(store)[-1] == (None, 2, False)


def test_no_rollback_without_a_record_or_another_version(store: Store) -> None:
    with pytest.raises(InvalidInputError, match="no other version"):
        operations.roll_back(store)
    operations.stage(store, 1)
    promote(store, PASS)
    with pytest.raises(InvalidInputError, match="no other version"):
        operations.roll_back(store)


def test_no_rollback_to_a_version_that_was_never_live(store: Store) -> None:
    operations.stage(store, 1)
    promote(store, PASS)
    operations.stage(store, 2)
    with pytest.raises(InvalidInputError, match="version 2 stands by but was not live since it was staged"):
        operations.roll_back(store)
    assert history(store)[-1] == (1, 2, False)


def test_no_rollback_to_a_version_that_was_unloaded_meanwhile(store: Store) -> None:
    for version in (1, 2):
        operations.stage(store, version)
        promote(store, PASS)
    operations.stage(store, 3)
    operations.stage(store, 1)
    with pytest.raises(InvalidInputError, match="version 1 stands by but was not live since it was staged"):
        operations.roll_back(store)
