"""Embeddings of a batch whose activations would not fit: made in chunks, and once more when their gradients are known.

Deliberately does not know towers or losses. Gao et al. 2021, "Scaling deep contrastive learning batch size under memory
limited setup" (GradCache).
"""

from collections.abc import Callable

import torch
from torch import Tensor

Embed = Callable[[Tensor], Tensor]
"""Embeddings of rows `[R]`; a row may have several."""


class Embedded:
    """Embeddings of rows, whose gradients go back into the tower after the loss's own."""

    def __init__(self, embed: Embed, rows: Tensor, chunk_size: int | None) -> None:
        """Embeds.

        Args:
            embed: The tower.
            rows: `[R]`
            chunk_size: Rows whose activations are there at a time. None: all are kept, and nothing is done twice.
        """
        self._embed = embed
        self._chunks = () if chunk_size is None else torch.split(rows, chunk_size)
        self._random_states: list[Tensor] = []
        self._whole = self._in_chunks() if self._chunks else embed(rows)
        self.embeddings = self._whole.detach().requires_grad_()
        """`[B, D]` a leaf, which gathers the gradients of all that is made of it."""

    def backward(self) -> None:
        """Takes the gradients that the embeddings have by now into the tower, chunk by chunk."""
        gradients, first = self.embeddings.grad, 0
        assert gradients is not None
        if not self._chunks:
            self._whole.backward(gradients)  # type: ignore[no-untyped-call]
            return
        random_state = torch.get_rng_state()
        for chunk, state in zip(self._chunks, self._random_states, strict=True):
            # Dropout drops what it dropped before.
            torch.set_rng_state(state)
            embeddings = self._embed(chunk)
            embeddings.backward(gradients[first : first + len(embeddings)])  # type: ignore[no-untyped-call]
            first += len(embeddings)
        torch.set_rng_state(random_state)

    def _in_chunks(self) -> Tensor:
        parts = []
        with torch.no_grad():
            for chunk in self._chunks:
                self._random_states.append(torch.get_rng_state())
                parts.append(self._embed(chunk))
        return torch.cat(parts)
