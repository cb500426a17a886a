"""The gates as a table: what passes, what waits, what is refused, and the words that say why."""

from collections.abc import Sequence
from typing import Any

import pytest
from fleets import METRIC, OTHER_STATES, fleet, load, query_service, recall, shard, thresholds, with_shard

from rollout.fleet import Fleet, LoadStatus, SearchSetting, Shadow, State, Traffic
from rollout.gates import (
    GateResult,
    Outcome,
    all_gates,
    canary,
    golden_replay,
    index_recall,
    item_count,
    offline_recall,
    replicas_available,
    scores,
    shadow,
)
from towers.deployment import NO_DEPLOYMENT, Deployment

PASS, WAIT, REFUSE = Outcome.PASS, Outcome.WAIT, Outcome.REFUSE
BOTH = fleet(load(1), load(2))
NAN = float("nan")


def check(result: GateResult, outcome: Outcome, words: str) -> None:
    assert (result.outcome, words in result.explanation) == (outcome, True), result


@pytest.mark.parametrize(
    ("statuses", "outcome", "words"),
    [
        (BOTH, PASS, "all 3 have version 2 available"),
        (fleet(load(1)), WAIT, "shard 0/2 at shard:0 has not begun to load version 2"),
        (with_shard(BOTH, shard(1, error="is not reachable")), WAIT, "shard 1/2 at shard:1 is not reachable"),
        (Fleet(BOTH.shards, [query_service(load(2, State.LOADING))]), WAIT, "query service at query:0 is loading"),
        (with_shard(BOTH, shard(0, load(2, State.FAILED, reason="disk full"))), WAIT, "version 2: disk full"),
        (
            Fleet([], []),
            WAIT,
            "no shard of its layout is configured in TWOTOWER_SHARDS; no query service is configured",
        ),
    ],
)
def test_replicas_available(statuses: Fleet, outcome: Outcome, words: str) -> None:
    check(replicas_available(2, statuses), outcome, words)


def test_replicas_available_names_all_that_are_missing() -> None:
    explanation = replicas_available(2, fleet(load(2, State.BUILDING), num_shards=3)).explanation
    assert all(f"shard {number}/3 at" in explanation for number in range(3))


@pytest.mark.parametrize(
    ("statuses", "outcome", "words"),
    [
        (BOTH, PASS, "largest difference 0.0e+00"),
        (fleet(load(2, golden_difference=5e-5)), PASS, "largest difference 5.0e-05, allowed 1e-04"),
        (
            with_shard(BOTH, shard(1, load(2, golden_difference=2e-4))),
            REFUSE,
            "shard 1/2 at shard:1 differs by 2.0e-04",
        ),
        (with_shard(BOTH, shard(1, load(2, golden_difference=NAN))), REFUSE, "shard 1/2 at shard:1 differs by nan"),
        (
            Fleet(BOTH.shards, [query_service(load(2, golden_difference=1.0))]),
            REFUSE,
            "query service at query:0 differs",
        ),
        (
            with_shard(BOTH, shard(0, load(2, State.FAILED, is_corrupt=True, reason="golden drift of 0.3"))),
            REFUSE,
            "shard 0/2 at shard:0 refuses version 2: golden drift of 0.3",
        ),
        (
            Fleet(fleet(load(1)).shards, [query_service(load(2, State.FAILED, is_corrupt=True, reason="sha256"))]),
            REFUSE,
            "query service at query:0 refuses version 2: sha256",
        ),
        (with_shard(BOTH, shard(0, load(2, State.FAILED, reason="store"))), WAIT, "not yet known of shard 0/2"),
        (with_shard(BOTH, shard(0, error="is not reachable")), WAIT, "not yet known of shard 0/2"),
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
        # A live shard that is lost is taken to have held as much as the others.
        (1, with_shard(BOTH, shard(1, load(1, State.FAILED), load(2, num_items=90))), PASS, "190 items beside 200"),
        (1, with_shard(BOTH, shard(1, load(1, State.FAILED), load(2, num_items=9))), REFUSE, "judged by 1 of 2 shards"),
        (1, with_shard(BOTH, shard(1, load(2, num_items=0))), REFUSE, "100 items beside 200 of version 1, judged by 1"),
        (1, fleet(load(2)), PASS, "no shard has version 1 to compare with"),
        (None, fleet(load(2)), PASS, "200 items; nothing is live"),
        (None, fleet(load(2, num_items=0)), WAIT, "load the catalogue"),
        (None, with_shard(fleet(load(2, num_items=0)), shard(0, load(2, num_items=1))), PASS, "1 items"),
        (1, Fleet([], []), WAIT, "not all shards"),
    ],
)
def test_item_count(live: int | None, statuses: Fleet, outcome: Outcome, words: str) -> None:
    check(item_count(2, live, statuses, statuses, min_item_ratio=0.8), outcome, words)


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


