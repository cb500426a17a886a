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
        help="Address of each shard: a:1|a:2,b:1;c:1,d:1,e:1 with , between shards, | between replicas of one, "
        "; between layouts. [env var: TWOTOWER_SHARDS]",
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
