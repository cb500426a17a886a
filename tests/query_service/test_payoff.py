"""When lookups are left out, and how they come back."""

from query_service.payoff import Cost, Payoff


def measured(cost: Cost, seconds: float, num_queries: int, times: int = 20) -> None:
    for _ in range(times):
        cost.add(seconds, num_queries)


def wanted(payoff: Payoff, times: int = 1280) -> int:
    return sum(payoff.wants_lookup() for _ in range(times))


def test_a_cost_is_that_of_a_query_and_follows_the_last_batches() -> None:
    cost = Cost()
    assert cost.seconds == 0.0
    cost.add(0.3, 3)
    assert abs(cost.seconds - 0.1) < 1e-12
    measured(cost, 4.0, 2, times=500)
    assert abs(cost.seconds - 2.0) < 1e-6
    mixed = Cost()
    for _ in range(500):
        mixed.add(1.0, 1)
        mixed.add(1.0, 99)
    assert abs(mixed.seconds - 0.02) < 0.002, "by queries, not by batches"


def test_nothing_is_left_out_before_both_costs_are_known() -> None:
    tower = Cost()
    payoff = Payoff(tower, may_leave_out=True)
    measured(payoff.lookup, 1.0, 1, times=100)
    assert not payoff.is_left_out
    measured(tower, 0.1, 1, times=19)
    assert not payoff.is_left_out
    measured(tower, 0.1, 1, times=1)
    assert payoff.is_left_out


def test_a_dear_lookup_is_left_out_and_tried_now_and_then_until_it_is_cheap() -> None:
    tower = Cost()
    payoff = Payoff(tower, may_leave_out=True)
    measured(tower, 0.1, 1)
    measured(payoff.lookup, 0.2, 1)
    assert wanted(payoff) == 10
    measured(payoff.lookup, 0.01, 1)
    assert not payoff.is_left_out
    assert wanted(payoff) == 1280


def test_the_tower_is_tried_where_everything_is_found_until_it_is_known() -> None:
    tower = Cost()
    payoff = Payoff(tower, may_leave_out=True)
    measured(payoff.lookup, 0.01, 1)
    assert wanted(payoff) == 1270
    measured(tower, 0.1, 1)
    assert wanted(payoff) == 1280


def test_a_lookup_that_must_not_be_left_out_never_is() -> None:
    tower = Cost()
    payoff = Payoff(tower, may_leave_out=False)
    assert wanted(payoff) == 1280
    measured(tower, 0.1, 1)
    measured(payoff.lookup, 0.2, 1)
    assert not payoff.is_left_out
    assert wanted(payoff) == 1280


def test_a_lookup_that_finds_little_pays_little() -> None:
    tower = Cost()
    payoff = Payoff(tower, may_leave_out=True)
    measured(tower, 0.1, 1)
    measured(payoff.lookup, 0.02, 1)
    assert not payoff.is_left_out
    payoff.share_found = 0.25
    assert not payoff.is_left_out
    payoff.share_found = 0.15
    assert payoff.is_left_out
