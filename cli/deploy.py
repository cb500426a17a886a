"""`twotower stage`, `canary`, `promote`, `rollback` and `status`: the deployment record, by hand.

Deliberately does not know the rules (`rollout`); it opens what they need and prints what comes back.
"""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import options
from cli.options import DEFAULT_STORE

if TYPE_CHECKING:
    from rich.console import Console

    from rollout.fleet import LoadStatus, Replica
    from rollout.overview import Overview
    from rollout.settings import RolloutSettings
    from towers.deployment import Deployment, Slot

Force = Annotated[bool, typer.Option("--force", help="Although a gate waits or refuses; the record will say so.")]
_SHOWN_RECORDS = 5


def stage(
    version: Annotated[int, typer.Argument(help="A published version.", metavar="VERSION")],
    store: options.StoreUrl = DEFAULT_STORE,
    num_shards: Annotated[
        int | None,
        typer.Option(
            help="Serve it by the layout of this many shards; the live version too can move to another layout. "
            "[default: the live one's layout]",
            metavar="COUNT",
            min=1,
            show_default=False,
        ),
    ] = None,
) -> None:
    """Put a published version on standby: all services load it beside the live one."""
    from rollout import operations
    from towers.store import Store

    _say_record(operations.stage(Store(store), version, num_shards))


def canary(
    share: Annotated[
        float, typer.Argument(help="Share of the requests, for example 0.05; 0 ends it.", min=0, max=1, metavar="SHARE")
    ],
    store: options.StoreUrl = DEFAULT_STORE,
    shards: options.Shards = None,
    query_services: options.QueryServices = None,
    force: Force = False,
) -> None:
    """Let the standby version answer a share of the requests; the rollout controller ends that on errors or latency."""
    from rollout import operations
    from towers.store import Store

    if share:
        overview = _look(_settings(store, shards, query_services))
        _say_record(operations.begin_canary(Store(store), overview, share, is_forced=force))
    else:
        _say_record(operations.end_canary(Store(store)))


def promote(
    store: options.StoreUrl = DEFAULT_STORE,
    shards: options.Shards = None,
    query_services: options.QueryServices = None,
    force: Force = False,
) -> None:
    """Make the standby version live. Refused unless all gates pass."""
    from rollout import operations
    from towers.store import Store

    overview = _look(_settings(store, shards, query_services))
    _say_record(operations.promote(Store(store), overview, is_forced=force))


def rollback(store: options.StoreUrl = DEFAULT_STORE) -> None:
    """Swap back to the version that was live before, at once; automation then leaves the other one alone."""
    from rollout import operations
    from towers.store import Store

    _say_record(operations.roll_back(Store(store)))


def status(
    store: options.StoreUrl = DEFAULT_STORE,
    shards: options.Shards = None,
    query_services: options.QueryServices = None,
    as_json: options.Json = False,
) -> None:
    """Show what is live, what stands by, each process and each gate."""
    from cli.screen import say, screen
    from rollout.controller import decide, in_prospect

    overview = _look(_settings(store, shards, query_services))
    next_step = in_prospect(decide(overview))
    if as_json:
        say(json.dumps(_as_json(overview, next_step)))
    else:
        _print_overview(overview, next_step, screen())


def _settings(store: str, shards: str | None, query_services: str | None) -> "RolloutSettings":
    from rollout.settings import RolloutSettings

    given = {"shards": shards, "query_services": query_services}
    return RolloutSettings(store=store, **{name: value for name, value in given.items() if value is not None})


def _look(settings: "RolloutSettings") -> "Overview":
    import asyncio

    from rollout.overview import Observer
    from rollout.statuses import StatusCollector
    from towers.store import Store

    async def look() -> "Overview":
        async with StatusCollector(settings.shards, settings.query_services) as collector:
            return await Observer(Store(settings.store), collector, settings.thresholds).look()

    return asyncio.run(look())


def _say_record(record: "Deployment") -> None:
    from cli.screen import say

    say(f"revision {record.revision}: {_slots(record)}; {record.reason}")


def _slots(record: "Deployment") -> str:
    live = "nothing is live" if record.live_version is None else f"{record.live} is live"
    if record.standby_version is None:
        return live
    is_held = " and is held" if record.held else ""
    canary = f" and answers {record.canary_share:.1%} of the requests" if record.canary_share else ""
    return f"{live}, {record.standby} stands by{is_held}{canary}"


