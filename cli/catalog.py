"""`twotower catalog`: items into the catalogue and out of it.

Deliberately does not know what the columns mean.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli import options
from cli.options import DEFAULT_STORE

if TYPE_CHECKING:
    import pyarrow as pa

    from towers.catalogue import Catalogue

_NUM_CHANGES = 10
"""Of the newest commits that are shown."""
_MANY_COMMITS = 1000
"""From here on a start that finds no index reads noticeably longer."""

app = typer.Typer(help="The catalogue of items.")


@app.callback()
def catalog() -> None:
    """The catalogue of items."""


@app.command()
def load(
    items: Annotated[
        Path,
        typer.Argument(
            help="A Parquet or CSV file, one row per item; documents: a JSONL file as BEIR's corpus.jsonl, or a folder "
            "of .txt and .md files; or the configuration of a training, CONFIG.toml, whose items are meant.",
            metavar="ITEMS",
        ),
    ],
    store: options.StoreUrl = DEFAULT_STORE,
    id_column: Annotated[
        str | None,
        typer.Option(help="Column of a table that holds the ids of the items.", metavar="NAME", show_default="item_id"),
    ] = None,
    separator: Annotated[
        str | None,
        typer.Option(help="What separates the columns of a CSV file.", metavar="CHARACTER", show_default=","),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of the data files, instead of the configuration's.", metavar="FOLDER")
    ] = None,
) -> None:
    """Add items, or replace those with the same id."""
    from cli.screen import say
    from towers.catalogue import Catalogue
    from towers.store import Store

    table = _read(items, id_column, separator, data)
    report = Catalogue(Store(store)).upsert(table)
    say(
        f"{report.num_rows:,} rows read, {report.num_items:,} items upserted, "
        f"{report.num_duplicates:,} duplicate ids (the last row wins); catalogue version {report.catalogue_version}"
    )


@app.command()
def delete(
    item_ids: Annotated[
        list[str] | None, typer.Argument(help="Ids of items.", metavar="IDS...", show_default=False)
    ] = None,
    file: Annotated[Path | None, typer.Option(help="A text file with one id a line.", metavar="FILE")] = None,
    store: options.StoreUrl = DEFAULT_STORE,
) -> None:
    """Delete items. Ids that the catalogue does not hold are allowed."""
    from cli.screen import say
    from towers.catalogue import Catalogue
    from towers.errors import InvalidInputError
    from towers.store import Store

    ids = list(item_ids or ()) + ([] if file is None else _read_ids(file))
    if not ids:
        raise InvalidInputError("name the items to be deleted, or a file with their ids: --file IDS.txt")
    catalogue = Catalogue(Store(store))
    num_items = catalogue.delete(ids)
    say(f"{num_items:,} different ids deleted; catalogue version {catalogue.version()}")


@app.command()
def show(
    item_id: Annotated[
        str | None, typer.Argument(help="Show this item alone.", metavar="ID", show_default=False)
    ] = None,
    store: options.StoreUrl = DEFAULT_STORE,
    as_json: options.Json = False,
) -> None:
    """Show what the catalogue holds, or one item with its attributes."""
    from towers.catalogue import Catalogue
    from towers.store import Store

    catalogue = Catalogue(Store(store))
    if item_id is None:
        _show_catalogue(catalogue, as_json)
    else:
        _show_item(catalogue, item_id, as_json)


@app.command()
def compact(store: options.StoreUrl = DEFAULT_STORE) -> None:
    """Fold the log of changes into the snapshot, so that reads stay fast. Nothing is rebuilt because of it."""
    from cli.screen import say
    from towers.catalogue import Catalogue
    from towers.store import Store

    catalogue = Catalogue(Store(store))
    catalogue.compact()
    say(f"catalogue version {catalogue.version()} is one snapshot now")


def _show_catalogue(catalogue: "Catalogue", as_json: bool) -> None:
    from cli.screen import print_table, say, screen

    snapshot = catalogue.read()
    attributes = {field.name: str(field.type) for field in snapshot.items.schema if field.name != "item_id"}
    num_unfolded, changes = catalogue.num_unfolded(), catalogue.last_changes(_NUM_CHANGES)
    if as_json:
        content = {
            "catalogue_version": snapshot.version,
            "num_items": snapshot.items.num_rows,
            "attributes": attributes,
            "commits_since_compaction": num_unfolded,
            "last_changes": [
                {
                    "commit": change.number,
                    "created": change.created and change.created.isoformat(),
                    "upserts": change.num_upserts,
                    "deletes": change.num_deletes,
                }
                for change in changes
            ],
        }
        say(json.dumps(content))
        return
    say(f"catalogue version {snapshot.version}: {snapshot.items.num_rows:,} items")
    advice = "; fold them: twotower catalog compact" if num_unfolded > _MANY_COMMITS else ""
    say(f"{num_unfolded:,} commits since the last compaction{advice}")
    console = screen()
    missing = {name: snapshot.items[name].null_count for name in attributes}
    rows = [(name, type_, f"{missing[name]:,}") for name, type_ in attributes.items()]
    print_table(console, "attributes", ("name", "type", "items without it"), rows)
    recent = [
        (
            str(change.number),
            change.created.strftime("%Y-%m-%d %H:%M:%S UTC") if change.created else "",
            f"{change.num_upserts:,}",
            f"{change.num_deletes:,}",
        )
        for change in changes
    ]
    print_table(console, "last changes", ("commit", "written", "upserts", "deletes"), recent)


def _show_item(catalogue: "Catalogue", item_id: str, as_json: bool) -> None:
    import pyarrow.compute as pc

    from cli.screen import print_table, say, screen, shown
    from towers.errors import NotFoundError

    snapshot = catalogue.read()
    found = snapshot.items.filter(pc.equal(snapshot.items["item_id"], item_id)).to_pylist()
    if not found:
        raise NotFoundError(f"catalogue version {snapshot.version} has no item {item_id!r}")
    if as_json:
        say(json.dumps(found[0], default=str))
        return
    types = {field.name: str(field.type) for field in snapshot.items.schema}
    rows = [(name, types[name], shown(value)) for name, value in found[0].items() if name != "item_id"]
    print_table(screen(), item_id, ("attribute", "type", "value"), rows)


def _read_ids(path: Path) -> list[str]:
    from towers.errors import InvalidInputError

    try:
        # Not splitlines, which takes more characters for an end than a text editor does.
        return [line for line in path.read_text(encoding="utf-8").split("\n") if line]
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"{path}: it cannot be read: {error}") from error


def _read(path: Path, id_column: str | None, separator: str | None, data: Path | None) -> "pa.Table":
    """Reads items of whatever form, by the ending of the path.

    Raises:
        InvalidInputError: they cannot be read, or an option is given that this form does not need.
    """
    from towers.errors import InvalidInputError
    from trainer.beir import read_documents
    from trainer.config import read_config

    is_config, is_documents = path.suffix.lower() == ".toml", path.suffix.lower() == ".jsonl" or path.is_dir()
    if data is not None and not is_config:
        raise InvalidInputError(f"--data {data}: {path} names its file itself; leave --data out, or give a CONFIG.toml")
    of_tables = [name for name, value in (("--id-column", id_column), ("--separator", separator)) if value is not None]
    if of_tables and (is_config or is_documents):
        raise InvalidInputError(f"{path}: it says by itself what its columns are; leave out {' and '.join(of_tables)}")
    if is_documents:
        return read_documents(path)
    if not is_config:
        return read_items(path, id_column or "item_id", separator or ",")
    config = read_config(path).data
    items = (path.parent / config.folder if data is None else data) / config.items
    return (
        read_documents(items)
        if config.layout == "beir"
        else read_items(items, config.item_id_column, config.csv_separator)
    )


def read_items(path: Path, id_column: str = "item_id", separator: str = ",") -> "pa.Table":
    """Reads a table of items.

    Args:
        path: A Parquet or CSV file, by its ending. In a CSV file an empty cell is a missing value, and a column of
            integers written in another way than integers are (`007`) stays text.
        id_column: The column that becomes `item_id`.
        separator: Of a CSV file.

    Raises:
        InvalidInputError: the file or its id column is missing, or it cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from towers.catalogue_columns import ITEM_ID
    from towers.errors import InvalidInputError

    try:
        match path.suffix.lower():
            case ".parquet":
                with path.open("rb") as file:
                    table = pq.read_table(file)
            case ".csv":
                table = _read_csv(path, id_column, separator)
            case _:
                raise InvalidInputError(
                    f"{path}: items are read from .parquet, .csv and .jsonl files, from folders of documents, and as "
                    "a CONFIG.toml names them"
                )
    except OSError as error:
        raise InvalidInputError(f"{path}: it cannot be read: {error.strerror or error}") from error
    except pa.ArrowException as error:
        raise InvalidInputError(f"{path}: it cannot be read: {error}") from error
    if id_column not in table.column_names:
        raise InvalidInputError(
            f"{path}: there is no column {id_column!r}; name the one with the ids by --id-column, "
            f"one of {', '.join(table.column_names)}"
        )
    if id_column == ITEM_ID:
        return table
    if ITEM_ID in table.column_names:
        raise InvalidInputError(f"{path}: beside {id_column!r} there is a column {ITEM_ID!r}; rename or remove it")
    return table.rename_columns({id_column: ITEM_ID})


def _read_csv(path: Path, id_column: str, separator: str) -> "pa.Table":
    import pyarrow as pa
    import pyarrow.compute as pc
    from pyarrow import csv

    from towers.errors import InvalidInputError

    if len(separator) != 1:
        raise InvalidInputError(f"--separator {separator!r}: give one character")
    parsing = csv.ParseOptions(delimiter=separator, newlines_in_values=True)

    def read(types: dict[str, pa.DataType]) -> pa.Table:
        # An empty cell is missing, also where the column is text.
        conversion = csv.ConvertOptions(column_types=types, strings_can_be_null=True, null_values=[""])
        with path.open("rb") as file:
            return csv.read_csv(file, parse_options=parsing, convert_options=conversion)

    table = read({id_column: pa.string()})
    as_text = [name for name in table.column_names if name == id_column or pa.types.is_integer(table[name].type)]
    written = read(dict.fromkeys(as_text, pa.string()))
    for position, name in enumerate(table.column_names):
        # An id such as 007 is not the number 7, and training reads it as it is written.
        if name in as_text and not pc.all(pc.equal(table[name].cast(pa.string()), written[name])).as_py():
            table = table.set_column(position, name, written[name])
    return table
