"""The handicap: shorter first, nobody for ever last."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from scheduling.aging import AGING, MIN_AGING, MOST_AGING, aging_factor, handicap

SECONDS = st.floats(0.001, 1000)
FACTORS = st.floats(0, 4)


@given(SECONDS, SECONDS, FACTORS)
def test_more_work_is_a_larger_handicap_and_a_bounded_one(one: float, other: float, aging: float):
    shorter, longer = sorted((one, other))
    assert handicap(shorter, aging) <= handicap(longer, aging)
    assert handicap(longer, aging) <= longer / MIN_AGING


@given(SECONDS, SECONDS, st.floats(0.01, 4), st.floats(0, 1000), st.floats(0, 1000))
def test_the_handicap_orders_as_work_less_aging_times_age_does(
    one: float, other: float, aging: float, since: float, later: float
):
    now = 2000.0
    by_rank = (one - aging * (now - since)) - (other - aging * (now - later))
    by_due = (since + handicap(one, aging)) - (later + handicap(other, aging))
    assert abs(by_rank) < 1e-6 or (by_rank < 0) == (by_due < 0)


def test_aging_counts_less_the_older_those_that_are_here():
    counted = [aging_factor(1.0, service=2.0, age=age) for age in (0.0, 0.1, 2.0, 4.0, 400.0)]
    assert counted[:2] == [MOST_AGING, MOST_AGING]
    assert counted[2] == AGING
    assert all(more >= less for more, less in pairwise(counted))
    assert aging_factor(0.0, 2.0, 1.0) == aging_factor(0.0, 2.0, 0.0) == 0.0
