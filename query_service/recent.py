"""Recent embeddings of one tower, in this process.

Deliberately does not know where they come from. They never expire: a tower always gives the same under a digest.
"""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class RecentEmbeddings:
    """Those used last, by digest. One row of a table each; `4 D` bytes there and about 200 for its place."""

    def __init__(self, num_entries: int, dim: int) -> None:
        """Nothing is held yet.

        Args:
            num_entries: The most that are held; 0: none.
            dim: D.
        """
        self._num_entries = num_entries
        # The system gives memory to the rows that are written.
        self._table = np.empty((num_entries, dim), dtype=np.float32)
        self._rows: OrderedDict[bytes, int] = OrderedDict()
        """The row of each digest, the one that was used last at the end."""

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._rows

    def read(self, digests: Sequence[bytes], embeddings: NDArray[np.float32]) -> list[int]:
        """Looks embeddings up.

        Args:
            digests: B digests.
            embeddings: `[B, D]`, filled where one is found.

        Returns:
            The positions of those that are not found.
        """
        found, missing, rows = [], [], []
        for position, digest in enumerate(digests):
            row = self._rows.get(digest)
            if row is None:
                missing.append(position)
            else:
                self._rows.move_to_end(digest)
                found.append(position)
                rows.append(row)
        if rows:
            embeddings[found] = self._table[rows]
        return missing

    def add(self, digests: Sequence[bytes], embeddings: NDArray[np.float32]) -> None:
        """Holds embeddings, in the place of those that have not been used for longest.

        Args:
            digests: B digests, all different.
            embeddings: `[B, D]`
        """
        if not self._num_entries:
            return
        # Of more than there is room for, the last stay.
        digests, embeddings = digests[-self._num_entries :], embeddings[-self._num_entries :]
        rows = []
        for digest in digests:
            row = self._rows.pop(digest, None)
            if row is None:
                is_full = len(self._rows) == self._num_entries
                row = self._rows.popitem(last=False)[1] if is_full else len(self._rows)
            self._rows[digest] = row
            rows.append(row)
        self._table[rows] = embeddings