def replicas(*counts: int, catalogues: Sequence[str] = ("1", "1")) -> Fleet:
    """Two replicas of each of two shards; the numbers are their items of version 2."""
    return Fleet(
        [
            shard(
                position // 2,
                load(1),
                load(2, num_items=count, catalogue_version=catalogues[position % 2]),
                address=f"r:{position}",
            )
            for position, count in enumerate(counts)
        ],
        [query_service(load(1), load(2))],
    )


def test_one_replica_of_each_shard_counts() -> None:
    check(item_count(2, 1, *[replicas(100, 100, 70, 70)] * 2, min_item_ratio=0.8), PASS, "170 items beside 200")


def test_replicas_that_count_differently_at_one_state_of_the_catalogue_are_waited_for() -> None:
    result = item_count(2, 1, *[replicas(100, 100, 70, 60)] * 2, min_item_ratio=0.8)
    check(result, WAIT, "replicas of shard 1 do not agree: 70 items at r:2, 60 at r:3")


def test_a_replica_that_is_behind_the_catalogue_may_count_differently() -> None:
    result = item_count(2, 1, *[replicas(100, 99, 70, 69, catalogues=("2", "1"))] * 2, min_item_ratio=0.8)
    check(result, PASS, "168 items beside 200")


def test_items_are_counted_across_layouts() -> None:
    old, new = fleet(load(1)), fleet(load(1, num_items=50), num_shards=4)
    check(item_count(1, 1, new, old, min_item_ratio=0.8), PASS, "200 items beside 200 of version 1")
    check(item_count(1, 1, fleet(load(1, num_items=30), num_shards=4), old, min_item_ratio=0.8), REFUSE, "120 items")
    half = with_shard(old, shard(1, error="is not reachable"))
    check(item_count(1, 1, new, half, min_item_ratio=0.8), PASS, "200 items beside 200 of version 1, judged by 1 of 2")


def ivf(*recalls: float, **fields: Any) -> LoadStatus:
    settings = tuple(
        SearchSetting(10 * 10**position, "nprobe=8", recall, 1e-4) for position, recall in enumerate(recalls)
    )
    measured = {"target_recall": 0.95, "measured_with": "validation queries", "index_type": "IVF64,SQ8"}
    return load(2, search_settings=settings, **{**measured, **fields})


@pytest.mark.parametrize(
    ("statuses", "outcome", "words"),
    [
        (fleet(ivf(0.97, 0.96)), PASS, "0.960 at k=100 with validation queries, on shard 0/2; the target is 0.950"),
        (fleet(ivf(0.97, 0.95)), PASS, "0.950 at k=100"),
        (fleet(ivf(0.97, 0.941)), PASS, "0.941 at k=100"),
        (fleet(ivf(0.97, 0.93)), REFUSE, "0.930 at k=100"),
        (fleet(ivf(0.93, 0.97)), REFUSE, "0.930 at k=10 "),
        (fleet(ivf(0.97, NAN)), REFUSE, "nan at k=100"),
        (
            with_shard(fleet(ivf(0.97)), shard(1, ivf(0.5))),
            REFUSE,
            "0.500 at k=10 with validation queries, on shard 1/2",
        ),
        # At the k that the target is for, where the shard says which.
        (fleet(ivf(0.9, 0.96, 0.9, target_k=100)), PASS, "0.960 at k=100"),
        (fleet(ivf(0.97, 0.93, 0.97, target_k=100)), REFUSE, "0.930 at k=100"),
        (fleet(ivf(0.97, 0.93, target_k=50)), REFUSE, "0.930 at k=100"),
        # Each against its own target.
        (with_shard(fleet(ivf(0.96)), shard(1, ivf(0.9, target_recall=0.5))), PASS, "0.960 at k=10"),
        (BOTH, PASS, "1.000: the search is exact"),
        (fleet(ivf(1.0, index_type="Flat")), PASS, "the search is exact"),
        (fleet(ivf()), WAIT, "shard 0/2 at shard:0 does not say the recall of its IVF64,SQ8"),
        (fleet(ivf(num_items=0, index_type="")), PASS, "the search is exact"),
        (with_shard(fleet(ivf(0.5)), shard(0, load(2, State.BUILDING))), WAIT, "not all shards have version 2"),
        (with_shard(fleet(ivf(0.5)), shard(0, ivf(0.5), error="is not reachable")), WAIT, "not all shards"),
    ],
)
def test_index_recall(statuses: Fleet, outcome: Outcome, words: str) -> None:
    check(index_recall(2, statuses, max_shortfall=0.01), outcome, words)


