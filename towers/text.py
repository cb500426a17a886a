"""Text as the tokens of a pretrained encoder, by the encoder's own tokenizer file.

Deliberately does not know the encoder, nor any training framework: services tokenise with it.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from towers.errors import InvalidFeatureError

_TOKENS_AT_ONCE = 4096
"""Of one pass through an encoder: enough to keep a processor busy, in some 100 MB of activations."""


class TextTokenizer:
    """Texts to token ids, each one higher than the encoder's own, so that 0 is padding whatever the encoder says."""

    def __init__(self, content: str, max_length: int) -> None:
        """Reads a tokenizer.

        Args:
            content: Of the encoder's `tokenizer.json`. The padding and the truncation that it asks for are ignored.
            max_length: Tokens of a text that are kept, those that mark its start and end included.

        Raises:
            InvalidFeatureError: the content is no tokenizer.
        """
        try:
            self._tokenizer = Tokenizer.from_str(content)
        except Exception as error:  # The library raises the bare type.
            raise InvalidFeatureError(f"tokenizer.json cannot be read: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_length)

    def ids(self, text: str) -> list[int]:
        """Ids of a text's tokens, from 1; none for an empty text, which is a missing one."""
        return [token + 1 for token in self._encoded(text).ids] if text else []

    def is_truncated(self, text: str) -> bool:
        """Whether a text has more tokens than are kept."""
        return bool(self._encoded(text).overflowing)

    def _encoded(self, text: str) -> Encoding:
        # A lone surrogate is a string to Python and to nobody else.
        return self._tokenizer.encode(text.encode("utf-8", "replace").decode())


def groups_of_similar_length(lengths: NDArray[np.int64]) -> Sequence[NDArray[np.int64]]:
    """Places `[B]` of all rows, in groups that padding costs little and whose activations fit.

    Args:
        lengths: `[B]` tokens of each row.
    """
    order = np.argsort(-lengths, kind="stable")
    groups, first = [], 0
    while first < len(order):
        size = max(1, _TOKENS_AT_ONCE // max(1, int(lengths[order[first]])))
        groups.append(order[first : first + size])
        first += size
    return groups
