"""A set of rows of one index: those that may be returned.

Deliberately does not know why the others may not.

Few rows are held as a list, many as a bitmap, whichever is smaller to combine; each form is made from the other only
when it is asked for.
"""

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

_WORD_BITS = 64
_LOWER_BITS: NDArray[np.uint64] = (np.uint64(1) << np.arange(_WORD_BITS, dtype=np.uint64)) - np.uint64(1)
"""For each bit of a word, a mask of those below it."""


class RowSet:
    """Rows of an index of N items. Never changes."""

    FEW = 32
    """Fewer than one row in this many are combined as a list: its 8 bytes a row are then about the bitmap's N / 8."""

    def __init__(self, mask: NDArray[np.bool_]) -> None:
        """Takes `[N]`: True for the rows in the set."""
        self.num_rows = len(mask)
        """N."""
        packed = np.zeros(-(-self.num_rows // _WORD_BITS) * 8, dtype=np.uint8)
        packed[: -(-self.num_rows // 8)] = np.packbits(mask, bitorder="little")
        self.words = packed.view(np.uint64)

    @classmethod
    def of_words(cls, words: NDArray[np.uint64], num_rows: int) -> "RowSet":
        """Takes 64 rows a word, row 0 the lowest bit of word 0, no bit set from row N on; the array must not change."""
        made = cls.__new__(cls)
        made.num_rows = num_rows
        made.words = words
        return made

    @classmethod
    def of_rows(cls, rows: NDArray[np.integer], num_rows: int) -> "RowSet":
        """Takes some of N rows, rising, each once."""
        made = cls.__new__(cls)
        made.num_rows = num_rows
        made.rows = rows.astype(np.int64, copy=False)
        made.count = len(rows)
        return made

    @classmethod
    def everything(cls, num_rows: int) -> "RowSet":
        """All of N rows."""
        words = np.full(-(-num_rows // _WORD_BITS), ~np.uint64(0))
        return cls.of_words(_without_tail(words, num_rows), num_rows)

    def __and__(self, other: "RowSet") -> "RowSet":
        for few, others in ((self, other), (other, self)):
            if few.has_few_rows:
                return RowSet.of_rows(few.rows[others.contains(few.rows)], self.num_rows)
        return RowSet.of_words(self.words & other.words, self.num_rows)

    def __or__(self, other: "RowSet") -> "RowSet":
        if self.has_few_rows and other.has_few_rows:
            return RowSet.of_rows(distinct(np.concatenate((self.rows, other.rows))), self.num_rows)
        return RowSet.of_words(self.words | other.words, self.num_rows)

    def __invert__(self) -> "RowSet":
        return RowSet.of_words(_without_tail(~self.words, self.num_rows), self.num_rows)

    def __sub__(self, other: "RowSet") -> "RowSet":
        if self.has_few_rows:
            return RowSet.of_rows(self.rows[~other.contains(self.rows)], self.num_rows)
        return RowSet.of_words(self.words & ~other.words, self.num_rows)

    @cached_property
    def count(self) -> int:
        """Number of rows in the set."""
        return int(np.bitwise_count(self.words).sum(dtype=np.int64))

    @property
    def has_few_rows(self) -> bool:
        """Whether a list of the rows is the smaller form."""
        return self.count * RowSet.FEW < self.num_rows

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        """The rows, rising."""
        if not self.has_few_rows:
            return np.flatnonzero(self.mask)
        used = np.flatnonzero(self.words)
        places = _places(self.words[used].view(np.uint8))
        rows: NDArray[np.int64] = used[places >> 6] * _WORD_BITS + (places & 63)
        return rows

    @property
    def mask(self) -> NDArray[np.bool_]:
        """`[N]`: True for the rows in the set."""
        bits = np.unpackbits(self.words.view(np.uint8), count=self.num_rows, bitorder="little")
        return bits.view(np.bool_)

    @property
    def bitmap(self) -> NDArray[np.uint8]:
        """One bit a row, row 0 the lowest of byte 0, as FAISS's `IDSelectorBitmap` reads it."""
        return self.words.view(np.uint8)

    @property
    def size_bytes(self) -> int:
        """Memory of the forms that were made so far."""
        return sum(form.nbytes for form in self.__dict__.values() if isinstance(form, np.ndarray))

    def contains(self, rows: NDArray[np.integer]) -> NDArray[np.bool_]:
        """For each of some rows, whether it is in the set."""
        if "words" not in self.__dict__ and len(rows) * RowSet.FEW < self.num_rows:
            places = np.searchsorted(self.rows, rows)
            found: NDArray[np.bool_] = np.append(self.rows, -1)[places] == rows
            return found
        bits: NDArray[np.uint8] = self.bitmap[rows >> 3] >> (rows & 7).astype(np.uint8) & 1
        return bits.view(np.bool_)

    def counts_between(self, bounds: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many rows of the set lie in each of L consecutive ranges.

        Args:
            bounds: `[L + 1]` the first row of each range, and the end of the last.

        Returns:
            `[L]`
        """
        if self.has_few_rows:
            return np.diff(np.searchsorted(self.rows, bounds))
        in_word = np.bitwise_count(self.words)
        before_word = np.zeros(len(in_word) + 1, dtype=np.int64)
        np.cumsum(in_word, out=before_word[1:])
        word = bounds >> 6
        # The end of the last range may be one word too far, of which it then takes no bit.
        within = np.bitwise_count(self.words.take(word, mode="clip") & _LOWER_BITS.take(bounds & 63))
        counts: NDArray[np.int64] = np.diff(before_word.take(word) + within)
        return counts

    def rows_between(self, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows of the set within some ranges, rising; perhaps a few beside them.

        Args:
            starts: `[L]` the first row of each range, rising.
            ends: `[L]` the end of each.
        """
        if self.has_few_rows:
            return self.rows[joined_ranges(np.searchsorted(self.rows, starts), np.searchsorted(self.rows, ends))]
        used = joined_ranges(starts >> 3, ends + 7 >> 3)
        # Two ranges that meet within a byte both have it.
        used = used[np.append(True, used[1:] > used[:-1])] if len(used) else used
        places = _places(self.bitmap[used])
        rows: NDArray[np.int64] = used[places >> 3] * 8 + (places & 7)
        return rows

    @cached_property
    def words(self) -> NDArray[np.uint64]:
        """64 rows a word, row 0 the lowest bit of word 0, no bit set from row N on."""
        mask = np.zeros(self.num_rows, dtype=bool)
        mask[self.rows] = True
        return RowSet(mask).words


def distinct(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rising, each once. `np.unique` counts in a hash table, many times slower for rows that are nearly sorted."""
    rows = np.sort(rows)
    return rows[np.append(True, rows[1:] != rows[:-1])] if len(rows) else rows


def joined_ranges(starts: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """The numbers of some ranges, one range after another."""
    sizes = ends - starts
    return np.repeat(starts - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum())


def _places(content: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Which bits of some bytes are set."""
    # As booleans they are looked through several times faster than as numbers.
    return np.flatnonzero(np.unpackbits(content, bitorder="little").view(np.bool_))


def _without_tail(words: NDArray[np.uint64], num_rows: int) -> NDArray[np.uint64]:
    """The words with no bit set from row N on; changes them in place."""
    if num_rows % _WORD_BITS:
        words[-1] &= np.uint64((1 << num_rows % _WORD_BITS) - 1)
    return words
