"""`twotower up`: everything that serves, on this machine, until Ctrl-C or until one process ends.

Deliberately does not know how processes are started (`cli.local_stack`).
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli import options
from cli.options import DEFAULT_QUERY_PORT, DEFAULT_STORE

if TYPE_CHECKING:
    from rich.table import Table

    from cli.local_stack import Death, LocalStack
    from rollout.fleet import Fleet, Replica
    from towers.store import Store

_REFRESH_S = 0.5
_ADVICE_INTERVAL_S = 2.0
_QUARTERS = 4


@dataclass(frozen=True)
class ProcessLine:
    """What the screen says of one process."""

    name: str
    state: str
    pid: int
    address: str
    versions: str
    """With the progress of those that are being built."""


def up(
    shards: Annotated[int, typer.Option(help="How many index shards.", metavar="COUNT", min=1)] = 2,
    replicas: Annotated[int, typer.Option(help="How many replicas of each shard.", metavar="COUNT", min=1)] = 1,
    next_shards: Annotated[
        int | None,
        typer.Option(
            help="Shards of a second layout beside them, to re-shard to: twotower stage VERSION --num-shards COUNT.",
            metavar="COUNT",
            min=1,
        ),
    ] = None,
    store: options.StoreUrl = DEFAULT_STORE,
    port: Annotated[
        int, typer.Option(help="Of the query service; shards listen from PORT + 10 on. 0: any free ports.", min=0)
    ] = DEFAULT_QUERY_PORT,
    folder: Annotated[
        Path, typer.Option(help="Logs go to FOLDER/logs.", metavar="FOLDER", envvar="TWOTOWER_FOLDER")
    ] = Path("var"),
) -> None:
    """Start Valkey, the shards, the query service and the rollout controller; end all on Ctrl-C or when one ends.

    The settings of all of them, TWOTOWER_<NAME>, are passed on.
    """
    from cli.local_stack import LocalStack
    from towers.store import Store

    opened = Store(store)
    stack = LocalStack(
        store=store, folder=folder, num_shards=shards, next_num_shards=next_shards, replicas=replicas, query_port=port
    )
    try:
        death = asyncio.run(_run(stack, opened, store))
    finally:
        stack.stop()
    if death is not None:
        typer.echo(death.last_lines, err=True)
        typer.echo(f"error: {death}; everything else was ended too", err=True)
        raise typer.Exit(1)


async def _run(stack: "LocalStack", store: "Store", store_url: str) -> "Death | None":
    """Starts, shows and watches; returns the death that ended it, None after a signal."""
    import sys

    from rollout.statuses import StatusCollector
    from towers.rpc import until_stopped

    stopped = asyncio.create_task(until_stopped())
    await asyncio.sleep(0)  # The signal handlers are in place before there is anything to end.
    stack.start()
    view: _Live | _Lines = _Live() if sys.stdout.isatty() else _Lines()
    loop = asyncio.get_running_loop()
    advice, ask_again_s = "", loop.time()
    async with StatusCollector(stack.layouts, [stack.query_address]) as collector:
        with view:
            while not stopped.done():
                if death := stack.first_death():
                    return death
                fleet = await collector.collect()
                if loop.time() >= ask_again_s:
                    advice = await asyncio.to_thread(advise, store, store_url)
                    ask_again_s = loop.time() + _ADVICE_INTERVAL_S
                view.show(lines_of(stack, fleet), advice or _how_to_ask(stack, fleet))
                await asyncio.wait((stopped,), timeout=_REFRESH_S)
    return None


def advise(store: "Store", store_url: str) -> str:
    """What the user has to do before anything can be served; empty when nothing."""
    from towers.catalogue import Catalogue
    from towers.checkpoint import CheckpointStore
    from towers.errors import TwoTowerError

    try:
        missing = []
        if not CheckpointStore(store).versions():
            missing.append(f"no checkpoint is published yet: twotower train CONFIG.toml --store {store_url}")
        if Catalogue(store).version() is None:
            missing.append(f"the catalogue is empty: twotower catalog load ITEMS.parquet --store {store_url}")
        return "; ".join(missing)
    except TwoTowerError as error:
        return f"the store cannot be read: {error}"


def lines_of(stack: "LocalStack", fleet: "Fleet") -> list[ProcessLine]:
    """One line per process."""
    # Of several workers the first one stands for all.
    by_address = {replica.address: replica for replica in reversed(fleet.replicas)}
    replicas = {name: by_address[stack.address(name)] for name in stack.names if stack.address(name) in by_address}
    return [
        ProcessLine(
            name=name,
            state=_state(stack, name, replicas),
            pid=stack.pid(name),
            address=stack.address(name),
            versions=_versions(replicas[name]) if name in replicas else "",
        )
        for name in stack.names
    ]


def _state(stack: "LocalStack", name: str, replicas: "Mapping[str, Replica]") -> str:
    if name in replicas:
        return "starting" if replicas[name].error else "up"
    return "up" if stack.is_up(name) else "starting"


def _versions(replica: "Replica") -> str:
    parts = []
    for load in replica.loads:
        progress = f" {load.progress:.0%}" if load.state.value == "building" else ""
        reason = f" ({load.reason})" if load.reason else ""
        parts.append(f"version {load.version} {load.state.value}{progress}{reason}")
    return ", ".join(parts)


def _how_to_ask(stack: "LocalStack", fleet: "Fleet") -> str:
    loads = fleet.query_services[0].loads
    fleets = [fleet.on(len(layout)) for layout in stack.layouts]
    is_serving = any(all(replica.serves(load.version) for replica in on.replicas) for load in loads for on in fleets)
    return f"twotower retrieve NAME=VALUE … --address {stack.query_address}" if is_serving else ""


class _Live:
    """A table that is drawn again and again; for a terminal."""

    def __init__(self) -> None:
        from rich.live import Live

        self._live = Live(refresh_per_second=4)

    def __enter__(self) -> None:
        self._live.__enter__()

    def __exit__(self, *details: object) -> None:
        self._live.stop()

    def show(self, lines: Sequence[ProcessLine], advice: str) -> None:
        self._live.update(_table(lines, advice))


class _Lines:
    """A line for each change; for a pipe or a file. Progress counts in quarters."""

    def __init__(self) -> None:
        self._last: dict[str, str] = {}

    def __enter__(self) -> None:
        return None

    def __exit__(self, *details: object) -> None:
        return None

    def show(self, lines: Sequence[ProcessLine], advice: str) -> None:
        for line in lines:
            self._say(line.name, f"{line.name}: {line.state}, pid {line.pid}, {line.address} {line.versions}")
        self._say("advice", advice)

    def _say(self, key: str, text: str) -> None:
        text = text.rstrip(" ,")
        if text and self._last.get(key) != text:
            typer.echo(text)
        self._last[key] = text


def _table(lines: Sequence[ProcessLine], advice: str) -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table(caption=Text(f"{advice}\nCtrl-C ends all".strip()), caption_justify="left")
    for name in ("process", "state", "pid", "address", "versions"):
        table.add_column(name)
    for line in lines:
        table.add_row(line.name, line.state, str(line.pid), line.address, Text(line.versions))
    return table
