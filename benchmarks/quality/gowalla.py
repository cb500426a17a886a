"""Places on Gowalla, beside the published table: `python -m benchmarks.quality.gowalla`.

The protocol of LightGCN: 29,858 users, all places that are not in their training interactions, embeddings of 64.
Settings were chosen with `--validate`, which asks for a tenth of the training interactions and does not look at the
test ones; how far those are from a random sample is printed. Beside the towers: ALS and BPR of `implicit` on the same
split. Deliberately does not know how towers are trained.
"""

import importlib.util
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from rich.console import Console

from benchmarks.quality import runs
from benchmarks.quality.runs import Rows
from trainer.comparison import TOWERS
from trainer.evaluate import ScoreRows, evaluate
from trainer.questions import ItemLists

METRICS = ("recall_at_20", "ndcg_at_20")
PUBLISHED = {
    "MF-BPR (published)": (0.1627, 0.1378),
    "YoutubeDNN, two towers (published)": (0.1754, 0.1473),
    "LightGCN (published)": (0.1830, 0.1554),
    "SimpleX (published)": (0.1872, 0.1557),
    "BSPM-EM (published)": (0.1920, 0.1597),
    "NESCL (published)": (0.1917, 0.1617),
}
_QUICK = {"training": {"epochs": 2}}
_HELD_OUT = 0.1
_MOST_VISITED = 0.1
"""Share of the items whose part in the test interactions is looked at."""
_BPR_FACTORS = 64
_BPR_ITERATIONS = 200


def write_tables(gowalla: Path, folder: Path, validate: bool) -> None:
    """The tables as a configuration reads them.

    Args:
        gowalla: Folder of the split.
        folder: Gets the files.
        validate: Whether to ask for a tenth of each user's training interactions, one at least, and leave the test
            ones out. A tenth of all would ask few users for little, who count as much as others in the test.
    """
    train = pq.read_table(gowalla / "train.parquet")
    if validate:
        users = train["user"].to_numpy()
        order = np.lexsort((np.random.default_rng(0).random(len(train)), users))
        starts = np.searchsorted(users[order], users[order])
        place = np.empty(len(train), dtype=np.int64)
        place[order] = np.arange(len(train)) - starts
        num_held_out = np.maximum(1, np.rint(_HELD_OUT * np.bincount(users)))
        split = np.where(place < num_held_out[users], "test", "train")
        rows = train
    else:
        test = pq.read_table(gowalla / "test.parquet")
        split = np.repeat(["train", "test"], [len(train), len(test)])
        rows = pa.concat_tables([train, test])
    table = pa.table(
        {
            "user_id": rows["user"],
            "item_id": rows["item"],
            "timestamp": np.zeros(len(rows), dtype=np.int64),
            "split": split,
        }
    )
    pq.write_table(table, folder / "interactions.parquet")
    pq.write_table(pa.table({"item_id": np.unique(train["item"].to_numpy())}), folder / "items.parquet")


def drift(train: NDArray[np.int64], test: NDArray[np.int64]) -> str:
    """How far a split is from a random one, which holds n interactions of an item n p times, give or take n p (1 - p).

    Args:
        train: Item of each training interaction.
        test: Item of each test interaction.
    """
    num_items = max(train.max(), test.max()) + 1
    in_test = np.bincount(test, minlength=num_items)
    counts = np.bincount(train, minlength=num_items) + in_test  # [I]
    share = in_test.sum() / counts.sum()
    is_popular = counts >= np.quantile(counts, 1 - _MOST_VISITED)
    found, of = in_test[is_popular], counts[is_popular]
    spread = (found - of * share) ** 2 / (of * share * (1 - share))
    of_popular = found.sum() / of.sum()
    return (
        f"of all interactions {share:.1%} are test ones, of the most visited tenth of the places {of_popular:.1%}; "
        f"from place to place that differs {spread.mean():.1f} times as much as by chance (variance)"
    )