def _as_json(overview: "Overview", next_step: str) -> dict[str, Any]:
    from dataclasses import asdict

    deployment, fleet = overview.deployment, overview.fleet
    live, standby = deployment.live_version, deployment.standby_version
    shadow = fleet.shadow_of(standby, live) if live is not None and standby is not None else None
    return {
        "deployment": deployment.model_dump(mode="json"),
        "next": next_step,
        "published": list(overview.published),
        "replicas": [
            {
                "role": replica.role,
                "shard": replica.shard,
                "num_shards": replica.num_shards,
                "address": replica.address,
                "worker": replica.worker,
                "error": replica.error,
                "deployment_revision": replica.deployment_revision,
                "layouts": sorted(replica.layouts),
                "versions": [asdict(load) | {"state": load.state.value} for load in replica.loads],
                "shadow": asdict(replica.shadow) if replica.shadow else None,
                "traffic": [asdict(part) for part in replica.traffic],
            }
            for replica in fleet.replicas
        ],
        "shadow": asdict(shadow) if shadow else None,
        "traffic": [asdict(fleet.traffic_of(slot, deployment.revision)) for slot in _filled(deployment)],
        "gates": [
            {"name": gate.name, "outcome": gate.outcome.value, "explanation": gate.explanation}
            for gate in overview.gates
        ],
        "history": [record.model_dump(mode="json") for record in overview.history],
    }


def _print_overview(overview: "Overview", next_step: str, console: "Console") -> None:
    from rich.text import Text

    from cli.screen import print_table

    deployment = overview.deployment
    console.print(Text(f"Deployment revision {deployment.revision}: {_slots(deployment)}"))
    console.print(Text(f"Published: {', '.join(map(str, overview.published)) or 'nothing yet'}"))
    console.print(Text(f"The rollout controller's next step: {next_step}"))
    followed = max((replica.deployment_revision for replica in overview.fleet.replicas), default=0)
    if followed > deployment.revision:
        console.print(Text(f"The processes follow revision {followed}, so of another store: is --store the right one?"))

    print_table(
        console,
        "Processes",
        ("process", "address", "version", "items", "updates", "index", "MB", "catalogue"),
        [row for replica in overview.fleet.replicas for row in _process_rows(replica)],
    )
    for replica in overview.fleet.replicas:
        for note in _notes(replica):
            console.print(Text(f"{replica.name}: {note}"))

    traffic = [(slot, overview.fleet.traffic_of(slot, deployment.revision)) for slot in _filled(deployment)]
    if any(part.num_requests for _, part in traffic):
        print_table(
            console,
            f"Traffic since revision {deployment.revision}",
            ("version", "requests", "failed", "p50", "p99"),
            [
                (_slot(slot), str(part.num_requests), str(part.num_errors), _ms(part.p50_s), _ms(part.p99_s))
                for slot, part in traffic
            ],
        )
    if overview.gates:
        print_table(
            console,
            f"Gates of version {deployment.standby_version}",
            ("gate", "answer", "figure"),
            [(gate.name, gate.outcome.value, gate.explanation) for gate in overview.gates],
        )
    if overview.history:
        print_table(
            console,
            "Last records",
            ("revision", "created", "live", "standby", "", "reason"),
            [
                (
                    str(record.revision),
                    record.created.isoformat(sep=" ", timespec="seconds").removesuffix("+00:00"),
                    _slot(record.live),
                    _slot(record.standby),
                    "held" if record.held else f"{record.canary_share:.1%}" if record.canary_share else "",
                    record.reason,
                )
                for record in overview.history[-_SHOWN_RECORDS:]
            ],
        )


def _process_rows(replica: "Replica") -> list[tuple[str, ...]]:
    """One row for each version; the name and the address are in the first."""
    title = replica.title if replica.shard is not None else "query"
    if replica.worker is not None:
        title += f" {replica.worker}"
    versions = [
        (
            _state(load),
            *((str(load.num_items), _updates(load), load.index_type) if replica.shard is not None else ("", "", "")),
            f"{load.size_bytes / 1e6:.1f}" if load.size_bytes else "",
            load.catalogue_version,
        )
        for load in replica.loads
    ] or [("", "", "", "", "", "")]
    places = [(title, replica.address), *[("", "")] * (len(versions) - 1)]
    return [(*place, *version) for place, version in zip(places, versions, strict=True)]


def _notes(replica: "Replica") -> list[str]:
    """What does not fit into a table."""
    if replica.error or not replica.loads:
        return [replica.error or "holds no version"]
    notes = [f"version {load.version}: {load.reason}" for load in replica.loads if load.reason]
    notes += [
        f"version {load.version} leaves out {load.num_quarantined} items, whose embeddings are not finite"
        for load in replica.loads
        if load.num_quarantined
    ]
    return notes


def _updates(load: "LoadStatus") -> str:
    """What live updates added and replaced since the index was built."""
    return f"+{load.num_delta_items} -{load.num_tombstones}" if load.num_delta_items or load.num_tombstones else ""


def _state(load: "LoadStatus") -> str:
    is_underway = load.state.value == "building"
    return f"{load.version} {load.state.value}{f' {load.progress:.0%}' if is_underway else ''}"


def _filled(record: "Deployment") -> list["Slot"]:
    return [slot for slot in (record.live, record.standby) if slot.version is not None]


def _slot(slot: "Slot") -> str:
    """`7`, or `7/4` for version 7 on 4 shards."""
    layout = "" if slot.num_shards is None else f"/{slot.num_shards}"
    return "" if slot.version is None else f"{slot.version}{layout}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"
