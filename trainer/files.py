"""Files of data, Parquet or CSV: which there are, which columns they have, and the rows of those that are wanted.

What cannot be read raises InvalidInputError, which names file and fix. Deliberately does not know what a column says.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from towers.errors import InvalidInputError

_ROWS_AT_ONCE = 1 << 20
_PATTERN = frozenset("*?[")


def files_of(path: Path, table: str) -> list[Path]:
    """The file itself; or the Parquet files of a folder, or those that a pattern names, in order of their paths."""
    if path.is_dir():
        folder, pattern = path, "**/*.parquet"
    elif _PATTERN.intersection(str(path)) and not path.exists():
        folder = next(parent for parent in path.parents if not _PATTERN.intersection(str(parent)))
        pattern = str(path.relative_to(folder))
    else:
        return [path]
    # What writers leave beside their parts (`_SUCCESS`, `_temporary`, `.part.crc`) is no data.
    files = [
        file
        for file in folder.glob(pattern)
        if file.is_file() and not any(part[0] in "._" for part in file.relative_to(folder).parts)
    ]
    if not files:
        raise InvalidInputError(f"{path}: there is no Parquet file; fix [data] {table} or folder")
    return sorted(files)


def read_table(
    path: Path, table: str, wanted: Mapping[str, str], as_strings: Sequence[str], separator: str
) -> pa.Table:
    """Reads the wanted columns; otherwise as `read_parts`."""
    parts = list(read_parts(path, table, wanted, as_strings, separator))
    if not parts:
        raise InvalidInputError(no_rows(path, table))
    return pa.concat_tables(parts)


def read_parts(
    path: Path, table: str, wanted: Mapping[str, str], as_strings: Sequence[str], separator: str
) -> Iterator[pa.Table]:
    """Reads the wanted columns, of a Parquet file so many rows at a time; no part is empty.

    Args:
        path: A Parquet or CSV file.
        table: Its key in `[data]`.
        wanted: Column name to who wants it, for messages.
        as_strings: Columns that a CSV file gives as they are written, so that an id 007 stays one.
        separator: Of CSV files.
    """
    try:
        if path.stat().st_size == 0:
            raise InvalidInputError(f"{path}: the file is empty; [data] {table} needs a Parquet or CSV file with rows")
        match path.suffix.lower():
            case ".parquet":
                with pq.ParquetFile(path) as file:
                    check_columns(path, file.schema_arrow.names, wanted)
                    for batch in file.iter_batches(_ROWS_AT_ONCE, columns=list(wanted)):
                        if batch.num_rows:
                            yield pa.Table.from_batches([batch])
            case ".csv" | ".tsv":
                parsing = _parsing(separator)
                with pacsv.open_csv(path, parse_options=parsing) as reader:
                    available = reader.schema.names
                check_columns(path, available, wanted)
                conversion = pacsv.ConvertOptions(
                    include_columns=list(wanted),
                    column_types={name: pa.string() for name in as_strings if name in wanted},
                )
                content = pacsv.read_csv(path, parse_options=parsing, convert_options=conversion)
                if content.num_rows:
                    yield content
            case suffix:
                raise InvalidInputError(
                    f"{path}: files ending in {suffix!r} cannot be read; [data] {table} needs .parquet or .csv"
                )
    except OSError as error:
        raise InvalidInputError(unreadable(path, table, error)) from error
    except pa.ArrowException as error:
        first_line = str(error).partition("\n")[0]
        raise InvalidInputError(
            f"{path}: not a readable {path.suffix[1:]} file ({first_line}); write it again"
        ) from error


def column_names(path: Path, separator: str) -> list[str]:
    """Of a file that may be read; none of one that may not, which is said when it is."""
    try:
        if path.suffix.lower() == ".parquet":
            return list(pq.read_schema(path).names)
        with pacsv.open_csv(path, parse_options=_parsing(separator)) as reader:
            return list(reader.schema.names)
    except (OSError, pa.ArrowException):
        return []


def _parsing(separator: str) -> pacsv.ParseOptions:
    return pacsv.ParseOptions(delimiter=separator, newlines_in_values=True)


def no_rows(path: Path, table: str) -> str:
    """What is wrong with a file without rows."""
    return f"{path}: the file has no rows; [data] {table} needs at least one"


def unreadable(path: Path, table: str, error: OSError) -> str:
    """Why a file cannot be read."""
    reason = "no such file" if isinstance(error, FileNotFoundError) else error.strerror or str(error)
    return f"{path}: {reason}; fix [data] {table} or folder"


def check_columns(path: Path, available: Sequence[str], wanted: Mapping[str, str]) -> None:
    """Refuses a file that lacks a wanted column, or has it twice."""
    missing = [f"column {name!r} ({who}) is missing" for name, who in wanted.items() if name not in available]
    repeated = [f"column {name!r} ({who}) is there twice" for name, who in wanted.items() if available.count(name) > 1]
    if missing or repeated:
        raise InvalidInputError(
            f"{path}: {'; '.join(missing + repeated)}. The file has {list(available)}; "
            "name one of these, or add the column"
        )
