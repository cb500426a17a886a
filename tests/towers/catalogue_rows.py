"""What a catalogue holds, in a form that tests compare.

Deliberately does not know how it came there.
"""

from towers.catalogue import Catalogue


def rows_by_id(catalogue: Catalogue, version: str | None = None) -> dict[str, dict[str, object]]:
    """Item id to its attributes that are not null."""
    rows = catalogue.read(version).items.to_pylist()
    return {row.pop("item_id"): {name: value for name, value in row.items() if value is not None} for row in rows}
