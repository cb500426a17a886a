"""`twotower stage`, `promote`, `rollback` and `status`: the deployment record, by hand.

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
    from towers.deployment import Deployment

_SHOWN_RECORDS = 5


def stage(
    version: Annotated[int, typer.Argument(help="A published version.", metavar="VERSION")],
    store: options.StoreUrl = DEFAULT_STORE,
) -> None:
    """Put a published version on standby: all services load it beside the live one."""
    from rollout import operations
    from towers.store import Store

    _say_record(operations.stage(Store(store), version))


def promote(
    store: options.StoreUrl = DEFAULT_STORE,
    shards: options.Shards = None,
    query_services: options.QueryServices = None,
    force: Annotated[
        bool, typer.Option("--force", help="Although a gate waits or refuses; the record will say so.")
    ] = False,
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
    live = "nothing is live" if record.live_version is None else f"version {record.live_version} is live"
    if record.standby_version is None:
        return live
    is_held = " and is held" if record.held else ""
    return f"{live}, version {record.standby_version} stands by{is_held}"


def _as_json(overview: "Overview", next_step: str) -> dict[str, Any]:
    def load(status: "LoadStatus") -> dict[str, Any]:
        return {
            "version": status.version,
            "state": status.state.value,
            "reason": status.reason,
            "is_corrupt": status.is_corrupt,
            "progress": status.progress,
            "golden_difference": status.golden_difference,
            "num_items": status.num_items,
            "num_quarantined": status.num_quarantined,
            "index_type": status.index_type,
            "catalogue_version": status.catalogue_version,
        }

    return {
        "deployment": overview.deployment.model_dump(mode="json"),
        "next": next_step,
        "published": list(overview.published),
        "replicas": [
            {
                "role": replica.role,
                "shard": replica.shard,
                "address": replica.address,
                "error": replica.error,
                "deployment_revision": replica.deployment_revision,
                "versions": [load(status) for status in replica.loads],
            }
            for replica in overview.fleet.replicas
        ],
        "gates": [
            {"name": gate.name, "outcome": gate.outcome.value, "explanation": gate.explanation}
            for gate in overview.gates
        ],
        "history": [record.model_dump(mode="json") for record in overview.history],
    }


def _print_overview(overview: "Overview", next_step: str, console: "Console") -> None:
    from rich.table import Table
    from rich.text import Text

    deployment = overview.deployment
    console.print(Text(f"Deployment revision {deployment.revision}: {_slots(deployment)}"))
    console.print(Text(f"Published: {', '.join(map(str, overview.published)) or 'nothing yet'}"))
    console.print(Text(f"The rollout controller's next step: {next_step}"))
    followed = max((replica.deployment_revision for replica in overview.fleet.replicas), default=0)
    if followed > deployment.revision:
        console.print(Text(f"The processes follow revision {followed}, so of another store: is --store the right one?"))

    processes = Table(title="Processes", title_justify="left")
    for name in ("process", "address", "version", "state", "items", "index", "catalogue", "golden difference", ""):
        processes.add_column(name)
    for replica in overview.fleet.replicas:
        for row in _process_rows(replica):
            processes.add_row(*map(Text, row))
    console.print(processes)

    if overview.gates:
        gates = Table(title=f"Gates of version {deployment.standby_version}", title_justify="left")
        for name in ("gate", "answer", "figure"):
            gates.add_column(name)
        for gate in overview.gates:
            gates.add_row(*map(Text, (gate.name, gate.outcome.value, gate.explanation)))
        console.print(gates)

    if overview.history:
        records = Table(title="Last records", title_justify="left")
        for name in ("revision", "created", "live", "standby", "held", "reason"):
            records.add_column(name)
        for record in overview.history[-_SHOWN_RECORDS:]:
            records.add_row(
                str(record.revision),
                record.created.isoformat(timespec="seconds"),
                str(record.live_version or ""),
                str(record.standby_version or ""),
                "held" if record.held else "",
                Text(record.reason),
            )
        console.print(records)


def _process_rows(replica: "Replica") -> list[list[str]]:
    name = replica.role if replica.shard is None else f"{replica.role} {replica.shard}"
    if replica.error:
        return [[name, replica.address, "", "", "", "", "", "", replica.error]]
    if not replica.loads:
        return [[name, replica.address, "", "", "", "", "", "", "holds no version"]]
    return [
        [
            name,
            replica.address,
            str(load.version),
            _state(load),
            str(load.num_items) if replica.role == "shard" else "",
            load.index_type,
            load.catalogue_version,
            f"{load.golden_difference:.1e}",
            load.reason,
        ]
        for load in replica.loads
    ]


def _state(load: "LoadStatus") -> str:
    is_underway = load.state.value == "building"
    return f"{load.state.value} {load.progress:.0%}" if is_underway else load.state.value
