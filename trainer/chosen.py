"""`twotower train --auto`: reads the data, chooses what the configuration leaves out, writes a complete one to edit.

Deliberately does not know the rules, nor how anything is trained.
"""

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomlkit
from rich.console import Console
from rich.table import Table
from rich.text import Text

from towers.errors import InvalidInputError
from towers.schema import PACKAGED_ENCODERS
from trainer import auto, data
from trainer.config import parse_config, read_toml

_LARGEST_DIM = 4096


def write_chosen(config_path: Path, data_folder: Path | None, console: Console) -> Path:
    """Completes a configuration and says what was chosen and why.

    Args:
        config_path: The TOML file; at least `[data]`.
        data_folder: Where the data files are; instead of `[data] folder`.
        console: Gets the table of choices.

    Returns:
        The complete configuration, `<name>.auto.toml` beside the file.

    Raises:
        InvalidInputError: the configuration or the data; or there is another file of that name, which may have been
            edited.
    """
    settings = read_toml(config_path)
    # What is there must be right by itself, so that a mistake is said of the user's file and before the data is read.
    config = parse_config(_filled(settings), config_path)
    folder = data_folder if data_folder is not None else config_path.parent / config.data.folder
    shape = auto.shape_of(data.read_data(config.data, config.feature_schema(), folder))
    choices = auto.choose(shape, settings, _has_encoder())
    path = config_path.with_suffix(".auto.toml")
    content = _content(config_path, choices)
    parse_config(tomlkit.parse(content).unwrap(), config_path)
    _write_once(path, content)
    console.print(_table(choices))
    console.print(f"Wrote {path}: edit it and train it by its own name", markup=False, highlight=False, soft_wrap=True)
    return path


def _filled(settings: auto.Settings) -> dict[str, Any]:
    """Settings with the least that a configuration must have; wrong ones stay wrong."""
    filled = {"features": [auto.HISTORY, auto.ITEM_ID], "model": {}, **settings}
    if isinstance(filled["model"], Mapping):
        filled["model"] = {"dim": _LARGEST_DIM, **filled["model"]}
    return filled


def _has_encoder() -> bool:
    packages = ("transformers", "peft", PACKAGED_ENCODERS[auto.ENCODER])
    return all(importlib.util.find_spec(package) is not None for package in packages)


def _content(config_path: Path, choices: Sequence[auto.Choice]) -> str:
    """The user's file, comments and all, with each choice in its place and the reason behind it."""
    document = tomlkit.parse(config_path.read_text(encoding="utf-8"))
    for choice in choices:
        match choice.place:
            case ("features",):
                document["features"] = declarations = tomlkit.aot()
                for declaration in choice.value:
                    declarations.append(tomlkit.item(dict(declaration)))
                continue
            case ("features", name, key):
                table = next(feature for feature in document["features"] if feature["name"] == name)
            case (name, key):
                table = document.setdefault(name, tomlkit.table())
        table[key] = tomlkit.item(choice.value).comment(choice.reason)
    return f"# Completed by `twotower train {config_path.name} --auto`.\n\n{tomlkit.dumps(document)}"


def _write_once(path: Path, content: str) -> None:
    try:
        if path.exists() and path.read_text(encoding="utf-8") != content:
            raise InvalidInputError(
                f"{path}: is there and differs from what --auto would write now; train it as it is, without --auto, or "
                "remove it"
            )
        path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise InvalidInputError(
            f"{path}: cannot be written ({error.strerror}); --auto keeps there what it chooses"
        ) from error


def _table(choices: Sequence[auto.Choice]) -> Table:
    table = Table(title="Chosen from the data; all else has its default")
    for heading in ("setting", "value", "because"):
        table.add_column(heading)
    for choice in choices:
        value = [feature["name"] for feature in choice.value] if choice.place == ("features",) else choice.value
        table.add_row(_name(choice.place), Text(json.dumps(value)), Text(choice.reason))
    return table


def _name(place: tuple[str, ...]) -> Text:
    return Text(f"[{place[0]}] {' '.join(place[1:])}".strip())
