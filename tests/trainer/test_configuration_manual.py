"""The manual of the training configuration names every key, with its default."""

import re
from pathlib import Path

import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from towers import schema
from trainer import config

MANUAL = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()
LEARNED = {"mean", "std", "boundaries", "reference_time_s"}


def rows(title: str) -> dict[str, list[str]]:
    """Key to the other cells of its row, of one section."""
    section = re.split(r"^## ", MANUAL, flags=re.MULTILINE)
    [text] = [part for part in section if part.startswith(f"`{title}`")]
    found = {}
    for line in text.splitlines():
        if line.startswith("| `"):
            keys, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            names = re.findall(r"`([^`]+)`", keys)
            for position, name in enumerate(names):
                found[name] = [
                    cell.split(", ")[position] if cell.count(", ") == len(names) - 1 > 0 else cell for cell in cells
                ]
    return found


@pytest.mark.parametrize(
    ("title", "table"),
    [
        ("[data]", config.DataConfig),
        ("[model]", config.ModelConfig),
        ("[training]", config.TrainingConfig),
        ("[evaluation]", config.EvaluationConfig),
        ("[export]", config.ExportConfig),
    ],
)
def test_tables(title: str, table: type[BaseModel]) -> None:
    described = rows(title)
    assert described.keys() == table.model_fields.keys()
    for name, field in table.model_fields.items():
        said = described[name][0].strip("`")
        if field.default is PydanticUndefined:
            assert said == "required", name
        elif field.default is None:
            assert said == "none", name
        else:
            expected = list(field.default) if isinstance(field.default, tuple) else field.default
            assert said == (str(expected).lower() if isinstance(expected, bool) else str(expected)), name


def test_features() -> None:
    kinds = (
        schema.CategoricalFeature,
        schema.CategoricalListFeature,
        schema.SequenceFeature,
        schema.NumberFeature,
        schema.TimestampFeature,
        schema.TextFeature,
        schema.VectorFeature,
    )
    keys = {name for kind in kinds for name in kind.model_fields} - LEARNED
    assert rows("[[features]]").keys() == keys
