from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.types import Request, Sampling, Stopping
from scheduling.cost import CostTracker, LinearCost
from scheduling.mlfq import Mlfq, MlfqPolicy, SkipJoinMlfq
from scheduling.sequence import Sequence, Standing
from tests.scheduling.serving import Job, start

MLFQ = Mlfq(levels=4, quantum=1.0, ratio=2.0, promote_after=10.0)
COST = LinearCost(base=0.0, per_token=1.0, per_sequence=1.0)


def sequence() -> Sequence:
    return Sequence.start(Request("r", (1,), Sampling(), Stopping(4)), 0, now=0.0)


def skip_join(mlfq: Mlfq = MLFQ) -> SkipJoinMlfq:
    return SkipJoinMlfq(mlfq, CostTracker(COST, every=0))


def test_quanta_grow_by_the_ratio_and_the_last_level_has_no_end() -> None:
    assert [MLFQ.quantum_of(level) for level in range(4)] == [1.0, 2.0, 4.0, math.inf]


@pytest.mark.parametrize(
    ("cost", "level"), [(0.0, 0), (1.0, 0), (1.1, 1), (2.0, 1), (3.9, 2), (4.1, 3), (1e9, 3)]
)
def test_a_sequence_joins_the_first_level_that_covers_its_first_iteration(
    cost: float, level: int
) -> None:
    assert MLFQ.first_level(cost) == level


def test_a_spent_quantum_demotes_and_what_is_left_over_counts_below() -> None:
    s = sequence()
    MLFQ.charge(s, 0.5)
    assert (s.level, s.served) == (0, 0.5)
    MLFQ.charge(s, 0.75)
    assert (s.level, s.served) == (1, 0.25)
    MLFQ.charge(s, 1.5)
    assert s.level == 1
    MLFQ.charge(s, 0.25)
    assert (s.level, s.served) == (2, 0.0)


def test_a_pass_longer_than_several_quanta_demotes_by_as_many_levels() -> None:
    s = sequence()
    MLFQ.charge(s, 3.5)
    assert (s.level, s.served) == (2, 0.5)


def test_nothing_sinks_below_the_last_level() -> None:
    s = sequence()
    for _ in range(100):
        MLFQ.charge(s, 50.0)
    assert s.level == 3


@given(passes=st.lists(st.integers(1, 200), max_size=20))
def test_many_charges_are_the_same_as_their_sum(passes: list[int]) -> None:
    apart, together = sequence(), sequence()
    for pass_ in passes:
        MLFQ.charge(apart, pass_ / 64)  # exact in binary
    MLFQ.charge(together, sum(passes) / 64)
    assert (apart.level, apart.served) == (together.level, together.served)


def test_everybody_joins_the_first_level_of_a_naive_queue() -> None:
    naive = MlfqPolicy(MLFQ, CostTracker(COST, every=0))
    assert [start(naive, Job(0, prompt, 4)).level for prompt in (1, 3, 99)] == [0, 0, 0]
    assert [start(skip_join(), Job(0, prompt, 4)).level for prompt in (1, 3, 99)] == [0, 2, 3]


def test_the_starved_come_first_for_one_quantum_and_are_then_where_they_had_sunk_to() -> None:
    policy = skip_join()
    old = start(policy, Job(0, 1, 99, level=2), now=0.0, id="old")
    policy.charge(old, 1.5, now=1.5)
    new = start(policy, Job(0, 1, 99), now=9.0, id="new")
    policy.promote([old, new], now=11.4)
    assert policy.rank(new) < policy.rank(old)
    policy.promote([old, new], now=11.5)
    assert policy.rank(old) < policy.rank(new)
    policy.charge(old, 0.75, now=12.25)
    assert policy.rank(old) < policy.rank(new)
    policy.charge(old, 0.75, now=13.0)
    assert policy.rank(new) < policy.rank(old)
    assert (old.level, old.served) == (2, 2.0), "only service beyond the quantum counts"


def test_those_that_starve_longest_come_first_of_the_starved() -> None:
    policy = skip_join()
    sequences = [start(policy, Job(0, 1, 9, level=3), id=str(i), now=4.0 - i) for i in range(3)]
    policy.promote(sequences, now=50.0)
    assert [s.request.id for s in sorted(sequences, key=policy.rank)] == ["2", "1", "0"]