def scored(version: int, similarity: float, mean: float, deviation: float, **fields: Any) -> LoadStatus:
    return load(version, item_similarity=similarity, score_mean=mean, score_deviation=deviation, **fields)


SOUND = scored(2, 0.1, 0.05, 0.2)
LIVE = scored(1, 0.1, 0.45, 0.2)


@pytest.mark.parametrize(
    ("statuses", "max_shift", "outcome", "words"),
    [
        (fleet(SOUND), None, PASS, "mean 0.050, deviation 0.200, item similarity 0.100"),
        (fleet(scored(2, 0.999, 0.05, 0.2)), None, REFUSE, "a similarity above 0.98"),
        (fleet(scored(2, 0.97, 0.05, 0.2)), None, PASS, "item similarity 0.970"),
        (fleet(scored(2, 0.1, 0.05, 0.0)), None, REFUSE, "a deviation below 0.001"),
        (fleet(scored(2, NAN, 0.05, 0.2)), None, REFUSE, "they must be finite"),
        (fleet(scored(2, 0.1, float("inf"), 0.2)), None, REFUSE, "they must be finite"),
        (with_shard(fleet(SOUND), shard(1, scored(2, 0.1, 0.05, NAN))), None, REFUSE, "they must be finite"),
        # A shard of two twins is not a tower that has collapsed.
        (with_shard(fleet(SOUND), shard(1, scored(2, 1.0, 0.05, 0.2, num_items=2))), None, PASS, "similarity 0.118"),
        (fleet(LIVE, SOUND), None, PASS, "2.0 deviations from version 1's 0.450"),
        (fleet(LIVE, SOUND), 2.5, PASS, "2.0 deviations"),
        (fleet(LIVE, SOUND), 1.5, REFUSE, "at most 1.5 deviations are allowed"),
        (fleet(SOUND), 1.5, PASS, "mean 0.050"),
        (fleet(scored(1, 1.0, 0.05, 0.0), SOUND), 1.5, PASS, "mean 0.050"),
        (fleet(scored(2, 0.0, 1.0, 0.0, num_items=1)), None, PASS, "no shard has more than one item to score"),
        (fleet(scored(2, 0.0, 0.0, 0.0)), None, WAIT, "shard 0/2 at shard:0 does not say the scores of version 2"),
        (with_shard(fleet(SOUND), shard(1, scored(2, 0.0, 0.0, 0.0))), None, WAIT, "shard 1/2 at shard:1 does not say"),
        (fleet(scored(1, 0.0, 0.0, 0.0), SOUND), 1.5, PASS, "mean 0.050"),
        (with_shard(fleet(SOUND), shard(0, scored(2, 1.0, 1.0, 0.0), error="is away")), None, WAIT, "not all shards"),
        (Fleet([], []), None, WAIT, "not all shards"),
    ],
)
def test_scores(statuses: Fleet, max_shift: float | None, outcome: Outcome, words: str) -> None:
    check(scores(2, 1, statuses, statuses, thresholds(max_score_shift=max_shift)), outcome, words)


def shadowed(
    num_queries: int, num_errors: int = 0, overlap: float = 0.8, live_s: float = 0.002, standby_s: float = 0.003
) -> Shadow:
    return Shadow(2, 1, num_queries, num_errors, overlap, live_s, 2 * live_s, standby_s, 2 * standby_s)


