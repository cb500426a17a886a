"""How much memory a build or a load will take, and how much there is; and how what is freed goes back to the system.

Deliberately does not know what an index holds beyond its size, nor who else will ask for memory in the next second.
"""

import ctypes
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pyarrow as pa

from towers.errors import TooLittleMemoryError

_MIB = 2**20
_M_MMAP_THRESHOLD = -3
_BUILDER_BYTES = 300 * _MIB
"""Of a build process that has imported everything and not begun."""
_LOAD_SLACK_BYTES = 32 * _MIB
_TABLES_IN_A_BUILD = 3
"""The catalogue as read, merged and partitioned."""
_VECTORS_IN_A_BUILD = 3
"""In the order of the catalogue, in that of the index, and what training draws from them."""
_INDEXES_IN_A_BUILD = 2
"""The one in memory and the one that is written."""
_TOWER_COPIES = 3
"""The file, the graph as parsed, and the session's own copy of the weights."""
_VOCABULARY_GROWTH = 16
"""From JSON to a dictionary of strings."""
_CATALOGUE_GROWTH = 6
"""From Parquet files to a table in memory."""
_ID_BYTES = 8
_FLOAT_BYTES = 4
_HNSW_LINK_BYTES = 4
_DEFAULT_LISTS_PER_ROOT = 4


@dataclass(frozen=True)
class CgroupMemory:
    """One level of the control groups that this process is in, v1 or v2: the contents of its files."""

    limit: str
    """`memory.max` or `memory.limit_in_bytes`."""
    usage: str
    """`memory.current` or `memory.usage_in_bytes`."""
    stat: str
    """`memory.stat`."""


def cgroup_folders(self_cgroup: str) -> list[str]:
    """Folders below `/sys/fs/cgroup` that may limit this process's memory, innermost first, from `/proc/self/cgroup`.

    A container may see its group as the root or under the name that it has outside, so each level is named and those
    that are not there are for the reader to skip.
    """
    folders: list[str] = []
    for line in self_cgroup.splitlines():
        _, _, named = line.partition(":")
        controllers, separator, path = named.partition(":")
        if not separator or (controllers and "memory" not in controllers.split(",")):
            continue
        mounts = (PurePosixPath("memory"),) if controllers else (PurePosixPath(), PurePosixPath("unified"))
        inner = PurePosixPath(path.lstrip("/"))
        folders += [str(mount / level) for mount in mounts for level in (inner, *inner.parents)]
    return list(dict.fromkeys(folders))


def available_bytes(meminfo: str, groups: Sequence[CgroupMemory]) -> int | None:
    """What can still be allocated: the least that the machine or any control group leaves; None when nothing says.

    Args:
        meminfo: `/proc/meminfo`.
        groups: The levels of control groups that limit this process.
    """
    left = [room for group in groups if (room := _room(group)) is not None]
    if match := re.search(r"^MemAvailable:\s+(\d+) kB$", meminfo, re.MULTILINE):
        left.append(int(match.group(1)) * 1024)
    return min(left, default=None)


def memory_available(root: Path = Path("/")) -> int | None:
    """`available_bytes` of this process now; None where the system does not say, as on macOS.

    Args:
        root: Where `proc` and `sys` are.
    """
    groups = [
        group
        for folder in cgroup_folders(_text(root / "proc/self/cgroup"))
        if (group := _group(root / "sys/fs/cgroup" / folder)) is not None
    ]
    return available_bytes(_text(root / "proc/meminfo"), groups)


def index_bytes(index_type: str, num_items: int, dim: int) -> int:
    """Size of a FAISS index, a little more rather than less.

    Args:
        index_type: Factory string, for example "IVF1024,SQ8". An encoding that is not known counts as plain floats.
        num_items: N.
        dim: D.
    """
    item_bytes = _item_bytes(index_type, dim)
    lists = 0
    if match := re.search(r"\bIVF(\d*)", index_type):
        item_bytes += _ID_BYTES
        lists = int(match.group(1) or 0) or int(_DEFAULT_LISTS_PER_ROOT * num_items**0.5)
    if match := re.search(r"\bHNSW(\d*)", index_type):
        item_bytes += int(match.group(1) or 32) * 3 * _HNSW_LINK_BYTES  # Twice M links below, M over the levels above.
    return int(num_items * item_bytes + lists * dim * _FLOAT_BYTES)


