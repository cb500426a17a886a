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

    def read(self, digests: Sequence[bytes]) -> tuple[NDArray[np.float32], list[int]]:
        """Looks embeddings up.

        Args:
            digests: B digests.

        Returns:
            `[B, D]`, and the positions of those that are not found, where anything may be.
        """
        rows = [self._rows.get(digest, -1) for digest in digests]
        missing = [position for position, row in enumerate(rows) if row < 0] if -1 in rows else []
        if len(missing) == len(rows):
            return np.empty((len(rows), self._table.shape[1]), dtype=np.float32), missing
        for digest, row in zip(digests, rows, strict=True):
            if row >= 0:
                self._rows.move_to_end(digest)
        return self._table[rows], missing

    def add(self, digests: Sequence[bytes], embeddings: NDArray[np.float32]) -> None:
        """Holds embeddings, in the place of those that have not been used for longest.

        Args:
            digests: B digests, all different; of more than there is room for, the last stay.
            embeddings: `[B, D]`
        """
        if not self._num_entries:
            return
        if len(digests) > self._num_entries:
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
