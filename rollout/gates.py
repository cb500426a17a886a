"""Gates: what must hold before a version goes live, each a pure function that answers pass, wait or refuse.

Deliberately does not know where manifests and statuses come from, nor what is done about an answer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from rollout.fleet import Fleet, Replica, State
from towers.tower import GOLDEN_TOLERANCE


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
    """Where the gates draw the line."""

    recall_metric: str
    """Name of the offline metric in the manifests."""
    max_recall_drop: float
    """Largest drop below the live version's metric, as a share of it."""
    min_item_ratio: float
    """Smallest number of items, as a share of the live version's."""


def all_gates(
    version: int,
    live_version: int | None,
    fleet: Fleet,
    metrics: Mapping[str, float],
    live_metrics: Mapping[str, float],
    thresholds: Thresholds,
) -> tuple[GateResult, ...]:
    """Asks every gate.

    Args:
        version: The version that stands by.
        live_version: The version that is live, if any.
        fleet: All replicas.
        metrics: Offline metrics in the manifest of `version`.
        live_metrics: Those of the live version; empty when nothing is live.
        thresholds: Where the line is.
    """
    return (
        replicas_available(version, fleet),
        golden_replay(version, fleet),
        item_count(version, live_version, fleet, thresholds.min_item_ratio),
        offline_recall(metrics, live_metrics, thresholds.recall_metric, thresholds.max_recall_drop),
    )


def replicas_available(version: int, fleet: Fleet) -> GateResult:
    """Waits until every shard and every query service says that the version is AVAILABLE."""
    missing = [_absence(version, replica) for replica in fleet.replicas if not replica.serves(version)]
    if not fleet.shards:
        missing.append("no shard is configured")
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


def item_count(version: int, live_version: int | None, fleet: Fleet, min_item_ratio: float) -> GateResult:
    """Refuses a version that has no items, or too few of the live one's.

    A shard that does not have the live version available is left out of the comparison, so that a new version can
    replace a live one that a shard has lost.
    """
    name = "item count"
    if not fleet.shards or not all(shard.serves(version) for shard in fleet.shards):
        return GateResult(name, Outcome.WAIT, f"not all shards have version {version} available")
    num_items = sum(_num_items(version, shard) for shard in fleet.shards)
    if live_version is None:
        if num_items == 0:
            # Nothing is live that could suffer, and loading the catalogue heals it.
            return GateResult(name, Outcome.WAIT, "0 items; load the catalogue: twotower catalog load")
        return GateResult(name, Outcome.PASS, f"{num_items} items; nothing is live to compare with")
    if num_items == 0:
        return GateResult(name, Outcome.REFUSE, "0 items")
    comparable = [shard for shard in fleet.shards if shard.serves(live_version)]
    if not comparable:
        return GateResult(name, Outcome.PASS, f"{num_items} items; no shard has version {live_version} to compare with")
    num_compared = sum(_num_items(version, shard) for shard in comparable)
    num_live = sum(_num_items(live_version, shard) for shard in comparable)
    is_enough = num_compared >= min_item_ratio * num_live
    return GateResult(
        name,
        Outcome.PASS if is_enough else Outcome.REFUSE,
        f"{num_compared} items beside {num_live} of version {live_version}, "
        f"at least {min_item_ratio:.0%} of them are needed",
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


def _absence(version: int, replica: Replica) -> str:
    if replica.error:
        return f"{replica.name} {replica.error}"
    load = replica.load_of(version)
    if load is None:
        return f"{replica.name} has not begun to load version {version}"
    if load.state is State.FAILED:
        return f"{replica.name} failed to load version {version}: {load.reason}"
    return f"{replica.name} is {load.state.value} version {version}"


def _num_items(version: int, shard: Replica) -> int:
    load = shard.load_of(version)
    return 0 if load is None else load.num_items
