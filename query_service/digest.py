"""Digests of encoded queries: the same digest, the same embedding.

Deliberately does not know what is stored under a digest.
"""

import hashlib
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
    columns = []
    for name, array in arrays.items():
        header = b"".join(_prefixed(text.encode()) for text in (name, array.dtype.str))
        columns.append((header, array, _lengths(array)))
    digests = []
    for row in range(len(columns[0][1])):
        digest = hashlib.blake2b(digest_size=DIGEST_BYTES, key=fingerprint)
        for header, array, lengths in columns:
            values = array[row] if lengths is None else array[row, : lengths[row]]
            digest.update(header + _prefixed(values.tobytes()))
        digests.append(digest.digest())
    return digests


def _prefixed(content: bytes) -> bytes:
    return len(content).to_bytes(8, "little") + content


def _lengths(array: NDArray[Any]) -> NDArray[np.intp] | None:
    """`[B]` lengths of padded id lists; None for arrays of another kind."""
    if array.ndim != 2 or array.dtype.kind != "i":
        return None
    is_id = array != 0
    lengths: NDArray[np.intp] = np.where(is_id.any(axis=1), array.shape[1] - is_id[:, ::-1].argmax(axis=1), 0)
    return lengths
