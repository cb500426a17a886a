"""The benchmark of peers, on a small collection, and its callers."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from rich.console import Console

from benchmarks.serving import peers
from benchmarks.serving.peer_servers import index_server
from benchmarks.serving.peer_servers.callers import Callers
from benchmarks.serving.peer_servers.side import Band, K, SideError
from benchmarks.serving.peers import PEERS, Length, measure, shown

QUERIES = np.eye(4, dtype=np.float32)


class Threaded:
    """A library that waits: finds as many items as it was prepared for, those from the query's own row on."""

    def prepare(self, effort: int) -> None:
        self.effort = effort

    def search(self, vectors: NDArray[np.float32]) -> Sequence[Sequence[Any]]:
        return [range(row, row + self.effort) for row in vectors.argmax(axis=1).tolist()]

    def row(self, item: int) -> int:
        return item


class Awaited(Threaded):
    """A library with coroutines."""

    effort = K

    async def search(self, vectors: NDArray[np.float32]) -> Sequence[Sequence[Any]]:  # type: ignore[override]
        await asyncio.sleep(0)  # As for an answer.
        return super().search(vectors)


class Failing(Threaded):
    def search(self, vectors: NDArray[np.float32]) -> Sequence[Sequence[Any]]:
        raise OSError("nobody listens")


@pytest.fixture(scope="module")
def callers() -> Iterator[Callers]:
    with Callers() as running:
        yield running


@pytest.mark.parametrize("make", [Threaded, Awaited])
def test_callers_count_calls_that_are_answered_in_full(callers: Callers, make: Callable[[], Any]) -> None:
    callers.connect("side", make, QUERIES)
    callers.prepare("side", K)
    assert callers.rows("side")[:, 0].tolist() == [0, 1, 2, 3]
    callers.begin("side", 3, 2)
    callers.rows("side")  # By then they have called.
    measured = callers.end()
    assert measured.seconds > 0
    assert len(measured.latencies_s) >= 3
    assert measured.num_failed == 0


def test_callers_count_short_answers_as_failed(callers: Callers) -> None:
    callers.connect("side", Threaded, QUERIES)
    callers.prepare("side", K - 1)
    assert callers.rows("side")[:, -1].tolist() == [-1, -1, -1, -1]
    callers.begin("side", 1, 1)
    measured = callers.end()
    assert not measured.latencies_s
    assert measured.num_failed >= 1
    assert measured.first_error == f"SideError: {K - 1} items instead of {K}"


def test_callers_tell_what_a_library_raises(callers: Callers) -> None:
    callers.connect("side", Failing, QUERIES)
    with pytest.raises(SideError, match="OSError: nobody listens"):
        callers.rows("side")
    callers.begin("side", 1, 1)
    assert callers.end().first_error == "OSError: nobody listens"


def test_the_benchmark_of_peers_measures_whichever_are_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An index for so few items, and few queries to tune it with.
    monkeypatch.setitem(index_server._INDEX_TYPES, 0.95, "IVF30,SQ8")
    monkeypatch.setattr(peers, "_NUM_QUERIES", 200)
    length = Length(num_items=2000, bands=[Band(low=0.95, high=1.0)], rounds=1, burst_s=0.1)
    figures = measure(length, list(PEERS), tmp_path, Console(quiet=True))
    [band] = figures["bands"]
    ours = band["sides"]["twotower"]
    assert ours["recall"] >= 0.9
    assert ours["replace_failed"] == 0
    assert ours["replace_calls"] > 0
    assert len(band["sides"]) == 1 + len(PEERS)
    for name, row in band["sides"].items():
        assert ("No module named" in row["problem"]) if "problem" in row else name in band["calls"][0]["sides"]
    for calls in band["calls"]:
        best = calls["best_peer"]
        assert calls["sides"]["twotower"]["ratio"] == 1
        assert calls["reached"] == (best is not None and calls["sides"][best]["ratio"] >= calls["target"])
    sides, calls_table = shown(figures)
    assert sides.row_count == len(band["sides"])
    assert calls_table.row_count == len(band["calls"]) * len(band["calls"][0]["sides"])
