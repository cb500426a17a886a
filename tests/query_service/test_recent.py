"""Embeddings held in the process: what is read is what was added, the least recently used goes first."""

import hashlib

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from query_service.recent import RecentEmbeddings

DIM = 3


def digest(number: int) -> bytes:
    return hashlib.blake2b(number.to_bytes(8, "little"), digest_size=32).digest()


def embeddings(numbers: list[int]) -> NDArray[np.float32]:
    return np.array([[number, number + 0.5, -number] for number in numbers], dtype=np.float32).reshape(-1, DIM)


def added(recent: RecentEmbeddings, *numbers: int) -> None:
    recent.add([digest(number) for number in numbers], embeddings(list(numbers)))


def held(recent: RecentEmbeddings, *numbers: int) -> list[int]:
    """Which are found, each as it was added."""
    read, missing = recent.read([digest(number) for number in numbers])
    places = [position for position in range(len(numbers)) if position not in missing]
    assert read.shape == (len(numbers), DIM)
    assert np.array_equal(read[places], embeddings(list(numbers))[places])
    return [numbers[position] for position in places]


def test_the_least_recently_used_goes_first() -> None:
    recent = RecentEmbeddings(3, DIM)
    added(recent, 1, 2, 3)
    assert held(recent, 1) == [1]
    added(recent, 4)
    assert held(recent, 1, 2, 3, 4) == [1, 3, 4]
    added(recent, 5, 6)
    assert held(recent, 1, 2, 3, 4, 5, 6) == [4, 5, 6]


def test_of_more_than_there_is_room_for_the_last_stay() -> None:
    recent = RecentEmbeddings(2, DIM)
    added(recent, 1, 2, 3, 4, 5)
    assert held(recent, 1, 2, 3, 4, 5) == [4, 5]
    nothing = RecentEmbeddings(0, DIM)
    added(nothing, 1, 2)
    assert held(nothing, 1, 2) == []


@given(st.integers(1, 6), st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 9), unique=True)), max_size=30))
@settings(max_examples=200, deadline=None)
def test_it_holds_what_a_list_in_order_of_use_would(num_entries: int, steps: list[tuple[bool, list[int]]]) -> None:
    recent, expected = RecentEmbeddings(num_entries, DIM), list[int]()
    for is_added, numbers in steps:
        if is_added:
            added(recent, *numbers)
            for number in numbers[-num_entries:]:
                expected = [*(other for other in expected if other != number), number][-num_entries:]
        else:
            assert held(recent, *numbers) == [number for number in numbers if number in expected]
            used = [number for number in numbers if number in expected]
            expected = [*(number for number in expected if number not in used), *used]
    assert len(recent) == len(expected)
    assert held(recent, *range(10)) == sorted(expected)
