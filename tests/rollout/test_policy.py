"""The policy as a truth table, and what must hold for any input."""

from datetime import UTC, datetime
from typing import Any

import pytest
from fleets import OTHER_STATES, fleet, load, query_service, shard, with_shard
from hypothesis import given
from hypothesis import strategies as st

from rollout.fleet import Fleet, LoadStatus, Replica, State
from rollout.gates import GateResult, Outcome
from rollout.policy import Canary, Hold, Promote, Stage, Wait, next_action, untried
from towers.deployment import NO_DEPLOYMENT, Deployment, canaried, held, promoted, rolled_back, staged

CANARY_PASS, CANARY_WAIT, CANARY_REFUSE = (GateResult("canary", outcome, "9 of 9 requests") for outcome in Outcome)
PASS = GateResult("gate", Outcome.PASS, "fine")
WAIT = GateResult("item count", Outcome.WAIT, "not known yet")
REFUSE = GateResult("offline recall", Outcome.REFUSE, "0.05 beside 0.13")
NOTHING = fleet()
BOTH = fleet(load(1), load(2))


def record(live: int | None, standby: int | None, is_held: bool = False, **fields: Any) -> Deployment:
    return Deployment(
        revision=7,
        live_version=live,
        standby_version=standby,
        held=is_held,
        reason="as the test says",
        created=datetime.now(UTC),
        **fields,
    )


