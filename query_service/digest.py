"""Digests of encoded queries: the same digest, the same embedding.

Deliberately does not know what is stored under a digest.
"""

import hashlib
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from towers.features import Arrays

DIGEST_BYTES = 32


def digests_of(arrays: Arrays, fingerprint: bytes) -> list[bytes]:
    """BLAKE2b digests of encoded rows, keyed by the fingerprint of the tower that embeds them.

    Padding does not count: a row has the same digest in every batch. Equal digests mean equal embeddings.

    Args:
        arrays: Encoded features of B rows, in the order of the schema.
        fingerprint: At most 64 bytes.

    Returns:
        B digests.
    """
    columns = [_column(name, array) for name, array in arrays.items()]
    return [
        hashlib.blake2b(b"".join(row), digest_size=DIGEST_BYTES, key=fingerprint).digest()
        for row in zip(*columns, strict=True)
    ]


def _column(name: str, array: NDArray[Any]) -> list[bytes]:
    """What B rows hold of one feature, each with its name, type and length before it."""
    header = _header(name, array.dtype)
    content, num_rows = array.tobytes(), len(array)
    row_bytes = len(content) // num_rows
    rows = [content[start : start + row_bytes] for start in range(0, len(content), row_bytes)]
    if array.ndim == 2 and array.dtype.kind == "i":
        # Padding; the high bytes of the last id too, which tell it from no other id.
        rows = [row.rstrip(b"\0") for row in rows]
    return [header + _prefixed(row) for row in rows]


@lru_cache
def _header(name: str, dtype: np.dtype[Any]) -> bytes:
    return _prefixed(name.encode()) + _prefixed(dtype.str.encode())


def _prefixed(content: bytes) -> bytes:
    return len(content).to_bytes(8, "little") + content
