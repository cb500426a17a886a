"""Which shard an item belongs to.

Deliberately does not know the catalogue: the query service asks this without loading what reads it.
"""

from collections.abc import Sequence

import numpy as np
import xxhash
from numpy.typing import NDArray

from towers.features import stable_hash

_HASHED_AT_ONCE = 2000


def shard_of(item_id: str, num_shards: int) -> int:
    """The shard that an item belongs to: xxh3_64 of its id, modulo the number of shards."""
    return stable_hash(item_id) % num_shards


def hashes_of(item_ids: Sequence[str]) -> NDArray[np.uint64]:
    """`[N]` xxh3_64 of each id."""
    digests = (
        # By parts, as each is one call that holds the interpreter from the searches of a shard.
        b"".join(map(xxhash.xxh3_64_digest, map(str.encode, item_ids[start : start + _HASHED_AT_ONCE])))
        for start in range(0, len(item_ids), _HASHED_AT_ONCE)
    )
    return np.frombuffer(b"".join(digests), dtype=">u8").astype(np.uint64)
