"""`twotower index inspect` and `twotower index tune`: the indexes that shards hold, and what another would cost.

Deliberately does not know how an index is built or chosen; it asks the shards, reads the store, and shows.
"""

import json
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import options
from cli.options import DEFAULT_STORE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rich.console import Console

    from index_service.artefact import ArtefactManifest, StoredIndex
    from index_service.frontier import Frontier
    from index_service.plan import SearchSetting
    from rollout.fleet import LoadStatus, Replica

app = typer.Typer(help="Look at the indexes of the shards, and at what they could be.")

_RECALLS = (0.8, 0.9, 0.95, 0.98, 0.99)
"""Columns of the frontier."""
_LEAST_DRAWN_RECALL = 0.6


@app.callback()
def index() -> None:
    """Look at the indexes of the shards, and at what they could be."""


@app.command()
def inspect(
    store: options.StoreUrl = DEFAULT_STORE,
    shards: options.Shards = None,
    as_json: options.Json = False,
) -> None:
    """Show the indexes that every shard replica holds and those that are stored."""
    from cli.screen import say, screen
    from index_service.artefact import stored_indexes
    from towers.store import Store

    replicas = _replicas(store, shards)
    stored = stored_indexes(Store(store))
    if as_json:
        say(json.dumps({"replicas": [_as_json(replica) for replica in replicas], "stored": _stored_as_json(stored)}))
    else:
        _print_inspection(replicas, stored, screen())


@app.command()
def tune(
    store: options.StoreUrl = DEFAULT_STORE,
    version: Annotated[
        int | None, typer.Option(help="The checkpoint; the live one when left out, else the newest.", metavar="VERSION")
    ] = None,
    shard: Annotated[str, typer.Option(help="The part of the catalogue: 0/2.", metavar="NUMBER/COUNT")] = "0/1",
    target_recall: Annotated[float, typer.Option(help="The recall to reach.", metavar="SHARE")] = 0.95,
    k: Annotated[int, typer.Option("--k", help="Items a search.", metavar="K")] = 100,
    as_json: options.Json = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw recall against latency into this file.", metavar="FILE.png")
    ] = None,
) -> None:
    """Measure every kind of index on the catalogue and a checkpoint of the store: recall, latency and memory.

    Nothing is stored; TWOTOWER_TARGET_RECALL and TWOTOWER_INDEX_TYPE make shards build what you prefer.
    """
    from cli.screen import say, screen
    from index_service.frontier import measured_frontier
    from index_service.settings import IndexSettings

    settings = IndexSettings(store=store, shard=shard, target_recall=target_recall, target_k=k)
    if plot is not None:
        import matplotlib  # noqa: F401 - known to be missing before the work, not after it
    with _progress() as report:
        frontier = measured_frontier(store, version, settings.shard, settings.num_shards, settings.goal, report)
    if plot is not None:
        _draw(frontier, plot)
    if as_json:
        say(json.dumps(_frontier_as_json(frontier)))
        return
    _print_frontier(frontier, screen())
    if plot is not None:
        say(f"drawn into {plot}")


def _replicas(store: str, shards: str | None) -> "list[Replica]":
    import asyncio

    from rollout.settings import RolloutSettings
    from rollout.statuses import StatusCollector

    settings = RolloutSettings(store=store, **({} if shards is None else {"shards": shards}))

    async def ask() -> "list[Replica]":
        async with StatusCollector(settings.shards, ()) as collector:
            return list((await collector.collect()).shards)

    return asyncio.run(ask())


def _as_json(replica: "Replica") -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "shard": replica.shard,
        "num_shards": replica.num_shards,
        "address": replica.address,
        "error": replica.error,
        "deployment_revision": replica.deployment_revision,
        "versions": [asdict(load) | {"state": load.state.value} for load in replica.loads],
    }


def _stored_as_json(stored: "list[StoredIndex]") -> list[dict[str, Any]]:
    return [
        {"path": index.path, "problem": index.problem}
        if index.manifest is None
        else {"path": index.path, "size_bytes": index.manifest.size_bytes, **index.manifest.model_dump(mode="json")}
        for index in stored
    ]