ROWS = {
    # name: (record, published, statuses, gates, expected action, words that the reason holds)
    "nothing published": (NO_DEPLOYMENT, (), NOTHING, (), Wait, "no checkpoint is published"),
    "the first one published": (NO_DEPLOYMENT, (1,), NOTHING, (), Stage(1), ""),
    "many published at once: the newest": (NO_DEPLOYMENT, (1, 2, 5), NOTHING, (), Stage(5), ""),
    "numbers may have gaps and any order": (record(3, None), (9, 3, 4), NOTHING, (), Stage(9), ""),
    "first one loading": (record(None, 1), (1,), fleet(load(1, State.LOADING)), (PASS,), Wait, "is loading version 1"),
    "first one available": (record(None, 1), (1,), fleet(load(1)), (PASS,), Promote(1), ""),
    "first one refused": (record(None, 1), (1,), fleet(load(1)), (REFUSE,), Hold(1, str(REFUSE)), ""),
    "first one held": (record(None, 1, True), (1,), fleet(load(1)), (PASS,), Wait, "version 1 is held"),
    "first one held, a newer one": (record(None, 1, True), (1, 2), fleet(load(1)), (PASS,), Stage(2), ""),
    "only live": (record(1, None), (1,), BOTH, (), Wait, "version 1 is live; no newer"),
    "a newer one while only live": (record(1, None), (1, 2), BOTH, (), Stage(2), ""),
    "standby available": (record(1, 2), (1, 2), BOTH, (PASS, PASS), Promote(2), ""),
    "a newer one while standby loads": (record(1, 2), (1, 2, 3), BOTH, (PASS,), Stage(3), ""),
    "a newer one while standby is refused": (record(1, 2), (1, 2, 3), BOTH, (REFUSE,), Stage(3), ""),
    "a newer one while standby is held": (record(1, 2, True), (1, 2, 3), BOTH, (REFUSE,), Stage(3), ""),
    "standby held": (record(1, 2, True), (1, 2), BOTH, (PASS,), Wait, "version 2 is held"),
    "standby held and refused": (record(1, 2, True), (1, 2), BOTH, (REFUSE,), Wait, "version 2 is held"),
    "standby was deleted from the store": (record(1, 2), (1,), BOTH, (PASS,), Promote(2), ""),
    "old one kept for rollback": (record(2, 1), (1, 2), BOTH, (PASS,), Wait, "version 1 is kept for a rollback"),
    "old one kept, its gates refuse": (record(2, 1), (1, 2), BOTH, (REFUSE,), Wait, "kept for a rollback"),
    "old one kept, a newer one": (record(2, 1), (1, 2, 3), BOTH, (PASS,), Stage(3), ""),
    "one gate of three waits": (record(1, 2), (1, 2), BOTH, (PASS, WAIT, PASS), Wait, "item count: not known yet"),
    "one gate of three refuses": (record(1, 2), (1, 2), BOTH, (PASS, WAIT, REFUSE), Hold(2, str(REFUSE)), ""),
    "two gates refuse: both are named": (
        record(1, 2),
        (1, 2),
        BOTH,
        (REFUSE, REFUSE),
        Hold(2, f"{REFUSE}; {REFUSE}"),
        "",
    ),
    "refused before all have it": (record(1, 2), (1, 2), fleet(load(1)), (REFUSE,), Hold(2, str(REFUSE)), ""),
    "no gate given, not available": (record(1, 2), (1, 2), fleet(load(1)), (), Wait, "has not begun to load version 2"),
    "a shard is unreachable": (
        record(1, 2),
        (1, 2),
        with_shard(BOTH, shard(1, error="is not reachable")),
        (PASS,),
        Wait,
        "shard 1/2 at shard:1 is not reachable",
    ),
    "an unreachable shard's old answer does not count": (
        record(1, 2),
        (1, 2),
        with_shard(BOTH, shard(1, load(2), error="is not reachable")),
        (PASS,),
        Wait,
        "is not reachable",
    ),
    "a shard failed for now": (
        record(1, 2),
        (1, 2),
        with_shard(BOTH, shard(0, load(1), load(2, State.FAILED, reason="the store is not reachable"))),
        (PASS,),
        Wait,
        "failed to load version 2: the store is not reachable",
    ),
    "the query service lags": (
        record(1, 2),
        (1, 2),
        Fleet(BOTH.shards, [query_service(load(1), load(2, State.LOADING))]),
        (PASS,),
        Wait,
        "query service at query:0 is loading version 2",
    ),
    "standby available on its layout": (
        record(1, 1, live_num_shards=2, standby_num_shards=4),
        (1,),
        Fleet([*fleet(load(1)).shards, *fleet(load(1), num_shards=4).shards], BOTH.query_services),
        (PASS,),
        Promote(1),
        "",
    ),
    "standby not available on its layout": (
        record(1, 1, live_num_shards=2, standby_num_shards=4),
        (1,),
        fleet(load(1)),
        (PASS,),
        Wait,
        "no shard of its layout",
    ),
    "the former layout of the live version": (
        record(1, 1, True, live_num_shards=4, standby_num_shards=2),
        (1,),
        BOTH,
        (PASS,),
        Wait,
        "its other layout is left alone",
    ),
    "the former layout, a newer version": (
        record(1, 1, True, live_num_shards=4, standby_num_shards=2),
        (1, 2),
        BOTH,
        (PASS,),
        Stage(2),
        "",
    ),
    "no shard configured": (record(1, 2), (1, 2), Fleet([], BOTH.query_services), (PASS,), Wait, "no shard"),
    "no query service configured": (record(1, 2), (1, 2), Fleet(BOTH.shards, []), (PASS,), Wait, "no query service"),
}


@pytest.mark.parametrize("name", ROWS)
def test_truth_table(name: str) -> None:
    deployment, published, statuses, gates, expected, words = ROWS[name]
    action = next_action(deployment, published, statuses, gates, 0.0)
    if expected is Wait:
        assert isinstance(action, Wait)
        assert words in action.reason
    else:
        assert action == expected


