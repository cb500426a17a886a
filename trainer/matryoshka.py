"""Embeddings whose first dimensions are embeddings too, as Russian dolls stand in each other.

Deliberately does not know losses, nor what ranks the items. Kusupati et al. 2022, "Matryoshka representation learning".
"""

from collections.abc import Sequence

from torch import Tensor

from trainer.comparison import TOWERS
from trainer.evaluate import ScoreRows, embedding_scores
from trainer.model import normalised


def prefix(embeddings: Tensor, width: int) -> Tensor:
    """The first dimensions of unit embeddings `[…, D]`, at unit length again; all D are the embeddings as they are."""
    return embeddings if width == embeddings.shape[-1] else normalised(embeddings[..., :width])


def tower_scores(queries: Tensor, items: Tensor, widths: Sequence[int]) -> dict[str, ScoreRows]:
    """Scores by the whole embeddings, and by the first dimensions alone.

    Args:
        queries: `[Q, D]` unit embeddings.
        items: `[I, D]` unit embeddings of all items.
        widths: As `TrainerConfig.widths` gives them; the last is D.

    Returns:
        `two_towers`, and `two_towers_first_<width>` for each smaller width.
    """
    return {
        TOWERS if width == widths[-1] else f"{TOWERS}_first_{width}": embedding_scores(
            prefix(queries, width), prefix(items, width)
        )
        for width in reversed(widths)
    }
