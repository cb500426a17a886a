"""The demonstration of text search, from documents to answers, in the order in which it is printed.

Deliberately calls the commands that users call, each in a process of its own.
"""

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

import trainer
from cli.demo import library
from cli.demo.run import twotower
from cli.local_stack import LocalStack
from retrieval_client import Retrieval, RetrievalClient
from towers.catalogue import Catalogue
from towers.checkpoint import CheckpointStore
from towers.store import Store

CONFIG = Path(trainer.__file__).parent / "configs" / "standard-library.toml"
EXAMPLES = (
    "how do I write an object as JSON?",
    "split a command line into words as a shell does",
    "the middle value of some numbers",
    "run another program and read what it prints",
)
K = 5
_READY_S = 600.0
"""Shards embed all documents before they are ready."""
_TIMEOUT_S = 10.0


def run(folder: Path, console: Console, config: Path = CONFIG, modules: Sequence[str] = library.MODULES) -> None:
    """Runs the demonstration; Ctrl-C at a question ends it as an empty line does.

    Args:
        folder: Holds documents, store and logs; what an earlier run left there is used again.
        console: Where everything is printed.
        config: Of the training.
        modules: Whose docstrings are the documents.

    Raises:
        TwoTowerError: a step failed; the message says which and why.
    """
    store, data = folder / "store", folder / "data"
    console.print(Rule("Documents"))
    if not (data / "corpus.jsonl").exists():
        library.write(library.documents(modules), data)
    num_documents = len((data / "corpus.jsonl").read_text(encoding="utf-8").splitlines())
    console.print(
        f"{num_documents:,} docstrings of the standard library of this Python are in {data}. The first paragraph of "
        "each is its title, and the query that its document, the rest, is to be found for.",
        highlight=False,
    )

    console.print(Rule("Training"))
    if CheckpointStore(Store(str(store))).versions():
        console.print("Version 1 is there from an earlier run.")
    else:
        twotower("train", str(config), "--data", str(data), "--store", str(store))

    console.print(Rule("Serving"))
    if Catalogue(Store(str(store))).version() is None:
        twotower("catalog", "load", str(data / "corpus.jsonl"), "--store", str(store))
    with LocalStack(store=str(store), folder=folder, query_port=0) as stack:
        stack.wait_ready(_READY_S)
        console.print(f"Services are up: {', '.join(stack.names)}; the query service answers on {stack.query_address}")
        console.print(Rule("Questions"))
        with RetrievalClient(stack.query_address, timeout_s=_TIMEOUT_S) as client:
            client.get_status()  # Connects, so that the first answer's time is its own.
            answer_all(typed(console) if sys.stdin.isatty() else EXAMPLES, client, console)
    console.print(f"Nothing is left running. To serve again: .venv/bin/twotower up --store {store}", highlight=False)


def typed(console: Console) -> Iterator[str]:
    """What is typed, a question a line, until an empty line, Ctrl-D or Ctrl-C."""
    console.print("Ask what Python's standard library can do; an empty line ends.")
    while True:
        try:
            question = console.input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if not question:
            return
        yield question


def answer_all(questions: Iterable[str], client: RetrievalClient, console: Console) -> None:
    """Prints the titles of the documents that are nearest to each question."""
    for question in questions:
        start_s = time.perf_counter()
        answer = client.retrieve({"text": question}, k=K, attribute_names=["title"])
        milliseconds = (time.perf_counter() - start_s) * 1000
        console.print(_shown(question, answer, milliseconds))


def _shown(question: str, answer: Retrieval, milliseconds: float) -> Table:
    table = Table(title=Text(f"{question}  ({milliseconds:.1f} ms)"), title_justify="left")
    for name in ("#", "title", "document", "score"):
        table.add_column(name, justify="left" if name in ("title", "document") else "right")
    for rank, item in enumerate(answer.items, start=1):
        table.add_row(str(rank), Text(str(item.attributes["title"])), item.item_id, f"{item.score:.4f}")
    return table
