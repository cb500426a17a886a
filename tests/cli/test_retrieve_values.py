"""How `twotower retrieve` reads a feature from the command line."""

import pytest

from cli.retrieve import parse_value, split_feature
from towers.errors import InvalidInputError

KINDS = {
    "user_id": "categorical",
    "history": "sequence",
    "genres": "categorical_list",
    "age": "number",
    "at": "timestamp",
    "words": "text",
    "image": "vector",
}


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("user_id", "42", "42"),
        ("user_id", "a,b=c", "a,b=c"),
        ("user_id", "", ""),
        ("words", "red, shoes", "red, shoes"),
        ("history", "50,181", ["50", "181"]),
        ("history", "50, 181", ["50", "181"]),
        ("history", "", []),
        ("history", '"a,b",c', ["a,b", "c"]),
        ("genres", "Drama", ["Drama"]),
        ("age", "1e3", 1000.0),
        ("at", "1700000000", 1_700_000_000.0),
        ("image", "0.5,-1, 2", [0.5, -1.0, 2.0]),
    ],
)
def test_a_value_is_read_as_its_kind_wants_it(name: str, text: str, value: object) -> None:
    assert split_feature(f"{name}={text}") == (name, text)
    assert parse_value(name, text, KINDS) == value


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("age", "old", "feature 'age': 'old' is not a number"),
        ("age", "", "feature 'age': '' is not a number"),
        ("image", "1,x", "feature 'image': 'x' is not a number"),
        ("agee", "1", "feature 'agee': the live version does not read it; it reads age (number), at (timestamp)"),
    ],
)
def test_a_value_that_cannot_be_read(name: str, text: str, words: str) -> None:
    with pytest.raises(InvalidInputError) as failure:
        parse_value(name, text, KINDS)
    assert str(failure.value).startswith(words)
