"""The handicap: shorter first, nobody for ever last."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from scheduling.aging import MIN_AGING, handicap, loaded_aging

SECONDS = st.floats(0.001, 1000)
AGING = st.floats(0, 4)


@given(SECONDS, SECONDS, AGING)
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


def test_aging_counts_less_the_longer_the_queue():
    counted = [loaded_aging(0.8, waiting, slots=16) for waiting in (0, 4, 16, 1600)]
    assert counted[0] == 0.8 and counted[2] == 0.4
    assert all(more > less for more, less in pairwise(counted))