ON_CANARY = record(1, 2, canary_share=0.1)
CANARY_ROWS = {
    "it is asked for": (record(1, 2), (PASS,), BOTH, 0.1, Canary(2, 0.1)),
    "it is not asked for": (record(1, 2), (PASS,), BOTH, 0.0, Promote(2)),
    "a gate waits": (record(1, 2), (PASS, WAIT), BOTH, 0.1, Wait),
    "a gate refuses": (record(1, 2), (PASS, REFUSE), BOTH, 0.1, Hold(2, str(REFUSE))),
    "a replica lacks it": (record(1, 2), (PASS,), fleet(load(1)), 0.1, Wait),
    "nothing is live": (record(None, 2), (PASS,), BOTH, 0.1, Promote(2)),
    "another layout of one version": (record(2, 2, live_num_shards=9), (PASS,), BOTH, 0.1, Canary(2, 0.1)),
    "it runs": (ON_CANARY, (PASS, CANARY_WAIT), BOTH, 0.1, Wait),
    "it is well": (ON_CANARY, (PASS, CANARY_PASS), BOTH, 0.1, Promote(2)),
    "it is bad": (ON_CANARY, (PASS, CANARY_REFUSE), BOTH, 0.1, Hold(2, str(CANARY_REFUSE))),
    "it is well, another gate refuses": (ON_CANARY, (REFUSE, CANARY_PASS), BOTH, 0.1, Hold(2, str(REFUSE))),
    "it is well, a replica is away": (ON_CANARY, (PASS, CANARY_PASS), fleet(load(1)), 0.1, Wait),
    "it is bad, a replica is away": (ON_CANARY, (CANARY_REFUSE,), fleet(load(1)), 0.1, Hold(2, str(CANARY_REFUSE))),
    "by hand, it is well": (ON_CANARY, (PASS, CANARY_PASS), BOTH, 0.0, Promote(2)),
    "by hand, it is bad": (ON_CANARY, (PASS, CANARY_REFUSE), BOTH, 0.0, Hold(2, str(CANARY_REFUSE))),
    "by hand, of a held one": (record(1, 2, True, canary_share=0.1), (PASS, CANARY_PASS), BOTH, 0.1, Wait),
    "by hand, of a held one that is refused": (
        record(1, 2, True, canary_share=0.1),
        (REFUSE, CANARY_WAIT),
        BOTH,
        0.1,
        Wait,
    ),
    "by hand, of a held one, it is bad": (
        record(1, 2, True, canary_share=0.1),
        (REFUSE, CANARY_REFUSE),
        BOTH,
        0.1,
        Hold(2, str(CANARY_REFUSE)),
    ),
    "by hand, of an older one": (record(2, 1, canary_share=0.1), (PASS, CANARY_PASS), BOTH, 0.1, Wait),
    "by hand, of an older one, it is bad": (
        record(2, 1, canary_share=0.1),
        (PASS, CANARY_REFUSE),
        BOTH,
        0.1,
        Hold(1, str(CANARY_REFUSE)),
    ),
    "a canary's figures without a canary": (record(1, 2, True), (CANARY_REFUSE,), BOTH, 0.1, Wait),
}


@pytest.mark.parametrize("name", CANARY_ROWS)
def test_canary_truth_table(name: str) -> None:
    deployment, gates, statuses, share, expected = CANARY_ROWS[name]
    action = next_action(deployment, (1, 2), statuses, gates, share)
    assert isinstance(action, Wait) if expected is Wait else action == expected


def test_a_newer_version_takes_the_place_of_a_canary() -> None:
    assert next_action(ON_CANARY, (1, 2, 3), BOTH, (PASS, CANARY_WAIT), 0.1) == Stage(3)


@pytest.mark.parametrize("state", OTHER_STATES)
def test_every_state_but_available_waits(state: State) -> None:
    statuses = with_shard(BOTH, shard(1, load(1), load(2, state, reason="of a reason")))
    assert isinstance(next_action(record(1, 2), (1, 2), statuses, (PASS,), 0.0), Wait)


