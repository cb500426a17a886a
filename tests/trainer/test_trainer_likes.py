import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.likes import Likes

NUM_USERS, NUM_ITEMS = 5, 7


@given(
    interactions=st.lists(st.tuples(st.integers(0, NUM_USERS - 1), st.integers(0, NUM_ITEMS - 1)), max_size=30),
    users=st.lists(st.integers(0, NUM_USERS - 1), max_size=6),
    ids=st.lists(st.integers(0, NUM_ITEMS - 1), max_size=9),
)
def test_who_likes_which_candidate(interactions: list[tuple[int, int]], users: list[int], ids: list[int]) -> None:
    """Repeated interactions, users without any, the same user or item several times, nothing at all."""
    pairs = torch.tensor(interactions, dtype=torch.int64).reshape(-1, 2)
    likes = Likes.of(pairs[:, 0], pairs[:, 1], NUM_USERS, NUM_ITEMS)
    found = likes.among(torch.tensor(users, dtype=torch.int64), torch.tensor(ids, dtype=torch.int64))
    assert found.tolist() == [[(user, item) in interactions for item in ids] for user in users]


@given(
    interactions=st.lists(st.tuples(st.integers(0, NUM_USERS - 1), st.integers(0, NUM_ITEMS - 1)), max_size=30),
    candidates=st.lists(
        st.tuples(st.integers(0, NUM_USERS - 1), st.lists(st.integers(-1, NUM_ITEMS - 1), min_size=3, max_size=3)),
        max_size=6,
    ),
)
def test_who_likes_which_candidate_of_its_own(
    interactions: list[tuple[int, int]], candidates: list[tuple[int, list[int]]]
) -> None:
    pairs = torch.tensor(interactions, dtype=torch.int64).reshape(-1, 2)
    likes = Likes.of(pairs[:, 0], pairs[:, 1], NUM_USERS, NUM_ITEMS)
    users = torch.tensor([user for user, _ in candidates], dtype=torch.int64)
    found = likes.each(users, torch.tensor([ids for _, ids in candidates], dtype=torch.int64).reshape(-1, 3))
    assert found.tolist() == [[(user, item) in interactions for item in ids] for user, ids in candidates]
