"""Nearest neighbours of a few items, by their titles: what a person sees at a glance.

Deliberately does not judge them.
"""

import numpy as np
from numpy.typing import NDArray

from trainer.doctor.lists import top_lists
from trainer.doctor.report import Section, Table
from trainer.doctor.subject import Subject

_EXAMPLES = (1.0, 0.99, 0.9, 0.75, 0.5, 0.25)
"""Quantiles of popularity that examples are taken from."""
_NUM_NEIGHBOURS = 5


def neighbours_section(subject: Subject) -> Section:
    """Of items from the most popular down, and of one that training never saw."""
    names, rows = subject.item_names, examples(subject.item_counts)
    num_shown = min(_NUM_NEIGHBOURS + 1, len(names))
    lists = top_lists(subject.item_embeddings[rows], subject.item_embeddings, num_shown)
    scores = (subject.item_embeddings[rows] @ subject.item_embeddings.T).numpy()
    return Section(
        "Nearest neighbours",
        "The nearest items of the item tower, with their cosines. They should be of a kind. Neighbours that have only "
        "their popularity in common mean too few interactions, or negatives that are too easy.",
        tables=[
            Table(
                "Examples",
                ("item", "training interactions", "nearest items"),
                [
                    (
                        names[row],
                        f"{subject.item_counts[row]:,}",
                        "; ".join(f"{names[item]} ({scores[place, item]:.2f})" for item in nearest if item != row),
                    )
                    for place, (row, nearest) in enumerate(zip(rows.tolist(), lists.tolist(), strict=True))
                ],
            )
        ],
    )


def examples(item_counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows of items at some quantiles of popularity, and the first cold one, each once."""
    rising = np.argsort(item_counts, kind="stable")
    rising = rising[item_counts[rising] > 0]
    rows = [int(rising[round(share * (len(rising) - 1))]) for share in _EXAMPLES]
    rows += np.flatnonzero(item_counts == 0)[:1].tolist()
    return np.array(list(dict.fromkeys(rows)), dtype=np.int64)
