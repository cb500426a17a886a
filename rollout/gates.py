"""Gates: what must hold before a version goes live, each a pure function that answers pass, wait or refuse.

Deliberately does not know where manifests and statuses come from, nor what is done about an answer.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from rollout.fleet import Fleet, LoadStatus, Replica, SearchSetting, Shadow, State, Traffic
from towers.deployment import Deployment
from towers.tower import GOLDEN_TOLERANCE

CANARY = "canary"
"""Name of the gate that a running canary adds."""
_EXACT = "Flat"
_MINUTE_S = 60.0
_HOUR_S = 3600.0


class Outcome(Enum):
    """A gate's answer."""

    PASS = "pass"  # noqa: S105
    WAIT = "wait"
    """Not decidable yet: ask again."""
    REFUSE = "refuse"
    """The version must not go live."""


@dataclass(frozen=True)
class GateResult:
    """A gate's answer and its figure in words."""

    name: str
    outcome: Outcome
    explanation: str

    def __str__(self) -> str:
        return f"{self.name}: {self.explanation}"


@dataclass(frozen=True)
class Thresholds:
    """Where the gates draw the line. `rollout.settings` says what each is for and has the defaults."""

    recall_metric: str
    max_recall_drop: float
    min_item_ratio: float
    max_recall_shortfall: float
    max_item_similarity: float
    min_score_deviation: float
    max_score_shift: float | None
    min_shadow_queries: int
    max_shadow_wait_s: float
    max_shadow_error_share: float
    min_shadow_overlap: float | None
    max_shadow_latency_ratio: float | None
    canary_share: float
    canary_min_requests: int
    canary_max_s: float
    max_canary_error_share: float
    max_canary_latency_ratio: float


def all_gates(
    deployment: Deployment,
    fleet: Fleet,
    metrics: Mapping[str, float],
    live_metrics: Mapping[str, float],
    staged_s: float,
    recorded_s: float,
    thresholds: Thresholds,
) -> tuple[GateResult, ...]:
    """Asks every gate about the version that stands by; none when nothing does.

    Args:
        deployment: The current record.
        fleet: All replicas of all layouts.
        metrics: Offline metrics in the manifest of the version that stands by.
        live_metrics: Those of the live version; empty when nothing is live.
        staged_s: Seconds since the version was put on standby.
        recorded_s: Seconds since the current record was written.
        thresholds: Where the line is.
    """
    version, live_version, revision = deployment.standby_version, deployment.live_version, deployment.revision
    if version is None:
        return ()
    standby, live = fleet.on(deployment.standby_num_shards), fleet.on(deployment.live_num_shards)
    results = [
        replicas_available(version, standby),
        golden_replay(version, standby),
        item_count(version, live_version, standby, live, thresholds.min_item_ratio),
        offline_recall(metrics, live_metrics, thresholds.recall_metric, thresholds.max_recall_drop),
        index_recall(version, standby, thresholds.max_recall_shortfall),
        scores(version, live_version, standby, live, thresholds),
    ]
    if live_version is not None:
        results.append(shadow(fleet.shadow_of(version, live_version), staged_s, thresholds))
        if deployment.canary_share:
            traffic, live_traffic = (fleet.traffic_of(slot, revision) for slot in (deployment.standby, deployment.live))
            results.append(canary(traffic, live_traffic, recorded_s, thresholds))
    return tuple(results)


def replicas_available(version: int, fleet: Fleet) -> GateResult:
    """Waits until every shard of the layout and every query service says that the version is AVAILABLE.

    A query service must know the layout too: one that does not would go on asking the former one.
    """
    missing = [_absence(version, replica) for replica in fleet.replicas if not replica.serves(version)]
    missing += [
        f"{replica.name} does not know the layout of {num_shards} shards: name it in its TWOTOWER_SHARDS"
        for num_shards in {shard.num_shards for shard in fleet.shards}
        for replica in fleet.query_services
        if replica.serves(version) and num_shards not in replica.layouts
    ]
    if not fleet.shards:
        missing.append("no shard of its layout is configured in TWOTOWER_SHARDS")
    if not fleet.query_services:
        missing.append("no query service is configured")
    if missing:
        return GateResult("replicas", Outcome.WAIT, "; ".join(missing))
    return GateResult("replicas", Outcome.PASS, f"all {len(fleet.replicas)} have version {version} available")