def _print_inspection(replicas: "list[Replica]", stored: "list[StoredIndex]", console: "Console") -> None:
    from rich.text import Text

    from cli.screen import print_table

    print_table(
        console,
        "Indexes of the shards",
        ("shard", "address", "version", "index", "recall", "items", "delta", "gone", "MB", "catalogue"),
        [row for replica in replicas for row in _replica_rows(replica)],
    )
    for replica in replicas:
        for note in [replica.error, *(load.reason for load in replica.loads)]:
            if note:
                console.print(Text(f"{replica.title} at {replica.address}: {note}"))
    print_table(
        console,
        "How they are searched",
        ("version", "shard", "target", "measured with", "up to k", "search parameters", "recall", "µs"),
        _setting_rows(replicas),
    )
    print_table(
        console,
        "Stored indexes",
        ("version", "shard", "catalogue", "index", "recall", "items", "MB", "built"),
        [_stored_row(index.manifest) for index in stored if index.manifest is not None],
    )
    for index in stored:
        if index.problem:
            console.print(Text(index.problem))


def _replica_rows(replica: "Replica") -> list[tuple[str, ...]]:
    """One row for each version; the shard and the address are in the first."""
    versions = [
        (
            f"{load.version} {load.state.value}",
            load.index_type,
            _recall_of(load),
            f"{load.num_items}",
            f"{load.num_delta_items}",
            f"{load.num_tombstones}",
            f"{load.size_bytes / 1e6:.1f}",
            load.catalogue_version,
        )
        if load.index_type
        else (f"{load.version} {load.state.value}", *[""] * 7)
        for load in replica.loads
    ] or [("",) * 8]
    places = [(f"{replica.shard}/{replica.num_shards}", replica.address), *[("", "")] * (len(versions) - 1)]
    return [(*place, *version) for place, version in zip(places, versions, strict=True)]


def _recall_of(load: "LoadStatus") -> str:
    """At the k of the target."""
    found = next((setting.recall for setting in load.search_settings if setting.k == load.target_k), None)
    return "" if found is None else f"{found:.3f}"


def _setting_rows(replicas: "list[Replica]") -> list[tuple[str, ...]]:
    """One row for each k; what replicas share is there once, and what rows share is in the first."""
    rows: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for replica in replicas:
        for load in replica.loads:
            target = f"{load.target_recall:g} at {load.target_k}"
            index = (str(load.version), f"{replica.shard}/{replica.num_shards}", target, load.measured_with)
            settings: list[tuple[str, ...]] = [
                (str(setting.k), setting.parameters, f"{setting.recall:.4f}", f"{setting.latency_s * 1e6:.0f}")
                for setting in load.search_settings
            ]
            rows.setdefault(index, settings)
    return [
        (*(index if number == 0 else ("",) * len(index)), *setting)
        for index, settings in rows.items()
        for number, setting in enumerate(settings)
    ]


def _stored_row(manifest: "ArtefactManifest") -> tuple[str, ...]:
    recall = next((setting.recall for setting in manifest.plan.settings if setting.k == manifest.goal.target_k), None)
    return (
        str(manifest.checkpoint_version),
        f"{manifest.shard}/{manifest.num_shards}",
        manifest.catalogue_version,
        manifest.index_type,
        "" if recall is None else f"{recall:.3f}",
        str(manifest.num_items),
        f"{manifest.size_bytes / 1e6:.1f}",
        manifest.created.isoformat(sep=" ", timespec="seconds").removesuffix("+00:00"),
    )


