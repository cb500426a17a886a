"""The benchmarks of the choice run, on a catalogue that takes seconds."""

import io
from functools import partial

import numpy as np
from rich.console import Console

from benchmarks.index import libraries, tuning
from benchmarks.index.vectors import clustered


def test_the_choice_is_compared_with_a_sweep(monkeypatch):
    for name, value in {"_NUM_SWEPT": 100, "_ROUNDS": 1}.items():
        monkeypatch.setattr(tuning, name, value)
    items, queries = clustered(800, 16, 300)
    console = Console(file=io.StringIO(), width=160)
    figures = tuning.measure(items, queries[:100], queries[100:], (5, 20), console)
    assert [(row["items"], row["dim"], row["k"]) for row in figures] == [(800, 16, 5), (800, 16, 20)]
    for row in figures:
        # So few items are searched exactly.
        assert (row["index_type"], row["recall"], row["recall_reached"]) == ("Flat", 1.0, True)
        assert row["best_recall"] >= 0.9
        assert row["ratio_reached"] == (row["ratio"] <= 1.2)
    console.print(tuning.shown(figures))
    for words in ("HNSW32: k 5: efSearch=", "SQ8: k 5: nprobe=", "The chosen index beside the fastest"):
        assert words in console.file.getvalue()


def test_sides_are_compared_at_one_recall(monkeypatch):
    for name, value in {"_ROUNDS": 2, "_QUERIES_A_ROUND": 5}.items():
        monkeypatch.setattr(libraries, name, value)

    def numpy_scan(items):
        def at(share):
            some = items[: int(share * len(items))]
            return lambda query: np.argsort(-(some @ query))[: libraries.K]

        return [(f"share={share}", partial(at, share)) for share in (0.5, 0.97, 1.0)]

    def absent(items):
        raise ModuleNotFoundError("no such library")

    monkeypatch.setattr(libraries, "PEERS", {"numpy": numpy_scan, "absent": absent, "short": lambda items: []})
    console = Console(file=io.StringIO(), width=160)
    ours, numpy = libraries.measure(*clustered(600, 16, 50), 0.95, console)
    assert (ours["name"], ours["ratio"], ours["recall"]) == ("twotower", 1.0, 1.0)
    assert (numpy["parameters"], numpy["version"]) in {("share=0.97", np.__version__), ("share=1.0", np.__version__)}
    assert numpy["recall"] >= 0.95
    assert numpy["reached"] == (numpy["ratio"] > 1)
    console.print(libraries.shown([ours, numpy]))
    for words in ("absent is not installed: pip install absent", "short does not reach a recall of 0.95", "in turns"):
        assert words in console.file.getvalue()
