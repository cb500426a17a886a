"""BM25: what text towers have to be better than, with no training at all.

(Robertson and Zaragoza, "The probabilistic relevance framework: BM25 and beyond", 2009.)
Deliberately does not know towers, nor how a ranking is judged.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from towers.schema import FeatureSchema, Owner
from trainer.data import Entities, TrainingData
from trainer.evaluate import ScoreRows

K1 = 0.9
B = 0.4
"""Both as in the baselines of BEIR and Anserini."""


@dataclass(frozen=True)
class Texts:
    """What the text features of either tower read, joined by spaces."""

    users: Sequence[str]
    items: Sequence[str]


def texts_of(tables: TrainingData, schema: FeatureSchema) -> Texts | None:
    """The texts of all users and items; None where not both towers read text."""
    users, items = _joined(tables.users, schema, "query"), _joined(tables.items, schema, "item")
    return Texts(users, items) if users and items else None


def _joined(entities: Entities, schema: FeatureSchema, owner: Owner) -> list[str]:
    columns = [entities.columns[feature.column] for feature in schema.of(owner) if feature.kind == "text"]
    return [" ".join(str(value) for value in row if value is not None) for row in zip(*columns, strict=True)]


def bm25_scores(texts: Texts, users: NDArray[np.int64]) -> ScoreRows:
    """BM25 by the package `bm25s`, with the English stop words and stemmer.

    Args:
        texts: Of all users and items.
        users: `[Q]` the user of each query.
    """
    import bm25s
    from Stemmer import Stemmer

    stemmer = Stemmer("english")
    index = bm25s.BM25(k1=K1, b=B)
    index.index(bm25s.tokenize(texts.items, "en", stemmer=stemmer, show_progress=False), show_progress=False)
    asked = [texts.users[user] for user in users.tolist()]
    tokens = bm25s.tokenize(asked, "en", stemmer=stemmer, return_ids=False, show_progress=False)
    nothing = np.zeros(len(texts.items), dtype=np.float32)

    def score_rows(start: int, stop: int) -> torch.Tensor:
        rows = [index.get_scores(words) if words else nothing for words in tokens[start:stop]]
        return torch.from_numpy(np.stack(rows))

    return score_rows
