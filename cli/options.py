"""Options that several commands share.

Deliberately imports nothing heavy: `twotower --help` reads this.
"""

from typing import Annotated

import typer

DEFAULT_STORE = "var/store"
DEFAULT_QUERY_PORT = 50051
DEFAULT_ADDRESS = f"127.0.0.1:{DEFAULT_QUERY_PORT}"

StoreUrl = Annotated[
    str,
    typer.Option("--store", envvar="TWOTOWER_STORE", help="A folder, or s3://…, gs://…, az://….", metavar="URL"),
]
Shards = Annotated[
    str | None,
    typer.Option(
        help="Address of each shard, host:port,host:port; the position is its number. [env var: TWOTOWER_SHARDS]",
        metavar="ADDRESSES",
    ),
]
QueryServices = Annotated[
    str | None,
    typer.Option(
        help="Address of each query service, host:port,host:port. [env var: TWOTOWER_QUERY_SERVICES]",
        metavar="ADDRESSES",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
