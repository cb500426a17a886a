"""Values that give targets away, by hand."""

import numpy as np
import pytest

from trainer.doctor import leaks


def test_partners_of_the_wanted() -> None:
    found = leaks.partners(np.array([5, 6, 5, 7]), np.array([1, 2, 3, 4]), [5, 8])
    assert found == {5: {1, 3}, 8: set()}


def test_a_value_is_certain_where_others_with_it_go_along_and_chance_would_not_have_it() -> None:
    # Two others of 1,000 have the value; both are among the three others who chose the item: (3 / 999)² is 9e-6.
    assert (3 / 999) ** 2 < leaks.MAX_CHANCE < (3 / 999)
    assert leaks.is_certain({0, 1, 2}, {0, 1, 2, 3}, 1000)
    assert not leaks.is_certain({0, 1}, {0, 1, 2, 3}, 1000)
    # Half of them did not choose it.
    assert not leaks.is_certain({0, 1, 9}, {0, 1, 2, 3}, 1000)
    # All chose the blockbuster.
    assert not leaks.is_certain({0, 1, 2}, set(range(900)), 1000)
    assert not leaks.is_certain({0}, {0}, 1)


def test_one_in_ten_may_differ() -> None:
    holders = set(range(11))
    assert leaks.is_certain(holders, set(range(10)), 1000)
    assert not leaks.is_certain(holders, set(range(9)), 1000)


@pytest.mark.parametrize(("min_others", "share"), [(1, 2 / 4), (2, 2 / 4), (3, 0.0)])
def test_the_share_that_is_given_away(min_others: int, share: float) -> None:
    """Users 0 to 2 are listed as readers of item 7; all others have a country."""
    column = ["reader"] * 3 + ["north", "south"] * 500
    linked = {7: {0, 1, 2}, 8: {3, 400}}
    pairs = [(0, 7), (1, 7), (3, 8), (400, 8)]
    assert leaks.given_away(column, linked, pairs, min_others) == pytest.approx(share)
