"""The gates as a table: what passes, what waits, what is refused, and the words that say why."""

import pytest
from fleets import METRIC, OTHER_STATES, fleet, load, query_service, recall, shard, with_shard

from rollout.fleet import Fleet, State
from rollout.gates import (
    GateResult,
    Outcome,
    Thresholds,
    all_gates,
    golden_replay,
    item_count,
    offline_recall,
    replicas_available,
)

PASS, WAIT, REFUSE = Outcome.PASS, Outcome.WAIT, Outcome.REFUSE
BOTH = fleet(load(1), load(2))
NAN = float("nan")


def check(result: GateResult, outcome: Outcome, words: str) -> None:
    assert (result.outcome, words in result.explanation) == (outcome, True), result


@pytest.mark.parametrize(
    ("statuses", "outcome", "words"),
    [
        (BOTH, PASS, "all 3 have version 2 available"),
        (fleet(load(1)), WAIT, "shard 0 at shard:0 has not begun to load version 2"),
        (with_shard(BOTH, shard(1, error="is not reachable")), WAIT, "shard 1 at shard:1 is not reachable"),
        (Fleet(BOTH.shards, [query_service(load(2, State.LOADING))]), WAIT, "query service at query:0 is loading"),
        (with_shard(BOTH, shard(0, load(2, State.FAILED, reason="disk full"))), WAIT, "version 2: disk full"),
        (Fleet([], []), WAIT, "no shard is configured; no query service is configured"),
    ],
)
def test_replicas_available(statuses: Fleet, outcome: Outcome, words: str) -> None:
    check(replicas_available(2, statuses), outcome, words)


def test_replicas_available_names_all_that_are_missing() -> None:
    explanation = replicas_available(2, fleet(load(2, State.BUILDING), num_shards=3)).explanation
    assert all(f"shard {number} at" in explanation for number in range(3))


@pytest.mark.parametrize(
    ("statuses", "outcome", "words"),
    [
        (BOTH, PASS, "largest difference 0.0e+00"),
        (fleet(load(2, golden_difference=5e-5)), PASS, "largest difference 5.0e-05, allowed 1e-04"),
        (with_shard(BOTH, shard(1, load(2, golden_difference=2e-4))), REFUSE, "shard 1 at shard:1 differs by 2.0e-04"),
        (with_shard(BOTH, shard(1, load(2, golden_difference=NAN))), REFUSE, "shard 1 at shard:1 differs by nan"),
        (
            Fleet(BOTH.shards, [query_service(load(2, golden_difference=1.0))]),
            REFUSE,
            "query service at query:0 differs",
        ),
        (
            with_shard(BOTH, shard(0, load(2, State.FAILED, is_corrupt=True, reason="golden drift of 0.3"))),
            REFUSE,
            "shard 0 at shard:0 refuses version 2: golden drift of 0.3",
        ),
        (
            Fleet(fleet(load(1)).shards, [query_service(load(2, State.FAILED, is_corrupt=True, reason="sha256"))]),
            REFUSE,
            "query service at query:0 refuses version 2: sha256",
        ),
        (with_shard(BOTH, shard(0, load(2, State.FAILED, reason="store"))), WAIT, "not yet known of shard 0"),
        (with_shard(BOTH, shard(0, error="is not reachable")), WAIT, "not yet known of shard 0"),
        # The other version's failure is not this one's.
        (with_shard(BOTH, shard(0, load(1, State.FAILED, is_corrupt=True), load(2))), PASS, "largest difference"),
        (Fleet([], []), WAIT, "any replica"),
    ],
)
def test_golden_replay(statuses: Fleet, outcome: Outcome, words: str) -> None:
    check(golden_replay(2, statuses), outcome, words)


