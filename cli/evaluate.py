"""`twotower evaluate`.

Deliberately does not know how a model is judged.
"""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli import options
from cli.options import DEFAULT_STORE
from cli.retrieve import connected

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from retrieval_client import RetrievalClient
    from trainer.live import AskLive, LiveQuery

_TIMEOUT_S = 5.0


def evaluate(
    version: Annotated[int, typer.Argument(help="The checkpoint.", metavar="VERSION")],
    data: Annotated[Path, typer.Argument(help="Folder of the data files.", metavar="DATA")],
    store: options.StoreUrl = DEFAULT_STORE,
    live: Annotated[
        str | None,
        typer.Option(help="Ask this query service too; it must serve the checkpoint.", metavar="ADDRESS"),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures here.", metavar="FILE")] = None,
) -> None:
    """Rank all items for each user's last interaction, by a checkpoint and by baselines, overall and by slice.

    With --live the same is asked of a running query service: what the index leaves of exact search.
    """
    # Read when torch is imported: threads that spin while they wait starve themselves on busy cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from cli.screen import say, screen
    from towers.checkpoint import CheckpointStore
    from towers.store import Store
    from trainer import comparison
    from trainer.judge import evaluate_version

    checkpoints = CheckpointStore(Store(store))
    if live is None:
        evaluation = evaluate_version(checkpoints, version, data)
    else:
        with connected(live, _TIMEOUT_S) as client:
            evaluation = evaluate_version(checkpoints, version, data, asking(client, live, version))
    found, ks = evaluation.comparison, evaluation.options.ks
    for note in evaluation.notes:
        say(f"Warning: {note}")
    seen = "seen items left out" if evaluation.options.exclude_seen else "seen items included"
    title = (
        f"Checkpoint {version}: {found.num_targets:,} targets of {found.num_queries:,} users, all items ranked, {seen}"
    )
    screen().print(comparison.accuracy_table(found, ks, title))
    screen().print(comparison.exposure_table(found, ks))
    screen().print(comparison.slice_table(found, evaluation.options.metric))
    if json_file is not None:
        json_file.write_text(json.dumps({"version": version, **comparison.as_json(found)}, indent=1) + "\n")


def asking(client: "RetrievalClient", address: str, version: int) -> "AskLive":
    """Asks a query service, of which every answer must be whole and by this version.

    Raises:
        NotReadyError: another version answers, or not all shards do.
        RetrievalError: a query fails.
    """
    from retrieval_client import Retrieval, StreamedQuery
    from towers.errors import NotReadyError

    def ask(queries: "Sequence[LiveQuery]", k: int) -> "Iterator[Sequence[str]]":
        streamed = (StreamedQuery(query.features, query.excluded_item_ids) for query in queries)
        for answer in client.stream_retrieve(streamed, k):
            if not isinstance(answer, Retrieval):
                raise answer
            if answer.checkpoint_version != version:
                raise NotReadyError(
                    f"{address} serves version {answer.checkpoint_version} and not {version}; evaluate that one, or "
                    "promote this one first"
                )
            if answer.degraded_reasons:
                raise NotReadyError(f"{address} does not answer in full: {answer.degraded_reasons[0]}")
            yield [item.item_id for item in answer.items]

    return ask
