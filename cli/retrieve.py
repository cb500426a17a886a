"""`twotower retrieve`: one query from the command line.

Deliberately does not know schemas: the service says which features it reads, and of which kind.
"""

import csv
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import options
from cli.filters import filter_of
from cli.options import DEFAULT_ADDRESS

if TYPE_CHECKING:
    from retrieval_client import FeatureValue, Filter, Retrieval, RetrievalClient

_TITLE = "title"


def retrieve(
    features: Annotated[
        list[str], typer.Argument(help="Features of the query; a list is separated by commas.", metavar="NAME=VALUE…")
    ],
    k: Annotated[int, typer.Option("-k", help="How many items.", min=1)] = 10,
    attribute: Annotated[
        list[str] | None,
        typer.Option(help="Catalogue column to show; may be repeated. The title, if there is one, by default."),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Item that must not be returned; may be repeated.", metavar="ID")
    ] = None,
    filter_: Annotated[
        list[str] | None,
        typer.Option(
            "--filter",
            help="Condition on catalogue columns: 'year>=1990', 'brand=acme', 'genres in Comedy,Drama', "
            "'genres not in Horror', 'title exists'; may be repeated, then all must hold.",
            metavar="CONDITION",
        ),
    ] = None,
    min_shards: Annotated[
        int, typer.Option(help="Fail when fewer shards than this answer.", metavar="COUNT", min=0)
    ] = 0,
    address: Annotated[str, typer.Option(help="The query service.", metavar="ADDRESS")] = DEFAULT_ADDRESS,
    timeout_s: Annotated[
        float, typer.Option("--timeout", help="Deadline in seconds.", metavar="SECONDS", min=0.001)
    ] = 5.0,
    as_json: options.Json = False,
) -> None:
    """Ask for the best items, for example: twotower retrieve user_id=42 history=50,181 -k 10."""
    from cli.screen import say

    texts = dict(split_feature(text) for text in features)
    condition = filter_of(filter_ or [])
    with connected(address, timeout_s) as client:
        query = query_of(texts, client, address)
        answer, milliseconds = _ask(client, query, k, attribute, exclude or [], min_shards, condition)
    if as_json:
        say(json.dumps(_as_json(answer, milliseconds)))
    else:
        _print(answer, milliseconds)


@contextmanager
def connected(address: str, timeout_s: float) -> "Iterator[RetrievalClient]":
    """A client of the query service.

    Raises:
        NotReadyError: the service cannot be reached.
    """
    from retrieval_client import RetrievalClient, UnavailableError
    from towers.errors import NotReadyError

    try:
        with RetrievalClient(address, timeout_s=timeout_s) as client:
            yield client
    except UnavailableError as error:
        raise NotReadyError(f"the query service at {address} is unavailable: {error.message}") from error


def query_of(texts: Mapping[str, str], client: "RetrievalClient", address: str) -> "dict[str, FeatureValue]":
    """Reads the features of a query as the live version wants them.

    Raises:
        InvalidInputError: it does not read one of them, or the text is not a number.
        NotReadyError: there is no live version yet.
    """
    from towers.errors import NotReadyError

    status = client.get_status()
    if status.live_version is None:
        raise NotReadyError(f"{address} has no version loaded yet; look at twotower status")
    kinds = {feature.name: feature.kind for feature in status.features}
    return {name: parse_value(name, text, kinds) for name, text in texts.items()}


def split_feature(text: str) -> tuple[str, str]:
    """Splits `name=value`.

    Raises:
        InvalidInputError: there is no name, or no `=`.
    """
    from towers.errors import InvalidInputError

    name, separator, value = text.partition("=")
    if not name or not separator:
        raise InvalidInputError(f"{text!r}: write a feature as name=value, for example user_id=42")
    return name, value


def parse_value(name: str, text: str, kinds: Mapping[str, str]) -> "FeatureValue":
    """Reads a value as its kind wants it. A list is one line of CSV, so an entry with a comma goes into quotes.

    Raises:
        InvalidInputError: the service does not read this feature, or the text is not a number.
    """
    from towers.errors import InvalidInputError

    match kinds.get(name):
        case None:
            known = ", ".join(f"{known} ({kind})" for known, kind in sorted(kinds.items()))
            raise InvalidInputError(f"feature {name!r}: the live version does not read it; it reads {known}")
        case "number" | "timestamp":
            return _number(name, text)
        case "sequence" | "categorical_list":
            return _entries(text)
        case "vector":
            return [_number(name, entry) for entry in _entries(text)]
        case _:
            return text


def _ask(
    client: "RetrievalClient",
    query: Mapping[str, "FeatureValue"],
    k: int,
    attribute: Sequence[str] | None,
    exclude: Sequence[str],
    min_shards: int,
    condition: "Filter | None",
) -> "tuple[Retrieval, float]":
    """The answer and its milliseconds; with titles if nothing else is asked for and the catalogue has them."""
    from retrieval_client import InvalidRequestError

    def timed(names: Sequence[str]) -> "tuple[Retrieval, float]":
        start_s = time.perf_counter()
        answer = client.retrieve(
            query, k, excluded_item_ids=exclude, min_shards=min_shards, attribute_names=names, filter=condition
        )
        return answer, (time.perf_counter() - start_s) * 1000

    if attribute is not None:
        return timed(attribute)
    try:
        return timed([_TITLE])
    except InvalidRequestError:
        # Whatever else may be wrong with the request is said by the second answer.
        return timed([])


def _entries(text: str) -> list[str]:
    return [entry.strip() for entry in next(csv.reader([text], skipinitialspace=True), [])]


def _number(name: str, text: str) -> float:
    from towers.errors import InvalidInputError

    try:
        return float(text)
    except ValueError as error:
        raise InvalidInputError(f"feature {name!r}: {text!r} is not a number") from error


def _as_json(answer: "Retrieval", milliseconds: float) -> dict[str, Any]:
    return {
        "checkpoint_version": answer.checkpoint_version,
        "milliseconds": round(milliseconds, 3),
        "shards_answered": answer.shards_answered,
        "shards_total": answer.shards_total,
        "degraded_reasons": list(answer.degraded_reasons),
        "embedding_cached": answer.embedding_cached,
        "items": [
            {"item_id": item.item_id, "score": item.score, "attributes": dict(item.attributes)} for item in answer.items
        ],
    }


def _print(answer: "Retrieval", milliseconds: float) -> None:
    from rich.table import Table
    from rich.text import Text

    from cli.screen import screen, shown

    names = list(answer.items[0].attributes) if answer.items else []
    table = Table()
    table.add_column("#", justify="right")
    for name in ("item_id", *names):
        table.add_column(name)
    table.add_column("score", justify="right")
    for rank, item in enumerate(answer.items, start=1):
        attributes = (Text(shown(item.attributes[name])) for name in names)
        table.add_row(str(rank), Text(item.item_id), *attributes, f"{item.score:.4f}")
    console = screen()
    console.print(table)
    cached = ", embedding from the cache" if answer.embedding_cached else ""
    console.print(
        Text(
            f"version {answer.checkpoint_version}, {milliseconds:.1f} ms, "
            f"{answer.shards_answered} of {answer.shards_total} shards{cached}"
        )
    )
    for reason in answer.degraded_reasons:
        console.print(Text(f"degraded: {reason}"))