def golden_replay(version: int, fleet: Fleet) -> GateResult:
    """Refuses a version that a replica found corrupt, or whose golden embeddings did not come out on some machine."""
    name = "golden replay"
    undecided: list[str] = []
    largest = 0.0
    for replica in fleet.replicas:
        load = replica.load_of(version)
        if load is not None and load.is_corrupt:
            return GateResult(name, Outcome.REFUSE, f"{replica.name} refuses version {version}: {load.reason}")
        if load is None or not replica.serves(version):
            undecided.append(replica.name)
            continue
        # Written so that a NaN is refused too.
        if not load.golden_difference <= GOLDEN_TOLERANCE:
            return GateResult(
                name,
                Outcome.REFUSE,
                f"{replica.name} differs by {load.golden_difference:.1e}, more than {GOLDEN_TOLERANCE:.0e}",
            )
        largest = max(largest, load.golden_difference)
    if undecided or not fleet.replicas:
        return GateResult(name, Outcome.WAIT, f"not yet known of {', '.join(undecided) or 'any replica'}")
    return GateResult(name, Outcome.PASS, f"largest difference {largest:.1e}, allowed {GOLDEN_TOLERANCE:.0e}")


def item_count(
    version: int, live_version: int | None, standby: Fleet, live: Fleet, min_item_ratio: float
) -> GateResult:
    """Refuses a version that has no items, or too few of the live one's.

    One replica of each shard counts. Live shards that have lost the live version are taken to have held as many items
    as the others, since items are spread by hash: so a new version can replace a live one that a shard has lost.
    """
    name = "item count"
    counts = _items_by_shard(version, standby)
    if not standby.shards or not all(shard.serves(version) for shard in standby.shards):
        return GateResult(name, Outcome.WAIT, f"not all shards have version {version} available")
    if disagreement := _disagreement(version, standby):
        return GateResult(name, Outcome.WAIT, disagreement)
    num_items = sum(min(of_replicas) for of_replicas in counts.values())
    if live_version is None:
        if num_items == 0:
            # Nothing is live that could suffer, and loading the catalogue heals it.
            return GateResult(name, Outcome.WAIT, "0 items; load the catalogue: twotower catalog load")
        return GateResult(name, Outcome.PASS, f"{num_items} items; nothing is live to compare with")
    if num_items == 0:
        return GateResult(name, Outcome.REFUSE, "0 items")
    live_counts = _items_by_shard(live_version, live)
    if not live_counts:
        return GateResult(name, Outcome.PASS, f"{num_items} items; no shard has version {live_version} to compare with")
    num_shards = len({shard.shard for shard in live.shards})
    num_live = round(sum(map(max, live_counts.values())) * num_shards / len(live_counts))
    about = "" if len(live_counts) == num_shards else f"judged by {len(live_counts)} of {num_shards} shards, "
    is_enough = num_items >= min_item_ratio * num_live
    return GateResult(
        name,
        Outcome.PASS if is_enough else Outcome.REFUSE,
        f"{num_items} items beside {num_live} of version {live_version}, "
        f"{about}at least {min_item_ratio:.0%} of them are needed",
    )


def offline_recall(
    metrics: Mapping[str, float], live_metrics: Mapping[str, float], recall_metric: str, max_recall_drop: float
) -> GateResult:
    """Refuses a version whose offline metric is below the live one's by more than a share of it.

    When the live version does not have the metric there is nothing to fall below.
    """
    name = "offline recall"
    value, live_value = metrics.get(recall_metric), live_metrics.get(recall_metric)
    if live_value is None:
        shown = "unknown" if value is None else f"{value:.4f}"
        return GateResult(name, Outcome.PASS, f"{recall_metric} is {shown}; there is no live figure to compare with")
    if value is None:
        return GateResult(
            name, Outcome.REFUSE, f"the manifest has no {recall_metric}; the live one's is {live_value:.4f}"
        )
    least = live_value * (1 - max_recall_drop)
    return GateResult(
        name,
        # Written so that a NaN is refused too.
        Outcome.PASS if value >= least else Outcome.REFUSE,
        f"{recall_metric} is {value:.4f}, the live one's {live_value:.4f}, at least {least:.4f} is needed",
    )


