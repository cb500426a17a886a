"""Items by their titles."""

from pathlib import Path

import pytest
from doctor_subject import subject_of, wanting

from towers.errors import InvalidInputError
from trainer.config import DataConfig
from trainer.data import read_item_texts
from trainer.doctor.neighbours import neighbours_section
from trainer.doctor.subject import TITLE_COLUMNS


def config(**values: str) -> DataConfig:
    return DataConfig.model_validate({"interactions": "interactions.csv", "items": "items.csv"} | values)


def test_neighbours_have_titles_and_no_item_is_its_own() -> None:
    [table] = neighbours_section(subject_of([[4, 1, 2], [4, 2, 1]], wanting([0] * 6))).tables
    first, *_, cold = table.rows
    assert first[:2] == ("Tale 4", "2")
    assert cold[:2] == ("Tale 0", "0")
    # All others are as far: the first five of them.
    assert first[2] == "; ".join(f"Tale {item} (0.00)" for item in (0, 1, 2, 3, 5))


def test_items_without_ids_are_refused(tmp_path: Path) -> None:
    (tmp_path / "items.csv").write_text("id,title\n7,Seven\n")
    with pytest.raises(InvalidInputError, match=r"items\.csv: column 'item_id' .* is missing"):
        read_item_texts(config(), tmp_path, TITLE_COLUMNS)