@contextmanager
def _progress() -> "Iterator[Callable[[float], None]]":
    """A bar on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("measuring", total=1.0)
        yield lambda share: bar.update(task, completed=share)


def _frontier_as_json(frontier: "Frontier") -> dict[str, Any]:
    from dataclasses import asdict

    def setting(found: "SearchSetting | None") -> dict[str, Any] | None:
        return None if found is None else found.model_dump()

    return {
        **asdict(frontier),
        "goal": frontier.goal.model_dump(),
        "candidates": [
            {**asdict(candidate), "setting": setting(candidate.setting)} for candidate in frontier.candidates
        ],
        "curves": [
            {
                "index_type": curve.index_type,
                "size_bytes": curve.size_bytes,
                "points": [point.model_dump() for point in curve.points],
            }
            for curve in frontier.curves
        ],
    }


def _print_frontier(frontier: "Frontier", console: "Console") -> None:
    from rich.text import Text

    from cli.screen import print_table

    goal = frontier.goal
    console.print(
        Text(
            f"Checkpoint {frontier.checkpoint_version}, catalogue {frontier.catalogue_version}: {frontier.num_items} "
            f"items of dimension {frontier.dim}, {goal.target_k} results a search, one thread, measured with "
            f"{frontier.measured_with}"
        )
    )
    print_table(
        console,
        f"For a recall of {goal.target_recall:g} that is above it by more than chance",
        ("index", "search parameters", "recall", "µs", "MB", ""),
        [
            (
                candidate.index_type,
                candidate.setting.parameters if candidate.setting else "",
                f"{candidate.setting.recall:.4f}" if candidate.setting else "",
                _us(candidate.setting),
                "" if candidate.size_bytes is None else f"{candidate.size_bytes / 1e6:.1f}",
                candidate.verdict,
            )
            for candidate in frontier.candidates
        ],
    )
    print_table(
        console,
        "Frontier: µs of the fastest search that reaches a recall",
        ("index", "MB", *(f"{recall:g}" for recall in _RECALLS)),
        [
            (
                curve.index_type,
                f"{curve.size_bytes / 1e6:.1f}",
                *(_us(curve.fastest(recall)) or "-" for recall in _RECALLS),
            )
            for curve in frontier.curves
        ],
    )
    if frontier.num_items < goal.exact_below:
        console.print(
            Text(
                f"A build searches fewer than {goal.exact_below} items exactly all the same; lower "
                "TWOTOWER_EXACT_BELOW or set TWOTOWER_INDEX_TYPE to change that."
            )
        )


def _us(setting: "SearchSetting | None") -> str:
    return "" if setting is None else f"{setting.latency_s * 1e6:.0f}"


def _draw(frontier: "Frontier", path: Path) -> None:
    """Recall against latency, a line for each kind, its memory in the legend."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    chosen = next(candidate for candidate in frontier.candidates if candidate.verdict in ("chosen", "pinned"))
    for curve in frontier.curves:
        best = sorted(_not_dominated(curve.points), key=lambda point: point.recall)
        axes.plot(
            [point.recall for point in best],
            [point.latency_s * 1e6 for point in best],
            marker="o",
            markersize=3,
            linewidth=1.2,
            label=f"{curve.index_type}, {curve.size_bytes / 1e6:.0f} MB",
        )
    if chosen.setting is not None:
        # Where its own line has it: a figure from another moment would lie beside it.
        points = next(curve.points for curve in frontier.curves if curve.index_type == chosen.index_type)
        same = [point for point in points if point.parameters == chosen.setting.parameters]
        star = next(iter(same), chosen.setting)
        axes.plot(
            [star.recall],
            [star.latency_s * 1e6],
            marker="*",
            markersize=15,
            color="black",
            linestyle="none",
            label=f"chosen: {chosen.index_type} {chosen.setting.parameters}".rstrip(),
        )
    goal = frontier.goal
    axes.axvline(goal.target_recall, color="grey", linestyle=":", label=f"target {goal.target_recall:g}")
    axes.set_xlim(_LEAST_DRAWN_RECALL, 1.005)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}"))
    axes.set_xlabel(f"recall at {goal.target_k} results")
    axes.set_ylabel("µs for one query, one thread")
    axes.set_title(
        f"Checkpoint {frontier.checkpoint_version}: {frontier.num_items:,} items of dimension {frontier.dim}, "
        f"measured with {frontier.measured_with}",
        fontsize=10,
    )
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def _not_dominated(points: "Sequence[SearchSetting]") -> "list[SearchSetting]":
    """Those points that no other one beats in both recall and latency."""
    return [
        point
        for point in points
        if not any(other.recall > point.recall and other.latency_s <= point.latency_s for other in points)
    ]
