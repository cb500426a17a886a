"""`twotower catalog`: items into the catalogue.

Deliberately does not know what the columns mean.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli import options
from cli.options import DEFAULT_STORE

if TYPE_CHECKING:
    import pyarrow as pa

app = typer.Typer(help="The catalogue of items.")


@app.callback()
def catalog() -> None:
    """The catalogue of items."""


@app.command()
def load(
    items: Annotated[Path, typer.Argument(help="A Parquet or CSV file, one row per item.", metavar="ITEMS")],
    store: options.StoreUrl = DEFAULT_STORE,
    id_column: Annotated[str, typer.Option(help="Column that holds the ids of the items.", metavar="NAME")] = "item_id",
    separator: Annotated[
        str, typer.Option(help="What separates the columns of a CSV file.", metavar="CHARACTER")
    ] = ",",
) -> None:
    """Add items, or replace those with the same id."""
    from cli.screen import say
    from towers.catalogue import Catalogue
    from towers.store import Store

    table = read_items(items, id_column, separator)
    report = Catalogue(Store(store)).upsert(table)
    say(
        f"{report.num_rows:,} rows read, {report.num_items:,} items upserted, "
        f"{report.num_duplicates:,} duplicate ids (the last row wins); catalogue version {report.catalogue_version}"
    )


@app.command()
def compact(store: options.StoreUrl = DEFAULT_STORE) -> None:
    """Fold the log of changes into the snapshot, so that reads stay fast. Nothing is rebuilt because of it."""
    from cli.screen import say
    from towers.catalogue import Catalogue
    from towers.store import Store

    catalogue = Catalogue(Store(store))
    catalogue.compact()
    say(f"catalogue version {catalogue.version()} is one snapshot now")


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

    from towers.catalogue import ITEM_ID
    from towers.errors import InvalidInputError

    try:
        match path.suffix.lower():
            case ".parquet":
                with path.open("rb") as file:
                    table = pq.read_table(file)
            case ".csv":
                table = _read_csv(path, id_column, separator)
            case _:
                raise InvalidInputError(f"{path}: items are read from .parquet and .csv files")
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