versions = st.integers(1, 6)
slots = st.none() | versions
loads = st.lists(
    st.builds(LoadStatus, version=versions, state=st.sampled_from(State), is_corrupt=st.booleans()),
    max_size=4,
    unique_by=lambda load: load.version,
)
errors = st.sampled_from(["", "", "", "is not reachable"])
fleets = st.builds(
    Fleet,
    shards=st.lists(
        st.builds(
            Replica, st.just("shard"), st.just("a:1"), st.just(0), st.sampled_from([2, 4]), loads=loads, error=errors
        ),
        max_size=3,
    ),
    query_services=st.lists(
        st.builds(
            Replica,
            st.just("query service"),
            st.just("b:1"),
            loads=loads,
            error=errors,
            layouts=st.frozensets(st.sampled_from([2, 4])),
        ),
        max_size=2,
    ),
) | st.builds(fleet, st.builds(load, versions))
gate_results = st.lists(st.sampled_from([PASS, PASS, WAIT, REFUSE, CANARY_PASS, CANARY_REFUSE]), max_size=4)
shares = st.sampled_from([0.0, 0.1])
layouts = st.sampled_from([None, 2, 4])
records = st.builds(
    record, slots, slots, st.booleans(), live_num_shards=layouts, standby_num_shards=layouts, canary_share=shares
).filter(lambda record: record.standby_version is None or record.live != record.standby)


@given(records, st.lists(versions), fleets, gate_results, shares)
def test_what_it_never_does(
    deployment: Deployment, published: list[int], statuses: Fleet, gates: list[GateResult], share: float
) -> None:
    live, standby = deployment.live_version or 0, deployment.standby_version or 0
    match next_action(deployment, published, statuses, gates, share):
        case Stage(version):
            assert version == max(published)
            assert version > max(live, standby)
        case (Promote(version) | Canary(version)) as action:
            assert version == standby >= live
            assert not deployment.held
            assert all(gate.outcome is Outcome.PASS for gate in gates)
            needed = statuses.on(deployment.standby_num_shards)
            assert needed.shards
            assert needed.query_services
            for replica in needed.query_services:
                assert needed.shards[0].num_shards in replica.layouts
            for replica in needed.replicas:
                assert replica.error == ""
                status = replica.load_of(version)
                assert status is not None
                assert status.state is State.AVAILABLE
            if isinstance(action, Canary):
                assert action.share == share > deployment.canary_share
                assert 0 < live <= standby
        case Hold(version, reason):
            assert version == standby
            assert not deployment.held or deployment.canary_share, "a record that changes nothing would be written"
            assert any(gate.outcome is Outcome.REFUSE and str(gate) in reason for gate in gates)
        case Wait(reason):
            assert reason


@given(records, st.lists(versions), fleets, gate_results, shares)
def test_it_comes_to_rest(
    deployment: Deployment, published: list[int], statuses: Fleet, gates: list[GateResult], share: float
) -> None:
    """While nothing else changes, at most three records are written: staged, a canary, promoted or held."""
    for _ in range(4):
        match next_action(deployment, published, statuses, gates, share):
            case Stage(version):
                deployment = staged(deployment, version, "")
            case Canary():
                deployment = canaried(deployment, share, "")
            case Promote():
                deployment = promoted(deployment, "")
            case Hold():
                deployment = held(deployment, "")
            case Wait():
                return
    raise AssertionError("it goes on and on")


def test_untried_versions_are_newer_than_any_that_was_named() -> None:
    first = staged(NO_DEPLOYMENT, 1, "")
    live = promoted(first, "")
    history = [first, live, staged(live, 4, "")]
    assert untried((1, 2, 3, 4), history) == ()
    assert untried((1, 2, 3, 4, 5, 6), history) == (5, 6)
    assert untried((1, 2), []) == (1, 2)


def test_a_version_that_was_rolled_back_does_not_come_back_through_the_back_door() -> None:
    """Staging an old version by hand takes the rolled back one out of the record; automation must leave it out."""
    history = [staged(NO_DEPLOYMENT, 1, "")]
    history.append(promoted(history[-1], ""))
    history.append(staged(history[-1], 2, ""))
    history.append(promoted(history[-1], ""))
    history.append(staged(history[-1], 3, ""))
    history.append(promoted(history[-1], ""))
    history.append(rolled_back(history[-1], "3 is bad"))
    history.append(staged(history[-1], 1, "by hand"))
    assert history[-1].versions == (2, 1)
    action = next_action(history[-1], untried((1, 2, 3), history), BOTH, (PASS,), 0.0)
    assert isinstance(action, Wait)