def index_recall(version: int, standby: Fleet, max_shortfall: float) -> GateResult:
    """Refuses an index that finds less of what exact search finds than its build was to reach.

    What counts is the k that the target is for, on every shard. An exact index passes.
    """
    name = "index recall"
    measured: list[tuple[Replica, LoadStatus, SearchSetting]] = []
    for shard in standby.shards:
        load = shard.load_of(version)
        if load is None or not shard.serves(version):
            return GateResult(name, Outcome.WAIT, f"not all shards have version {version} available")
        if not load.search_settings and load.index_type != _EXACT and load.num_items:
            return GateResult(name, Outcome.WAIT, f"{shard.name} does not say the recall of its {load.index_type}")
        if load.index_type != _EXACT:
            at_target = [setting for setting in load.search_settings if setting.k == load.target_k]
            measured.extend((shard, load, setting) for setting in at_target or load.search_settings)
    if not measured:
        return GateResult(name, Outcome.PASS, "1.000: the search is exact")
    # Written so that a NaN is the worst.
    shard, load, worst = min(measured, key=lambda part: (part[2].recall >= 0, part[2].recall - part[1].target_recall))
    return GateResult(
        name,
        Outcome.PASS if worst.recall >= load.target_recall - max_shortfall else Outcome.REFUSE,
        f"{worst.recall:.3f} at k={worst.k} with {load.measured_with}, on {shard.title}; the target is "
        f"{load.target_recall:.3f}, at most {max_shortfall:.3f} below it is allowed",
    )


def scores(version: int, live_version: int | None, standby: Fleet, live: Fleet, thresholds: Thresholds) -> GateResult:
    """Refuses a version whose items are all alike, or whose scores say nothing.

    The live version's figures stand beside, and are a limit only where one is set: two checkpoints may well differ in
    the scale of their scores.
    """
    name = "scores"
    if not standby.shards or not all(shard.serves(version) for shard in standby.shards):
        return GateResult(name, Outcome.WAIT, f"not all shards have version {version} available")
    silent = [shard.name for shard, load in _with_pairs(version, standby) if not _has_scores(load)]
    if silent:
        return GateResult(name, Outcome.WAIT, f"{silent[0]} does not say the scores of version {version}")
    figures, live_figures = _Scores.of(version, standby), _Scores.of(live_version, live)
    if figures is None:
        return GateResult(name, Outcome.PASS, "no shard has more than one item to score")
    explanation = str(figures)
    refusals = []
    if not figures.are_finite:
        refusals.append("they must be finite")
    elif figures.similarity > thresholds.max_item_similarity:
        refusals.append(f"a similarity above {thresholds.max_item_similarity} means that items are all alike")
    elif figures.deviation < thresholds.min_score_deviation:
        refusals.append(f"a deviation below {thresholds.min_score_deviation} means that every item scores alike")
    if live_figures is not None and live_figures.deviation > 0:
        shift = abs(figures.mean - live_figures.mean) / live_figures.deviation
        explanation += f"; {shift:.1f} deviations from version {live_version}'s {live_figures.mean:.3f}"
        if thresholds.max_score_shift is not None and not shift <= thresholds.max_score_shift:
            refusals.append(f"at most {thresholds.max_score_shift} deviations are allowed")
    return GateResult(name, Outcome.REFUSE if refusals else Outcome.PASS, "; ".join((explanation, *refusals)))


