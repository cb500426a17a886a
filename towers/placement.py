"""Which shard an item belongs to.

Deliberately does not know the catalogue: the query service asks this without loading what reads it.
"""

from towers.features import stable_hash


def shard_of(item_id: str, num_shards: int) -> int:
    """The shard that an item belongs to: xxh3_64 of its id, modulo the number of shards."""
    return stable_hash(item_id) % num_shards