@pytest.mark.parametrize(
    ("live", "statuses", "outcome", "words"),
    [
        (1, BOTH, PASS, "200 items beside 200 of version 1, at least 80% of them are needed"),
        (1, fleet(load(1), load(2, num_items=80)), PASS, "160 items beside 200"),
        (1, fleet(load(1), load(2, num_items=79)), REFUSE, "158 items beside 200"),
        (1, fleet(load(1), load(2, num_items=500)), PASS, "1000 items beside 200"),
        # The sum counts: one shard may have lost items that another has won.
        (1, with_shard(fleet(load(1), load(2, num_items=150)), shard(0, load(1), load(2, num_items=20))), PASS, "170"),
        (1, fleet(load(1), load(2, num_items=0)), REFUSE, "0 items"),
        (1, fleet(load(1, num_items=0), load(2, num_items=0)), REFUSE, "0 items"),
        (1, fleet(load(1, num_items=0), load(2)), PASS, "200 items beside 0"),
        (1, with_shard(BOTH, shard(1, load(1), load(2, State.BUILDING))), WAIT, "not all shards have version 2"),
        (1, with_shard(BOTH, shard(1, error="is not reachable")), WAIT, "not all shards have version 2"),
        # Compared on the shards that have both.
        (1, with_shard(BOTH, shard(1, load(1, State.FAILED), load(2, num_items=9))), PASS, "100 items beside 100"),
        (1, with_shard(BOTH, shard(1, load(2, num_items=0))), PASS, "100 items beside 100"),
        (1, fleet(load(2)), PASS, "no shard has version 1 to compare with"),
        (None, fleet(load(2)), PASS, "200 items; nothing is live"),
        (None, fleet(load(2, num_items=0)), WAIT, "load the catalogue"),
        (None, with_shard(fleet(load(2, num_items=0)), shard(0, load(2, num_items=1))), PASS, "1 items"),
        (1, Fleet([], []), WAIT, "not all shards"),
    ],
)
def test_item_count(live: int | None, statuses: Fleet, outcome: Outcome, words: str) -> None:
    check(item_count(2, live, statuses, min_item_ratio=0.8), outcome, words)


@pytest.mark.parametrize(
    ("metrics", "live_metrics", "outcome", "words"),
    [
        (recall(0.13), recall(0.10), PASS, "is 0.1300, the live one's 0.1000, at least 0.0900"),
        (recall(0.0901), recall(0.10), PASS, "at least 0.0900 is needed"),
        (recall(0.0899), recall(0.10), REFUSE, "is 0.0899, the live one's 0.1000, at least 0.0900"),
        (recall(0.0), recall(0.0), PASS, "0.0000"),
        (recall(NAN), recall(0.10), REFUSE, "is nan"),
        ({}, recall(0.10), REFUSE, "the manifest has no test.recall_at_10"),
        ({"validation.recall_at_10": 0.9}, recall(0.10), REFUSE, "the manifest has no test.recall_at_10"),
        (recall(0.13), {}, PASS, "no live figure to compare with"),
        ({}, {}, PASS, "no live figure to compare with"),
    ],
)
def test_offline_recall(
    metrics: dict[str, float], live_metrics: dict[str, float], outcome: Outcome, words: str
) -> None:
    check(offline_recall(metrics, live_metrics, METRIC, max_recall_drop=0.1), outcome, words)


@pytest.mark.parametrize("state", OTHER_STATES)
def test_no_gate_about_replicas_passes_in_another_state(state: State) -> None:
    statuses = with_shard(BOTH, shard(1, load(1), load(2, state)))
    results = all_gates(2, 1, statuses, recall(0.1), recall(0.1), Thresholds(METRIC, 0.1, 0.8))
    assert {result.name: result.outcome for result in results} == {
        "replicas": WAIT,
        "golden replay": WAIT,
        "item count": WAIT,
        "offline recall": PASS,
    }


def test_all_gates_use_the_thresholds() -> None:
    statuses = fleet(load(1), load(2, num_items=50))
    strict = all_gates(2, 1, statuses, {"m": 0.5}, {"m": 1.0}, Thresholds("m", 0.1, 0.8))
    lax = all_gates(2, 1, statuses, {"m": 0.5}, {"m": 1.0}, Thresholds("m", 0.5, 0.5))
    assert [result.outcome for result in strict] == [PASS, PASS, REFUSE, REFUSE]
    assert [result.outcome for result in lax] == [PASS, PASS, PASS, PASS]
