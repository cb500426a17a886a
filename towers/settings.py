"""What the settings of all processes share: the prefix, addresses, and errors in words.

Deliberately does not know which settings there are, nor what they are for.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, ValidationError
from pydantic_settings import NoDecode

from towers.errors import InvalidInputError

PREFIX = "TWOTOWER_"
"""Of the environment variables."""
Layout = tuple[tuple[str, ...], ...]
"""The addresses of each shard's replicas, by shard."""
_HOST_AND_PORT = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[^\s:/,\[\]]+):(?P<port>\d{1,5})")


def invalid_settings(error: ValidationError, instead: Mapping[str, str] | None = None) -> InvalidInputError:
    """All that is wrong with settings, in one line that names each variable.

    Args:
        error: What pydantic found.
        instead: Setting name to the words that say better what is wanted there.
    """
    return InvalidInputError("; ".join(dict.fromkeys(_in_words(detail, instead or {}) for detail in error.errors())))


def _in_words(detail: Any, instead: Mapping[str, str]) -> str:
    name = str(detail["loc"][0]) if detail["loc"] else ""
    if name in instead:
        return instead[name]
    # An alias, such as REDIS_URL, is the variable itself.
    variable = name if name.upper() == name else PREFIX + name.upper()
    if detail["type"] == "missing":
        return f"{variable} is not set"
    if detail["type"] == "extra_forbidden":
        return f"there is no setting {name!r}"
    return f"{variable}: {str(detail['msg']).removeprefix('Value error, ')}"


def _split(addresses: Any) -> Any:
    return tuple(part.strip() for part in addresses.split(",")) if isinstance(addresses, str) else addresses


def _address(address: str) -> str:
    match = _HOST_AND_PORT.fullmatch(address)
    is_port = match is not None and int(match["port"]) <= 65_535
    if not is_port and not (address.startswith("unix:") and len(address) > len("unix:")):
        raise ValueError(f"{address!r} is not host:port")
    return address


def _split_layouts(layouts: Any) -> Any:
    if not isinstance(layouts, str):
        return layouts
    return tuple(
        tuple(tuple(address.strip() for address in shard.split("|")) for shard in layout.split(","))
        for layout in layouts.split(";")
    )


def _addresses(addresses: tuple[str, ...]) -> tuple[str, ...]:
    if not addresses or addresses == ("",):
        raise ValueError("give at least one address, for example 127.0.0.1:50061,127.0.0.1:50062")
    for address in addresses:
        _address(address)
    if repeated := sorted({address for address in addresses if addresses.count(address) > 1}):
        raise ValueError(f"{', '.join(repeated)} is named more than once; each process has an address of its own")
    return addresses


def _layouts(layouts: tuple[Layout, ...]) -> tuple[Layout, ...]:
    _addresses(tuple(address for layout in layouts for shard in layout for address in shard))
    sizes = sorted(len(layout) for layout in layouts)
    if 0 in sizes or not all(shard for layout in layouts for shard in layout):
        raise ValueError("every shard has at least one address: | is between replicas, `,` between shards")
    if repeated := [size for size, following in itertools.pairwise(sizes) if size == following]:
        raise ValueError(
            f"two layouts have the same number of shards, {repeated[0]}, by which a layout is known; "
            "replicas of a shard stand in one layout, with | between them"
        )
    return layouts


def layouts_text(layouts: Sequence[Layout]) -> str:
    """Layouts as the setting has them."""
    return ";".join(",".join("|".join(addresses) for addresses in layout) for layout in layouts)


Address = Annotated[str, AfterValidator(_address)]
"""`host:port`, or `unix:/path`."""
Addresses = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split), AfterValidator(_addresses)]
"""`host:port,host:port`."""
Layouts = Annotated[tuple[Layout, ...], NoDecode, BeforeValidator(_split_layouts), AfterValidator(_layouts)]
"""`a:1|a:2,b:1;c:1,d:1,e:1`: `,` between shards, `|` between the replicas of one, `;` between layouts.

The position of a shard is its number; a layout is known by its number of shards. The first layout answers unless the
deployment record names another.
"""