def shadow(figures: Shadow | None, staged_s: float, thresholds: Thresholds) -> GateResult:
    """Waits until enough live queries were answered by both versions, then holds the figures against the limits.

    Without live traffic it would wait forever, so it waits for a time and then judges by what there is.

    Args:
        figures: Those of all query services together; None when there are none.
        staged_s: Seconds since the version was put on standby.
        thresholds: Where the line is.
    """
    name, needed = "shadow", thresholds.min_shadow_queries
    num_queries = figures.num_queries + figures.num_errors if figures else 0
    explanation = f"{num_queries} live queries answered by both"
    if figures and figures.num_queries:
        explanation = (
            f"{num_queries} live queries, overlap {figures.mean_overlap:.2f}, {figures.num_errors} failed, "
            f"p50 {_beside(figures.standby_p50_s, figures.live_p50_s)}, "
            f"p99 {_beside(figures.standby_p99_s, figures.live_p99_s)}"
        )
    elif figures and figures.num_errors:
        explanation = f"{num_queries} live queries, all of which version {figures.version} failed to answer"
    if not needed:
        return GateResult(name, Outcome.PASS, f"{explanation}; none is asked for")
    if num_queries < needed:
        if staged_s < thresholds.max_shadow_wait_s:
            left_s = thresholds.max_shadow_wait_s - staged_s
            return GateResult(
                name, Outcome.WAIT, f"{explanation}; waits for {needed}, or {_span(left_s)} more for lack of traffic"
            )
        explanation += f"; {needed} were asked for, and {_span(thresholds.max_shadow_wait_s)} have passed"
    refusals = _shadow_refusals(figures, thresholds) if figures and num_queries else []
    return GateResult(name, Outcome.REFUSE if refusals else Outcome.PASS, "; ".join((explanation, *refusals)))


def canary(traffic: Traffic, live_traffic: Traffic, lasted_s: float, thresholds: Thresholds) -> GateResult:
    """Waits until the standby version has answered enough requests, then holds its figures against the live one's.

    It refuses as soon as too many requests have failed for the limit to be kept. Without traffic it would wait
    forever, so it waits for a time and then judges by what there is.

    Args:
        traffic: What the standby version answered, at all query services together.
        live_traffic: The same of the live version in the same time.
        lasted_s: Seconds since the canary began.
        thresholds: Where the line is.
    """
    needed = thresholds.canary_min_requests
    explanation = f"{traffic.num_requests} of {needed} requests answered, {traffic.num_errors} failed"
    if traffic.num_requests and live_traffic.num_requests:
        explanation += (
            f" ({traffic.error_share:.2%}, live {live_traffic.error_share:.2%}), "
            f"p50 {_beside(traffic.p50_s, live_traffic.p50_s)}, p99 {_beside(traffic.p99_s, live_traffic.p99_s)}"
        )
    is_over = traffic.num_requests >= needed or lasted_s >= thresholds.canary_max_s
    max_error_share = live_traffic.error_share + thresholds.max_canary_error_share
    num_judged = traffic.num_requests if is_over else needed
    if traffic.num_errors > max_error_share * num_judged:
        return GateResult(CANARY, Outcome.REFUSE, f"{explanation}; {max_error_share:.2%} may fail")
    if not is_over:
        left_s = thresholds.canary_max_s - lasted_s
        return GateResult(CANARY, Outcome.WAIT, f"{explanation}; goes on until then, or {_span(left_s)} more")
    limit = thresholds.max_canary_latency_ratio
    is_compared = traffic.num_requests > 0 and live_traffic.num_requests > 0
    if is_compared and not traffic.p99_s <= limit * live_traffic.p99_s:
        return GateResult(CANARY, Outcome.REFUSE, f"{explanation}; a p99 of {limit} times the live one's is allowed")
    if traffic.num_requests < needed:
        explanation += f"; {_span(thresholds.canary_max_s)} have passed"
    return GateResult(CANARY, Outcome.PASS, explanation)


