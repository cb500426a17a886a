"""The docstrings of Python's standard library as a collection of documents, with their first lines as queries.

It is on every machine that runs this. Deliberately does not know what is trained on it; modules are read and not run.
"""

import ast
import hashlib
import json
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

MODULES = (
    "argparse", "ast", "base64", "bisect", "calendar", "codecs", "collections", "concurrent", "contextlib", "copy",
    "csv", "dataclasses", "difflib", "enum", "fileinput", "fractions", "functools", "getopt", "getpass", "glob",
    "gzip", "heapq", "html", "http", "json", "linecache", "logging", "mailbox", "mimetypes", "multiprocessing", "os",
    "pathlib", "pickle", "platform", "plistlib", "pprint", "queue", "random", "reprlib", "sched", "secrets",
    "selectors", "shelve", "shlex", "shutil", "smtplib", "socket", "socketserver", "ssl", "statistics", "string",
    "subprocess", "tarfile", "tempfile", "textwrap", "threading", "timeit", "tokenize", "traceback", "types",
    "typing", "urllib", "uuid", "warnings", "weakref", "webbrowser", "zipfile",
)  # fmt: skip
"""Modules and packages that people ask about."""
_FEWEST_WORDS = 8
"""Of a summary and of the rest, together: what is shorter says nothing."""
_TEST_SHARE = 0.1


@dataclass(frozen=True)
class Document:
    """What is documented, and how."""

    name: str
    """`json.dumps`"""
    summary: str
    """The first paragraph of the docstring, in one line."""
    rest: str
    """All that follows it, likewise."""


def documents(modules: Sequence[str] = MODULES, folder: Path | None = None) -> list[Document]:
    """What is public and has a docstring of more than one paragraph, in the order of the names.

    Args:
        modules: Names of modules and packages; those that this Python lacks are left out.
        folder: Of the standard library. None: of the Python that runs.
    """
    root = folder or Path(sysconfig.get_path("stdlib"))
    files = sorted(
        file
        for module in modules
        for file in [root / f"{module}.py", *(root / module).rglob("*.py")]
        if file.is_file() and not {"test", "tests"} & set(file.relative_to(root).parts)
    )
    found: dict[str, Document] = {}
    for file in files:
        parts = file.relative_to(root).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        if not any(part.startswith("_") for part in name.split(".")):
            found |= {document.name: document for document in _in(ast.parse(file.read_bytes()), name)}
    # The same words under two names would be two answers to one question.
    by_words = {(document.summary, document.rest): document for document in found.values()}
    return sorted(by_words.values(), key=lambda document: document.name)


def write(found: Sequence[Document], folder: Path) -> None:
    """Writes documents in the layout of BEIR: a summary asks for the document with the rest of its docstring.

    The summary is the document's title, to be shown, and not part of the text that is searched. A tenth of the
    summaries, those whose document's name comes first by its sha256, are for the test.

    Args:
        found: The documents.
        folder: Gets `corpus.jsonl`, `queries.jsonl`, `qrels/train.tsv` and `qrels/test.tsv`.
    """
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    shuffled = sorted((document.name for document in found), key=lambda name: hashlib.sha256(name.encode()).digest())
    num_tested = max(1, round(_TEST_SHARE * len(shuffled)))
    for part, names in (("test", shuffled[:num_tested]), ("train", shuffled[num_tested:])):
        rows = "".join(f"{name}\t{name}\t1\n" for name in names)
        (folder / "qrels" / f"{part}.tsv").write_text(f"query-id\tcorpus-id\tscore\n{rows}", encoding="utf-8")
    _write_lines(folder / "queries.jsonl", [{"_id": document.name, "text": document.summary} for document in found])
    # Last: where it is, the others are too.
    _write_lines(
        folder / "corpus.jsonl",
        [
            {"_id": document.name, "title": document.summary, "text": f"{document.name}: {document.rest}"}
            for document in found
        ],
    )


def _in(node: ast.AST, name: str) -> Iterator[Document]:
    """What a module or class documents, itself included."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        summary, _, rest = (" ".join(part.split()) for part in _partitioned(ast.get_docstring(node) or ""))
        if summary and rest and len(f"{summary} {rest}".split()) >= _FEWEST_WORDS:
            yield Document(name, summary, rest)
    if isinstance(node, ast.Module | ast.ClassDef):
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith(
                "_"
            ):
                yield from _in(child, f"{name}.{child.name}")


def _partitioned(docstring: str) -> tuple[str, str, str]:
    return re.sub(r"\n\s*\n", "\n\n", docstring.strip()).partition("\n\n")


def _write_lines(path: Path, records: Sequence[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
