"""Documents, queries and judgements in the layout of BEIR, as the tables of items, users and interactions.

(Thakur et al., "BEIR: A heterogeneous benchmark for zero-shot evaluation of information retrieval models", 2021.)
Deliberately does not know features, nor what is trained on the tables.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from towers.errors import InvalidInputError
from trainer.config import DataConfig

_PART_OF = {"train": "train", "dev": "validation", "test": "test"}
"""Name of a file of judgements to what its pairs are for, the latter as in `trainer.columns.PARTS`."""
_JUDGEMENTS_NAME = re.compile(rf"(?:.*[_.-])?({'|'.join(_PART_OF)})")
_JUDGEMENT_COLUMNS = ("query-id", "corpus-id", "score")
_VALIDATION_SHARE = 0.1
_DOCUMENT_ENDINGS = (".txt", ".md")
COLUMNS = DataConfig(interactions="judgements", items="documents", split_column="split")
"""How the columns of the judgements are named: as is usual, with a split."""


def read_documents(path: Path) -> pa.Table:
    """Columns `item_id`, `title`, `text` and `document`, which is both joined by a space, the title first.

    Args:
        path: A JSONL or Parquet file with a record for each document; or a folder, in which each file that ends in
            `.txt` or `.md` is one: its id is its path in there, its title the first line, without the `#` of a
            heading, its text the rest.

    Raises:
        InvalidInputError: a file cannot be read, or a record lacks a field. The message names line and field.
    """
    found = list(_in_folder(path) if path.is_dir() else _in_records(path))
    ids, titles, texts = zip(*found, strict=True) if found else ((), (), ())
    documents = [f"{title} {text}".strip() for title, text in zip(titles, texts, strict=True)]
    return pa.table({"item_id": _strings(ids), "title": _strings(titles), "text": _strings(texts)}).append_column(
        "document", _strings(documents)
    )


def document_files(folder: Path) -> list[Path]:
    """The files of a folder that are documents, in order of their paths; hidden ones are not.

    Raises:
        InvalidInputError: there is none.
    """
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in _DOCUMENT_ENDINGS
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
    if not files:
        raise InvalidInputError(
            f"{folder}: no file in it ends in {' or '.join(_DOCUMENT_ENDINGS)}; [data] items needs a file, or with "
            'layout = "beir" a folder of documents'
        )
    return files


def read_queries(path: Path) -> pa.Table:
    """Columns `user_id` and `text`.

    Raises:
        InvalidInputError: as for documents.
    """
    ids, texts = [], []
    for place, record in _records(path, "users"):
        ids.append(_text_of(record, _id_name(record, "query_id"), path, place))
        texts.append(_text_of(record, "text", path, place))
    return pa.table({"user_id": _strings(ids), "text": _strings(texts)})


def read_judgements(files: Sequence[Path], queries: pa.Table) -> tuple[pa.Table, list[str]]:
    """Columns `user_id`, `item_id`, `timestamp` (always 0: judgements have no time) and `split`, of relevant pairs.

    A text that is asked in several of training, validation and test is only in the last of these: its earlier pairs
    are left out, so that nothing is trained on or chosen by what is tested. Where no file is for validation, a tenth
    of the training queries is: those whose text comes first by its sha256, with all their pairs, whatever the order
    and number of files.

    Args:
        files: Named `train`, `dev` and `test`, or with such an ending as `qrels_train`; TSV or Parquet.
        queries: What `read_queries` gives.

    Returns:
        The table, and one line for each reason why pairs were left out.

    Raises:
        InvalidInputError: a file is not as it must be, names an unknown query, or none is for training or test.
    """
    texts = dict(zip(queries["user_id"].to_pylist(), queries["text"].to_pylist(), strict=True))
    found: dict[tuple[str, str, str], None] = {}
    num_irrelevant = 0
    for file in files:
        part = _part_of(file)
        for place, query_id, document_id, relevance in _judgements(file):
            if query_id not in texts:
                raise InvalidInputError(
                    f"{file}: {place}: query {query_id!r} is not in the file of [data] users; "
                    "add it, or remove the line"
                )
            if relevance > 0:
                found[query_id, document_id, part] = None
            else:
                num_irrelevant += 1
    pairs, num_repeated = _asked_once(list(found), texts)
    notes = []
    if num_irrelevant:
        notes.append(f"{num_irrelevant:,} judgements of relevance 0 or less were left out")
    if num_repeated:
        notes.append(f"{num_repeated:,} pairs were left out, as their query's text is asked in a later part too")
    parts = {part for _, _, part in pairs}
    for name in ("train", "test"):
        if name not in parts:
            raise InvalidInputError(
                f"{files[0].parent}: no relevant pair is for {name}; [data] interactions needs a file named {name!r}, "
                f"such as {name}.tsv or qrels_{name}.parquet"
            )
    if "validation" not in parts:
        pairs, num_held_out = _hold_out(pairs, texts)
        notes.append(f"there is no file named 'dev': {num_held_out:,} queries of training validate it instead")
    query_ids, document_ids, split = zip(*pairs, strict=True)
    columns = {"user_id": _strings(query_ids), "item_id": _strings(document_ids), "split": _strings(split)}
    return pa.table(columns).append_column("timestamp", pa.array([0] * len(pairs))), notes


def _in_records(path: Path) -> Iterator[tuple[str, str, str]]:
    """Id, title and text of each document."""
    for place, record in _records(path, "items"):
        yield (
            _text_of(record, _id_name(record, "doc_id"), path, place),
            _text_of(record, "title", path, place) if record.get("title") is not None else "",
            _text_of(record, "text", path, place),
        )


def _in_folder(folder: Path) -> Iterator[tuple[str, str, str]]:
    for file in document_files(folder):
        title, _, text = "\n".join(line for _, line in _lines(file, "items")).partition("\n")
        yield file.relative_to(folder).as_posix(), title.lstrip("# ").strip(), text.strip()


def _asked_once(
    pairs: Sequence[tuple[str, str, str]], texts: Mapping[str, str]
) -> tuple[list[tuple[str, str, str]], int]:
    order = list(_PART_OF.values())
    last: dict[str, int] = {}
    for query_id, _, part in pairs:
        text = _normalised(texts[query_id])
        last[text] = max(last.get(text, 0), order.index(part))
    kept = [pair for pair in pairs if last[_normalised(texts[pair[0]])] == order.index(pair[2])]
    return kept, len(pairs) - len(kept)


def _hold_out(
    pairs: Sequence[tuple[str, str, str]], texts: Mapping[str, str]
) -> tuple[list[tuple[str, str, str]], int]:
    trained = {_normalised(texts[query_id]) for query_id, _, part in pairs if part == "train"}
    shuffled = sorted(trained, key=lambda text: hashlib.sha256(text.encode()).digest())
    # At least one to train on.
    held_out = set(shuffled[: min(math.ceil(_VALIDATION_SHARE * len(shuffled)), len(shuffled) - 1)])
    moved = [
        (query_id, document_id, "validation" if _normalised(texts[query_id]) in held_out else part)
        for query_id, document_id, part in pairs
    ]
    return moved, len({query_id for query_id, _, part in moved if part == "validation"})


def _normalised(text: str) -> str:
    return " ".join(text.casefold().split())


def _part_of(file: Path) -> str:
    match = _JUDGEMENTS_NAME.fullmatch(file.stem)
    if match is None:
        raise InvalidInputError(
            f"{file}: the name does not say what its pairs are for; name it or let it end in one of {list(_PART_OF)}, "
            "such as train.tsv or qrels_train.parquet"
        )
    return _PART_OF[match.group(1)]


def _judgements(file: Path) -> Iterator[tuple[str, str, str, float]]:
    """Place in the file, query, document and relevance."""
    if file.suffix.lower() == ".parquet":
        for place, record in _records(file, "interactions"):
            ids = (_text_of(record, name, file, place) for name in ("query_id", "doc_id"))
            yield (place, *ids, _relevance(record.get("relevance"), "relevance", file, place))  # type: ignore[misc]
        return
    for number, line in _lines(file, "interactions"):
        fields = line.split("\t")
        if len(fields) != len(_JUDGEMENT_COLUMNS):
            raise InvalidInputError(
                f"{file}: line {number} has {len(fields)} fields, not {len(_JUDGEMENT_COLUMNS)}: write "
                f"{', '.join(_JUDGEMENT_COLUMNS)}, with a tab between two"
            )
        if number == 1 and tuple(fields) == _JUDGEMENT_COLUMNS:
            continue
        yield f"line {number}", fields[0], fields[1], _relevance(fields[2], "score", file, f"line {number}")


def _relevance(value: Any, field: str, file: Path, place: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"{file}: {place}: field {field!r} is {value!r}; give a number") from error


def _records(path: Path, table: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Place in the file and fields of each record of a JSONL or Parquet file."""
    match path.suffix.lower():
        case ".jsonl":
            for number, line in _lines(path, table):
                try:
                    record = json.loads(line)
                except json.JSONDecodeError as error:
                    raise InvalidInputError(f"{path}: line {number} is not JSON: {error.msg}") from error
                if not isinstance(record, dict):
                    raise InvalidInputError(f"{path}: line {number} is not a JSON object; write one on each line")
                yield f"line {number}", record
        case ".parquet":
            try:
                rows = pq.read_table(path).to_pylist()
            except OSError as error:
                raise InvalidInputError(_unreadable(path, table, error)) from error
            except pa.ArrowException as error:
                raise InvalidInputError(f"{path}: not a readable parquet file; write it again") from error
            for number, row in enumerate(rows, 1):
                yield f"row {number}", row
        case suffix:
            raise InvalidInputError(
                f"{path}: files ending in {suffix!r} cannot be read; [data] {table} of layout 'beir' needs "
                f"{'.tsv' if table == 'interactions' else '.jsonl'} or .parquet"
            )


def _lines(path: Path, table: str) -> Iterator[tuple[int, str]]:
    """Number, from 1, and content of each line that is not empty."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line.rstrip("\r\n")
    except OSError as error:
        raise InvalidInputError(_unreadable(path, table, error)) from error
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); write it again") from error


def _unreadable(path: Path, table: str, error: OSError) -> str:
    reason = "no such file" if isinstance(error, FileNotFoundError) else error.strerror or str(error)
    return f"{path}: {reason}; fix [data] {table} or folder"


def _id_name(record: Mapping[str, Any], in_parquet: str) -> str:
    return in_parquet if in_parquet in record else "_id"


def _text_of(record: Mapping[str, Any], field: str, path: Path, place: str) -> str:
    value = record.get(field)
    is_id = field.endswith("id")
    if is_id and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or (is_id and not value):
        found = "missing" if value is None else f"{value!r}"[:60]
        raise InvalidInputError(f"{path}: {place}: field {field!r} is {found}; give a string")
    return value


def _strings(values: Sequence[str]) -> pa.Array:
    return pa.array(values, type=pa.large_string())
