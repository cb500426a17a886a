"""`twotower explain`: why an item is, or is not, among the best for a query.

Deliberately does not know how that is found out: the service says it.
"""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from cli import options
from cli.filters import filter_of
from cli.options import DEFAULT_ADDRESS
from cli.retrieve import connected, query_of, split_feature

if TYPE_CHECKING:
    from retrieval_client import Explanation


def explain(
    item_id: Annotated[str, typer.Argument(help="The item.", metavar="ITEM_ID")],
    features: Annotated[
        list[str], typer.Argument(help="Features of the query; a list is separated by commas.", metavar="NAME=VALUE…")
    ],
    k: Annotated[int, typer.Option("-k", help="How many items were asked for.", min=1)] = 10,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Item that was excluded; may be repeated.", metavar="ID")
    ] = None,
    filter_: Annotated[
        list[str] | None,
        typer.Option("--filter", help="Condition, as of twotower retrieve; may be repeated.", metavar="CONDITION"),
    ] = None,
    version: Annotated[
        int | None,
        typer.Option(
            help="Checkpoint version whose answer is to be explained; the live one by default.",
            metavar="VERSION",
            min=1,
            show_default=False,
        ),
    ] = None,
    address: Annotated[str, typer.Option(help="The query service.", metavar="ADDRESS")] = DEFAULT_ADDRESS,
    timeout_s: Annotated[
        float, typer.Option("--timeout", help="Deadline in seconds.", metavar="SECONDS", min=0.001)
    ] = 30.0,
    as_json: options.Json = False,
) -> None:
    """Say why an item is, or is not, in an answer, for example: twotower explain 50 user_id=42 history=181 -k 10."""
    from cli.screen import say

    texts = dict(split_feature(text) for text in features)
    condition = filter_of(filter_ or [])
    with connected(address, timeout_s) as client:
        found = client.explain(
            query_of(texts, client, address),
            item_id,
            k,
            excluded_item_ids=exclude or [],
            filter=condition,
            checkpoint_version=version,
        )
    if as_json:
        say(json.dumps({"item_id": item_id, **asdict(found)}))
    else:
        _print(item_id, found)


def _print(item_id: str, found: "Explanation") -> None:
    from rich.text import Text

    from cli.screen import print_table, screen

    console = screen()
    console.print(Text(f"{item_id}: {found.finding.replace('_', ' ')}: {found.reason}"))
    rows = [
        ["score", _figure(found.score)],
        ["score of the last item returned", _figure(found.last_score)],
        ["exact rank", "" if found.exact_rank is None else f"{found.exact_rank} of {found.num_items}"],
        ["found by the index", {True: "yes", False: "no", None: ""}[found.found_by_index]],
    ]
    print_table(console, "where it stands", ["", ""], [row for row in rows if row[1]])
    if found.contributions:
        by_size = sorted(found.contributions.items(), key=lambda part: -abs(part[1] or 0.0))
        told = [
            [name, "the query has no embedding without it" if part is None else f"{part:+.4f}"]
            for name, part in by_size
        ]
        print_table(console, "what the score loses without each feature", ["feature", "score"], told)
    console.print()
    console.print(
        Text(
            f"version {found.checkpoint_version}, shard {found.shard} of {found.num_shards}, "
            f"catalogue {found.catalogue_version}"
        )
    )


def _figure(score: float | None) -> str:
    return "" if score is None else f"{score:.4f}"