def tower_bytes(onnx_bytes: int, vocabulary_bytes: int) -> int:
    """What a tower takes while it is loaded, given the sizes of its files."""
    return _TOWER_COPIES * onnx_bytes + _VOCABULARY_GROWTH * vocabulary_bytes


def load_bytes(stored_bytes: int, tower_bytes: int) -> int:
    """What a load takes while it runs and after.

    Args:
        stored_bytes: All files of the index together. They are read chunk by chunk into the place where they stay.
        tower_bytes: What the item tower takes.
    """
    return stored_bytes + stored_bytes // 8 + tower_bytes + _LOAD_SLACK_BYTES


def build_bytes(
    num_items: int, dim: int, index_type: str, catalogue_bytes: int, num_shards: int, tower_bytes: int
) -> int:
    """What a build process takes at its peak.

    Args:
        num_items: Items of all shards.
        dim: D.
        index_type: FAISS factory string of the largest index that is built.
        catalogue_bytes: Size of the catalogue's files, all shards.
        num_shards: Number of shards.
        tower_bytes: What the item tower takes.
    """
    own = -(-num_items // num_shards)
    return (
        _BUILDER_BYTES
        + tower_bytes
        + _TABLES_IN_A_BUILD * _CATALOGUE_GROWTH * catalogue_bytes
        + _VECTORS_IN_A_BUILD * own * dim * _FLOAT_BYTES
        + _INDEXES_IN_A_BUILD * index_bytes(index_type, own, dim)
    )


def refuse_beyond(needed: int, available: int | None, what: str) -> None:
    """Refuses what does not fit.

    Args:
        needed: Bytes that it will take.
        available: Bytes that there are; None when that is not known: nothing is refused then.
        what: What is to be done, for the message.

    Raises:
        TooLittleMemoryError: it does not fit; the message names both figures and the fix.
    """
    if available is not None and needed > available:
        raise TooLittleMemoryError(
            f"{what} needs about {_shown(needed)} of memory and {_shown(available)} are available; "
            "give the shard more memory, or spread the catalogue over more shards: twotower stage --num-shards"
        )


def return_freed_memory() -> None:
    """Makes large blocks go back to the system when they are freed. Call it before any is allocated.

    Otherwise the C library learns from the chunks that a load frees to keep such blocks for later, and Arrow keeps its
    own, until a shard that has swapped a few times holds a version's worth of memory that nobody uses.
    """
    pa.set_memory_pool(pa.system_memory_pool())
    with suppress(AttributeError):  # Not every C library has it.
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _MIB)


def trim() -> None:
    """Hands the free pages that the allocator keeps back to the system. Blocks without the interpreter lock."""
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _item_bytes(index_type: str, dim: int) -> float:
    if "SQ8" in index_type:
        return dim
    if "SQfp16" in index_type:
        return 2 * dim
    if match := re.search(r"PQ(\d+)(?:x(\d+))?", index_type):
        return int(match.group(1)) * int(match.group(2) or 8) / 8
    return _FLOAT_BYTES * dim


def _room(group: CgroupMemory) -> int | None:
    """What a control group leaves; None when it sets no limit. Its page cache gives way, so that does not count."""
    if not (group.limit.strip().isdigit() and group.usage.strip().isdigit()):
        return None  # v2 writes `max`.
    cached = 0
    for name in ("inactive_file", "active_file"):
        # v1 counts the group alone under this name, and with all groups below it under `total_`.
        match = re.search(rf"^total_{name} (\d+)$", group.stat, re.MULTILINE) or re.search(
            rf"^{name} (\d+)$", group.stat, re.MULTILINE
        )
        cached += int(match.group(1)) if match else 0
    return max(0, int(group.limit) - max(0, int(group.usage) - cached))


def _group(folder: Path) -> CgroupMemory | None:
    for limit, usage in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        if (folder / limit).is_file():
            return CgroupMemory(_text(folder / limit), _text(folder / usage), _text(folder / "memory.stat"))
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _shown(size_bytes: int) -> str:
    return f"{size_bytes / _MIB:,.0f} MiB"
