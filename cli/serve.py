"""`twotower serve index`, `twotower serve query` and `twotower rollout`: one process each.

Deliberately does not know what the processes do, and never imports the trainer.
"""

import logging
from typing import Annotated, Any

import typer

from cli import options

app = typer.Typer(help="Run one service. Every setting is also an environment variable, TWOTOWER_<NAME>.")

Store = Annotated[
    str | None,
    typer.Option(help="A folder, or s3://…, gs://…, az://…. [env var: TWOTOWER_STORE]", metavar="URL"),
]
Address = Annotated[
    str | None,
    typer.Option(help="Where to listen: host:port or unix:/path. [env var: TWOTOWER_ADDRESS]", metavar="ADDRESS"),
]
PollInterval = Annotated[
    float | None,
    typer.Option(
        "--poll-interval",
        help="Seconds between two looks at the deployment record. [env var: TWOTOWER_POLL_INTERVAL_S]",
        metavar="SECONDS",
    ),
]
Reflection = Annotated[
    bool | None, typer.Option(help="The gRPC reflection service. [env var: TWOTOWER_REFLECTION]", show_default=False)
]


@app.callback()
def serve() -> None:
    """Run one service. Every setting is also an environment variable, TWOTOWER_<NAME>."""


@app.command()
def index(
    shard: Annotated[
        str | None,
        typer.Option(help="Which shard this is, of how many: 0/2. [env var: TWOTOWER_SHARD]", metavar="NUMBER/COUNT"),
    ] = None,
    address: Address = None,
    store: Store = None,
    filterable: Annotated[
        str | None,
        typer.Option(
            help="Attributes that filters may name: genres,year. [env var: TWOTOWER_FILTERABLE]", metavar="NAMES"
        ),
    ] = None,
    target_recall: Annotated[
        float | None,
        typer.Option(
            help="Recall that an index must reach; the fastest that does is built. [env var: TWOTOWER_TARGET_RECALL]",
            metavar="SHARE",
        ),
    ] = None,
    index_type: Annotated[
        str | None,
        typer.Option(
            help="Pins the kind of index, a FAISS factory string: IVF1024,SQ8. [env var: TWOTOWER_INDEX_TYPE]",
            metavar="TYPE",
        ),
    ] = None,
    exact_below: Annotated[
        int | None,
        typer.Option(
            help="Shards with fewer items are searched exactly. [env var: TWOTOWER_EXACT_BELOW]", metavar="COUNT"
        ),
    ] = None,
    poll_interval_s: PollInterval = None,
    reflection: Reflection = None,
) -> None:
    """One index shard: embeds its items, builds or loads their index, searches it."""
    from index_service.serve import run
    from index_service.settings import IndexSettings

    _log_to_stderr()
    given = {
        "shard": shard,
        "address": address,
        "store": store,
        "filterable": filterable,
        "target_recall": target_recall,
        "index_type": index_type,
        "exact_below": exact_below,
        "poll_interval_s": poll_interval_s,
        "reflection": reflection,
    }
    run(IndexSettings(**_without_missing(given)))


@app.command()
def query(
    shards: options.Shards = None,
    address: Address = None,
    store: Store = None,
    redis_url: Annotated[
        str | None,
        typer.Option(help="The embedding cache; without it there is none. [env var: REDIS_URL]", metavar="URL"),
    ] = None,
    shadow_share: Annotated[
        float | None,
        typer.Option(
            help="Share of the requests that a standby version answers too, to be compared; 0: none. "
            "[env var: TWOTOWER_SHADOW_SHARE]",
            metavar="SHARE",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Processes that share the address, for more than one core. [env var: TWOTOWER_WORKERS]",
            metavar="COUNT",
        ),
    ] = None,
    poll_interval_s: PollInterval = None,
    reflection: Reflection = None,
) -> None:
    """The query service: encodes, caches, fans out to the shards, merges."""
    from query_service.settings import QuerySettings

    _log_to_stderr()
    given = {
        "shards": shards,
        "address": address,
        "store": store,
        "redis_url": redis_url,
        "shadow_share": shadow_share,
        "workers": workers,
        "poll_interval_s": poll_interval_s,
        "reflection": reflection,
    }
    settings = QuerySettings(**_without_missing(given))
    if settings.workers == 1:
        from query_service.serve import run
    else:
        from query_service.workers import run
    run(settings)


def rollout(
    shards: options.Shards = None,
    query_services: options.QueryServices = None,
    store: Store = None,
    poll_interval_s: PollInterval = None,
) -> None:
    """The rollout controller: stages the newest checkpoint, promotes it when all gates pass."""
    from rollout.serve import run
    from rollout.settings import RolloutSettings

    _log_to_stderr()
    given = {
        "shards": shards,
        "query_services": query_services,
        "store": store,
        "poll_interval_s": poll_interval_s,
    }
    run(RolloutSettings(**_without_missing(given)))


def _without_missing(given: dict[str, Any]) -> dict[str, Any]:
    """What the command line says; the environment has the rest."""
    return {name: value for name, value in given.items() if value is not None}


def _log_to_stderr() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