def test_whoever_runs_does_not_starve() -> None:
    policy = skip_join()
    s = start(policy, Job(0, 1, 9))
    policy.charge(s, 0.1, now=25.0)
    policy.promote([s], now=30.0)
    assert s.standing is Standing.ORDINARY


def test_without_promotion_nobody_ever_counts_as_starved() -> None:
    policy = skip_join(Mlfq(promote_after=math.inf))
    s = start(policy, Job(0, 1, 9))
    policy.promote([s], now=1e9)
    assert s.standing is Standing.ORDINARY


def test_next_run_counts_the_quanta_that_those_before_it_burn_until_they_are_its_equals() -> None:
    policy = skip_join(Mlfq(levels=4, quantum=1.0, ratio=2.0, promote_after=100.0))
    levels = [0, 0, 1, 2]
    ranked = [start(policy, Job(0, 1, 99, level=n), id=str(i)) for i, n in enumerate(levels)]
    policy.charge(ranked[0], 0.25, now=0.0)
    assert policy.next_run(ranked, 1, now=0.0) == [
        0.0,
        0.75,  # the rest of the first one's quantum
        1.75,  # both have sunk to level 1
        1.75 + 2 * 2.0 + 2.0,  # all three have sunk to level 2
    ]
    assert policy.next_run(ranked, 2, now=0.0) == [0.0, 0.0, 0.875, 3.875]


def test_next_run_is_when_it_is_promoted_if_that_is_sooner() -> None:
    policy = skip_join()
    ranked = [start(policy, Job(0, 1, 99, level=n), id=str(n)) for n in (0, 3)]
    assert policy.next_run(ranked, 1, now=9.5) == [0.0, 0.5]


@settings(max_examples=50)
@given(levels=st.lists(st.integers(0, 3), min_size=1, max_size=30), slots=st.integers(1, 4))
def test_next_run_never_says_that_a_worse_rank_runs_earlier(levels: list[int], slots: int) -> None:
    policy = skip_join()
    ranked = [
        start(policy, Job(0, 1, 99, level=n, priority=i % 2), id=str(i))
        for i, n in enumerate(levels)
    ]
    ranked.sort(key=policy.rank)
    times = policy.next_run(ranked, slots, now=0.0)
    assert times == sorted(times)
    assert times[:slots] == [0.0] * min(slots, len(ranked))


def test_steady_ends_when_one_of_the_chosen_has_sunk_below_one_that_waits() -> None:
    policy = skip_join(replace(MLFQ, promote_after=math.inf))
    chosen = [start(policy, Job(0, 1, 99, level=n), id=str(n)) for n in (1, 2)]
    policy.charge(chosen[0], 0.5, now=0.0)
    late = start(policy, Job(0, 1, 99, level=2), id="late")
    early = start(policy, Job(0, 1, 99, level=2), id="0 early")

    def steady(*others: Sequence) -> float:
        return policy.steady(chosen[:1], others, 0.0, pass_seconds=0.1)

    assert steady(late) == 2.0 - 0.5 + 4.0  # one that comes after it there
    assert steady(early) == 2.0 - 0.5
    assert steady(early, late) == 2.0 - 0.5
    assert steady() == math.inf
    assert policy.steady(chosen, [late], 0.0, pass_seconds=0.1) == 4.0


def test_steady_looks_past_those_that_wait_although_they_come_first() -> None:
    policy = skip_join(replace(MLFQ, promote_after=math.inf))
    stuck = start(policy, Job(0, 1, 99, level=0), id="stuck")
    chosen = start(policy, Job(0, 1, 99, level=1), id="chosen")
    last = start(policy, Job(0, 1, 99, level=2), id="0 last")
    assert policy.steady([chosen], [stuck], 0.0, pass_seconds=0.1) == math.inf
    assert policy.steady([chosen], [stuck, last], 0.0, pass_seconds=0.1) == 2.0


def test_steady_ends_when_one_that_waits_may_be_promoted() -> None:
    policy = skip_join()
    chosen, other = start(policy, Job(0, 1, 99, level=2)), start(policy, Job(0, 1, 9, level=3))
    policy.charge(chosen, 0.5, now=8.0)
    assert policy.steady([chosen], [other], 8.0, pass_seconds=0.1) == 0.0  # looks at the load
    policy.promote([chosen, other], now=8.0)
    assert 0.0 < policy.steady([chosen], [other], 8.0, pass_seconds=0.1) <= 2.0