def bpr(folder: Path, seed: int) -> list[float]:
    """Figures of matrix factorisation by pairs (Rendle et al. 2009), by the package `implicit`.

    Args:
        folder: Of the tables.
        seed: Of its factors.
    """
    from implicit.bpr import BayesianPersonalizedRanking
    from scipy.sparse import csr_matrix

    table = pq.read_table(folder / "interactions.parquet")
    users, items = (np.unique(table[name].to_numpy(), return_inverse=True)[1] for name in ("user_id", "item_id"))
    is_train = table["split"].to_numpy(zero_copy_only=False) == "train"
    ones = np.ones(int(is_train.sum()), dtype=np.float32)
    liked = csr_matrix((ones, (users[is_train], items[is_train])), shape=(users.max() + 1, items.max() + 1))
    # With a bias each, one of the factors is ones.
    model = BayesianPersonalizedRanking(
        factors=_BPR_FACTORS - 1,
        iterations=_BPR_ITERATIONS,
        random_state=seed,
        use_gpu=False,
        verify_negative_samples=True,
    )
    model.fit(liked, show_progress=False)
    asking = np.unique(users[~is_train])
    user_factors = torch.from_numpy(np.asarray(model.user_factors)[asking])
    item_factors = torch.from_numpy(np.asarray(model.item_factors))
    scores: ScoreRows = lambda start, stop: user_factors[start:stop] @ item_factors.T  # noqa: E731
    figures = evaluate(scores, _lists(users, items, ~is_train, asking), _lists(users, items, is_train, asking), [20])
    return [figures[metric] for metric in METRICS]


def _lists(
    users: NDArray[np.int64], items: NDArray[np.int64], chosen: NDArray[np.bool_], asking: NDArray[np.int64]
) -> ItemLists:
    """The chosen items of each user that is asking, sorted."""
    order = np.lexsort((items[chosen], users[chosen]))
    of, sorted_items = users[chosen][order], items[chosen][order]
    return ItemLists(sorted_items, np.searchsorted(of, asking), np.searchsorted(of, asking, side="right"))


def main() -> None:
    """Trains, and prints the table."""
    parser = runs.command_line(__doc__, "two epochs, one seed")
    parser.add_argument(
        "--validate", action="store_true", help="ask for a tenth of each user's training interactions instead"
    )
    arguments = parser.parse_args()
    console = Console()
    name = "gowalla-validation" if arguments.validate else "gowalla"
    data = arguments.runs / f"{name}-data"
    data.mkdir(parents=True, exist_ok=True)
    gowalla = runs.folder_of("gowalla")
    write_tables(gowalla, data, arguments.validate)
    train, test = (pq.read_table(gowalla / f"{part}.parquet")["item"].to_numpy() for part in ("train", "test"))
    console.print(drift(train, test), highlight=False)
    settings = runs.read_settings(Path(__file__).with_suffix(".toml"))
    if arguments.quick:
        settings = runs.changed(settings, _QUICK)
    found = [
        runs.trained(
            runs.changed(settings, {"training": {"seed": seed}}), arguments.runs / name / str(seed), data, console
        )
        for seed in range(1 if arguments.quick else arguments.seeds)
    ]
    rows: Rows = {model: runs.of_seeds(found[:1], model, METRICS) for model in found[0].figures if model != TOWERS}
    if importlib.util.find_spec("implicit") is not None:
        rows["bpr"] = [[figure] for figure in bpr(data, 0)]
    part = "a tenth of each user's training interactions" if arguments.validate else "test"
    published = {} if arguments.validate else PUBLISHED
    rows |= {**published, "two towers": runs.of_seeds(found, TOWERS, METRICS)}
    console.print(runs.shown(f"Gowalla, 64 dimensions; {part}", METRICS, rows))
    if arguments.json:
        runs.write(arguments.json, {"two towers": found})


if __name__ == "__main__":
    main()
