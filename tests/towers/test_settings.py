"""Addresses of shards, replicas and layouts as users write them, and what is said of a slip."""

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from towers.settings import Layouts, layouts_text

LAYOUTS: TypeAdapter[Any] = TypeAdapter(Layouts)


@pytest.mark.parametrize(
    ("text", "layouts"),
    [
        ("a:1", ((("a:1",),),)),
        ("a:1,b:1", ((("a:1",), ("b:1",)),)),
        (" a:1 | a:2 , unix:/run/b ", ((("a:1", "a:2"), ("unix:/run/b",)),)),
        ("a:1|a:2,b:1;c:1,d:1,[::1]:1", ((("a:1", "a:2"), ("b:1",)), (("c:1",), ("d:1",), ("[::1]:1",)))),
    ],
)
def test_shards_replicas_and_layouts_are_told_apart(text: str, layouts: Any) -> None:
    assert LAYOUTS.validate_python(text) == layouts
    assert LAYOUTS.validate_python(layouts) == layouts
    assert LAYOUTS.validate_python(layouts_text(layouts)) == layouts


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("", "give at least one address"),
        ((), "give at least one address"),
        ((((),),), "give at least one address"),
        (((("a:1",), ()),), "every shard has at least one address"),
        (((("a:1",),), ()), "every shard has at least one address"),
        ("a:1,", "'' is not host:port"),
        ("a:1|,b:1", "'' is not host:port"),
        ("a:1;", "'' is not host:port"),
        ("a:1|b", "'b' is not host:port"),
        ("a:1,b:1;c:1|a:1", "a:1 is named more than once"),
        ("a:1,b:1;c:1,d:1", "two layouts have the same number of shards, 2, by which a layout is known"),
        ("a:1;b:1,c:1;d:1", "two layouts have the same number of shards, 1"),
    ],
)
def test_what_is_wrong_with_layouts_is_told(wrong: Any, told: str) -> None:
    with pytest.raises(ValidationError) as caught:
        LAYOUTS.validate_python(wrong)
    assert told in str(caught.value)