@pytest.mark.parametrize(
    ("figures", "staged_s", "limits", "outcome", "words"),
    [
        (None, 0.0, {}, PASS, "0 live queries answered by both; none is asked for"),
        (shadowed(9), 0.0, {}, PASS, "9 live queries, overlap 0.80, 0 failed, p50 3.0 ms (live 2.0), p99 6.0 ms (live"),
        (shadowed(0, 9), 0.0, {}, PASS, "9 live queries, all of which version 2 failed to answer; none is asked for"),
        (None, 10.0, {"min_shadow_queries": 50}, WAIT, "waits for 50, or 60 min more for lack of traffic"),
        (shadowed(49), 10.0, {"min_shadow_queries": 50}, WAIT, "49 live queries"),
        (shadowed(50), 10.0, {"min_shadow_queries": 50}, PASS, "overlap 0.80"),
        # A version whose queries all fail is not waited for until the time is over.
        (shadowed(0, 50), 10.0, {"min_shadow_queries": 50}, REFUSE, "100.00% failed, 1.00% may"),
        (shadowed(98, 2), 10.0, {"min_shadow_queries": 50}, REFUSE, "2.00% failed, 1.00% may"),
        (shadowed(99, 1), 10.0, {"min_shadow_queries": 50}, PASS, "1 failed"),
        (
            None,
            3600.0,
            {"min_shadow_queries": 50},
            PASS,
            "0 live queries answered by both; 50 were asked for, and 60 min",
        ),
        (shadowed(0), 3600.0, {"min_shadow_queries": 50, "min_shadow_overlap": 0.9}, PASS, "0 live queries"),
        (shadowed(3), 3600.0, {"min_shadow_queries": 50, "min_shadow_overlap": 0.9}, REFUSE, "of 0.9 is needed"),
        (shadowed(50), 0.0, {"min_shadow_queries": 50, "min_shadow_overlap": 0.9}, REFUSE, "overlap 0.80"),
        (shadowed(50), 0.0, {"min_shadow_queries": 50, "min_shadow_overlap": 0.7}, PASS, "overlap 0.80"),
        (shadowed(50, overlap=NAN), 0.0, {"min_shadow_queries": 50, "min_shadow_overlap": 0.7}, REFUSE, "overlap nan"),
        (shadowed(50), 0.0, {"min_shadow_queries": 50, "max_shadow_latency_ratio": 1.4}, REFUSE, "p50 of 1.4 times"),
        (shadowed(50), 0.0, {"min_shadow_queries": 50, "max_shadow_latency_ratio": 1.6}, PASS, "p50 3.0 ms (live 2.0)"),
    ],
)
def test_shadow(figures: Shadow | None, staged_s: float, limits: dict[str, Any], outcome: Outcome, words: str) -> None:
    check(shadow(figures, staged_s, thresholds(**limits)), outcome, words)


def traffic(num_requests: int, num_errors: int = 0, p99_s: float = 0.010) -> Traffic:
    return Traffic(2, 2, num_requests, num_errors, p99_s / 2, p99_s)


@pytest.mark.parametrize(
    ("standby", "live", "lasted_s", "outcome", "words"),
    [
        (traffic(0), traffic(500), 10.0, WAIT, "0 of 1000 requests answered, 0 failed; goes on until then, or 60 min"),
        (traffic(999), traffic(500), 10.0, WAIT, "p50 5.0 ms (live 5.0), p99 10.0 ms (live 10.0); goes on"),
        (traffic(1000), traffic(500), 10.0, PASS, "1000 of 1000 requests answered, 0 failed (0.00%, live 0.00%)"),
        # On errors it ends as soon as the limit cannot be kept any more.
        (traffic(10, 10), traffic(500), 10.0, WAIT, "10 failed"),
        (traffic(11, 11), traffic(500), 10.0, REFUSE, "11 failed (100.00%, live 0.00%)"),
        (traffic(2000, 20), traffic(500), 10.0, PASS, "20 failed"),
        (traffic(2000, 21), traffic(500), 10.0, REFUSE, "1.00% may fail"),
        # What fails at both versions is not the new one's fault.
        (traffic(1000, 50), traffic(500, 25), 10.0, PASS, "50 failed (5.00%, live 5.00%)"),
        (traffic(1000, 61), traffic(500, 25), 10.0, REFUSE, "6.00% may fail"),
        # The live version is unknown while nothing asks it.
        (traffic(1000), traffic(0), 10.0, PASS, "1000 of 1000"),
        (traffic(1000, 11), traffic(0), 10.0, REFUSE, "11 failed; 1.00% may fail"),
        # Latency is judged at the end, by enough requests.
        (traffic(999, p99_s=0.1), traffic(500), 10.0, WAIT, "p99 100.0 ms (live 10.0)"),
        (traffic(1000, p99_s=0.1), traffic(500), 10.0, REFUSE, "a p99 of 2.0 times the live one's is allowed"),
        (traffic(1000, p99_s=0.02), traffic(500), 10.0, PASS, "p99 20.0 ms (live 10.0)"),
        (traffic(1000, p99_s=NAN), traffic(500), 10.0, REFUSE, "p99 nan"),
        # Without traffic it ends by the time.
        (traffic(0), traffic(0), 3600.0, PASS, "0 of 1000 requests answered, 0 failed; 60 min have passed"),
        (traffic(5), traffic(500), 3600.0, PASS, "5 of 1000"),
        (traffic(5, 1), traffic(500), 3600.0, REFUSE, "1 failed"),
        (traffic(5, p99_s=0.1), traffic(500), 3600.0, REFUSE, "a p99 of 2.0 times"),
    ],
)
def test_canary(standby: Traffic, live: Traffic, lasted_s: float, outcome: Outcome, words: str) -> None:
    check(canary(standby, live, lasted_s, thresholds()), outcome, words)


