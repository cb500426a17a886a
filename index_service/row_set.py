"""A set of rows of one index: those that may be returned.

Deliberately does not know why the others may not.
"""

from functools import cached_property

import numpy as np
from numpy.typing import NDArray


class RowSet:
    """Rows of an index of N items. Never changes."""

    def __init__(self, mask: NDArray[np.bool_]) -> None:
        """Takes `[N]`: True for the rows in the set; the array must not change afterwards."""
        self.mask = mask

    def __and__(self, other: "RowSet") -> "RowSet":
        return RowSet(self.mask & other.mask)

    @cached_property
    def count(self) -> int:
        """Number of rows in the set."""
        return int(np.count_nonzero(self.mask))

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        """The rows, rising."""
        return np.flatnonzero(self.mask)

    @cached_property
    def bitmap(self) -> NDArray[np.uint8]:
        """One bit a row, row 0 the lowest of byte 0, as FAISS's `IDSelectorBitmap` reads it."""
        return np.packbits(self.mask, bitorder="little")