@dataclass(frozen=True)
class _Scores:
    """Figures of all shards together, by their items."""

    similarity: float
    mean: float
    deviation: float

    @classmethod
    def of(cls, version: int | None, fleet: Fleet) -> "_Scores | None":
        """None when no shard that has the version available has figures."""
        loads = [load for _, load in _with_pairs(version, fleet) if _has_scores(load)]
        num_items = sum(load.num_items for load in loads)
        if not num_items:
            return None
        return cls(
            sum(load.item_similarity * load.num_items for load in loads) / num_items,
            sum(load.score_mean * load.num_items for load in loads) / num_items,
            sum(load.score_deviation * load.num_items for load in loads) / num_items,
        )

    @property
    def are_finite(self) -> bool:
        return all(map(math.isfinite, (self.similarity, self.mean, self.deviation)))

    def __str__(self) -> str:
        return f"mean {self.mean:.3f}, deviation {self.deviation:.3f}, item similarity {self.similarity:.3f}"


def _with_pairs(version: int | None, fleet: Fleet) -> list[tuple[Replica, LoadStatus]]:
    """Shards that have a version available; a single item has no pairs, and scores that say nothing."""
    available = [shard for shard in fleet.shards if version is not None and shard.serves(version)]
    loads = [(shard, load) for shard in available for load in shard.loads if load.version == version]
    return [(shard, load) for shard, load in loads if load.num_items > 1]


def _has_scores(load: LoadStatus) -> bool:
    return (load.item_similarity, load.score_mean, load.score_deviation) != (0, 0, 0)


def _shadow_refusals(figures: Shadow, thresholds: Thresholds) -> list[str]:
    refusals = []
    error_share = figures.num_errors / (figures.num_queries + figures.num_errors)
    if error_share > thresholds.max_shadow_error_share:
        refusals.append(f"{error_share:.2%} failed, {thresholds.max_shadow_error_share:.2%} may")
    if not figures.num_queries:
        return refusals
    least, limit = thresholds.min_shadow_overlap, thresholds.max_shadow_latency_ratio
    if least is not None and not figures.mean_overlap >= least:
        refusals.append(f"an overlap of {least} is needed")
    if limit is not None and not figures.standby_p50_s <= limit * figures.live_p50_s:
        refusals.append(f"a p50 of {limit} times the live one's is allowed")
    return refusals


def _items_by_shard(version: int, fleet: Fleet) -> dict[int | None, list[int]]:
    """Number of the shard to the item counts of those of its replicas that have the version available."""
    counts: dict[int | None, list[int]] = {}
    for shard in fleet.shards:
        load = shard.load_of(version)
        if load is not None and shard.serves(version):
            counts.setdefault(shard.shard, []).append(load.num_items)
    return counts


def _disagreement(version: int, fleet: Fleet) -> str:
    """Replicas of a shard that count differently at one state of the catalogue, in words; empty when none do."""
    seen: dict[tuple[int | None, str], tuple[Replica, int]] = {}
    for shard in fleet.shards:
        if load := shard.load_of(version):
            other, num_items = seen.setdefault((shard.shard, load.catalogue_version), (shard, load.num_items))
            if num_items != load.num_items:
                return (
                    f"replicas of shard {shard.shard} do not agree: {num_items} items at {other.address}, "
                    f"{load.num_items} at {shard.address}"
                )
    return ""


def _beside(value_s: float, live_s: float) -> str:
    return f"{value_s * 1e3:.1f} ms (live {live_s * 1e3:.1f})"


def _span(seconds: float) -> str:
    """A time in words: 40 s, 12 min, 3.5 h."""
    if seconds < _MINUTE_S:
        return f"{seconds:.0f} s"
    return f"{seconds / _MINUTE_S:.0f} min" if seconds < 2 * _HOUR_S else f"{seconds / _HOUR_S:.1f} h"


def _absence(version: int, replica: Replica) -> str:
    if replica.error:
        return f"{replica.name} {replica.error}"
    load = replica.load_of(version)
    if load is None:
        return f"{replica.name} has not begun to load version {version}"
    if load.state is State.FAILED:
        return f"{replica.name} failed to load version {version}: {load.reason}"
    return f"{replica.name} is {load.state.value} version {version}"