def record(live: int | None, standby: int | None, **fields: Any) -> Deployment:
    return NO_DEPLOYMENT.model_copy(update={"revision": 1, "live_version": live, "standby_version": standby, **fields})


def ask(deployment: Deployment, statuses: Fleet, **changes: Any) -> dict[str, Outcome]:
    results = all_gates(deployment, statuses, recall(0.1), recall(0.1), 0.0, 0.0, thresholds(**changes))
    return {result.name: result.outcome for result in results}


@pytest.mark.parametrize("state", OTHER_STATES)
def test_no_gate_about_replicas_passes_in_another_state(state: State) -> None:
    assert ask(record(1, 2), with_shard(BOTH, shard(1, load(1), load(2, state)))) == {
        "replicas": WAIT,
        "golden replay": WAIT,
        "item count": WAIT,
        "offline recall": PASS,
        "index recall": WAIT,
        "scores": WAIT,
        "shadow": PASS,
    }


def test_nothing_stands_by() -> None:
    assert ask(record(1, None), BOTH) == {}


def test_without_a_live_version_nothing_is_compared_with_it() -> None:
    gates = ask(record(None, 2), BOTH)
    assert set(gates.values()) == {PASS}
    assert "shadow" not in gates


def test_a_canary_is_judged_only_while_it_runs() -> None:
    assert "canary" not in ask(record(1, 2), BOTH)
    assert ask(record(1, 2, canary_share=0.1), BOTH)["canary"] is WAIT


def test_all_gates_use_the_thresholds() -> None:
    statuses = Fleet(
        fleet(load(1), scored(2, 0.9, 0.1, 0.1, num_items=50)).shards,
        [query_service(load(1), load(2), shadow=shadowed(5), traffic=[traffic(9), Traffic(1, 2, 9, 0, 0.001, 0.001)])],
    )
    deployment = record(1, 2, canary_share=0.1)

    def outcomes(metrics: dict[str, float], **changes: Any) -> dict[str, Outcome]:
        limits = thresholds(recall_metric="m", canary_min_requests=9, **changes)
        results = all_gates(deployment, statuses, metrics, {"m": 1.0}, 0.0, 0.0, limits)
        return {result.name: result.outcome for result in results if result.outcome is not PASS}

    assert outcomes(
        {"m": 0.5}, max_item_similarity=0.5, min_shadow_queries=5, min_shadow_overlap=0.9, max_canary_latency_ratio=5.0
    ) == dict.fromkeys(("item count", "offline recall", "scores", "shadow", "canary"), REFUSE)
    assert outcomes({"m": 0.5}, max_recall_drop=0.5, min_item_ratio=0.5, max_canary_latency_ratio=20.0) == {}


def test_the_gates_ask_the_layout_that_the_version_stands_by_on() -> None:
    old, new = fleet(load(1)), fleet(load(1, num_items=50), num_shards=4)
    both = Fleet([*old.shards, *new.shards], old.query_services)
    moved = record(1, 1, live_num_shards=2, standby_num_shards=4)
    assert set(ask(moved, both).values()) == {PASS}
    assert ask(moved, old)["replicas"] is WAIT
    assert ask(record(1, 1, standby_num_shards=4), both)["item count"] is PASS, "None is the first layout"
    lacking = Fleet([*old.shards, *with_shard(new, shard(3, num_shards=4)).shards], old.query_services)
    assert ask(moved, lacking)["replicas"] is WAIT
    # A shard of a layout that nothing stands by on does not matter.
    assert set(ask(record(None, 1), Fleet([*old.shards, shard(0, num_shards=4)], old.query_services)).values()) == {
        PASS
    }
