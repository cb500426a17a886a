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
    return Overview(tuple(DeploymentStore(store).history()), (1, 2, 3), fleet(load(1)), tuple(gates), 0.0)


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


def begin_canary(store: Store, share: float, *gates: GateResult, is_forced: bool = False) -> Deployment:
    return operations.begin_canary(store, seen(store, gates), share, is_forced=is_forced)


@pytest.fixture
def standing_by(store: Store) -> Store:
    """Version 1 is live, version 2 stands by."""
    operations.stage(store, 1)
    promote(store, PASS)
    operations.stage(store, 2)
    return store


def test_a_canary_and_its_end(standing_by: Store) -> None:
    record = begin_canary(standing_by, 0.05, PASS)
    assert (record.live_version, record.standby_version, record.canary_share, record.held) == (1, 2, 0.05, False)
    assert record.reason == "a canary by hand"
    assert begin_canary(standing_by, 0.5, PASS, GateResult("canary", Outcome.WAIT, "0 of 9")).canary_share == 0.5
    ended = operations.end_canary(standing_by)
    assert (ended.canary_share, ended.held) == (0.0, True)
    assert DeploymentStore(standing_by).current().reason == "canary ended by hand; version 2 is held"
    with pytest.raises(InvalidInputError, match="no canary runs"):
        operations.end_canary(standing_by)


def test_a_canary_asks_the_gates(standing_by: Store) -> None:
    with pytest.raises(GateRefusedError, match=r"version 2 gets no share of the requests: offline recall .*--force"):
        begin_canary(standing_by, 0.05, REFUSE)
    record = begin_canary(standing_by, 0.05, REFUSE, is_forced=True)
    assert record.reason == "a canary by hand, by force although offline recall (refuse): 0.02 beside 0.10"


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_that_is_none(standing_by: Store, share: float) -> None:
    with pytest.raises(InvalidInputError, match="give a number above 0 and below 1"):
        begin_canary(standing_by, share, PASS)
    assert len(history(standing_by)) == 3


def test_no_canary_without_two_slots(store: Store) -> None:
    with pytest.raises(InvalidInputError, match="no version stands by"):
        begin_canary(store, 0.1, PASS)
    operations.stage(store, 1)
    with pytest.raises(InvalidInputError, match="nothing is live"):
        begin_canary(store, 0.1, PASS)


def test_a_canary_of_another_layout(store: Store) -> None:
    operations.stage(store, 1)
    promote(store, PASS)
    operations.stage(store, 1, 4)
    assert begin_canary(store, 0.1, PASS).canary_share == 0.1


def test_promoting_ends_a_canary(standing_by: Store) -> None:
    begin_canary(standing_by, 0.05, PASS)
    assert promote(standing_by, PASS).canary_share == 0.0


def test_rolling_back_ends_the_canary_of_a_version_that_was_not_live(standing_by: Store) -> None:
    begin_canary(standing_by, 0.05, PASS)
    record = operations.roll_back(standing_by)
    assert (record.live_version, record.standby_version, record.held, record.canary_share) == (1, 2, True, 0.0)


def test_rolling_back_to_a_version_with_a_canary(standing_by: Store) -> None:
    promote(standing_by, PASS)
    begin_canary(standing_by, 0.05, PASS)
    record = operations.roll_back(standing_by)
    assert (record.live_version, record.standby_version, record.held, record.canary_share) == (1, 2, True, 0.0)


def test_the_live_version_moves_to_another_layout_and_back(store: Store) -> None:
    operations.stage(store, 1)
    promote(store, PASS)
    operations.stage(store, 1, 4)
    with pytest.raises(InvalidInputError, match="was not live since it was staged"):
        operations.roll_back(store)
    moved = promote(store, PASS)
    assert (moved.live, moved.standby, moved.held) == ((1, 4), (1, None), True)
    with pytest.raises(InvalidInputError, match="version 1 is live already"):
        operations.stage(store, 1)
    back = operations.roll_back(store)
    assert (back.live, back.standby, back.held) == ((1, None), (1, 4), True)


def test_a_new_version_is_staged_on_the_live_layout(store: Store) -> None:
    operations.stage(store, 1, 4)
    promote(store, PASS)
    assert operations.stage(store, 2).standby == (2, 4)
