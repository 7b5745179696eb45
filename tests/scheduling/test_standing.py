"""Starvation and deadlines, alike for all preemptive policies."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduling.cost import CostTracker, LinearCost
from scheduling.mlfq import Mlfq
from scheduling.order import make_policy
from scheduling.sequence import Sequence, Standing
from scheduling.standing import MOST_PATIENCE, SCAN_PAUSE, PreemptivePolicy
from tests.scheduling.serving import Job, advance, serve, start, work_of

COST = LinearCost(base=0.02, per_token=0.001, per_sequence=0.002)
PREEMPTIVE = ("mlfq", "skip-join-mlfq", "predicted-srpt")


def policy_of(name: str, promote_after: float = 2.0, aging: float = 1.0) -> PreemptivePolicy:
    mlfq = Mlfq(levels=4, quantum=0.05, ratio=2.0, promote_after=promote_after)
    policy = make_policy(name, mlfq=mlfq, cost=CostTracker(COST, every=0), aging=aging)
    assert isinstance(policy, PreemptivePolicy)
    return policy


@st.composite
def adversaries(draw: st.DrawFn) -> list[Job]:
    """Long jobs at first, and then a stream of short ones that alone is more than the worker can
    take, with estimates that may be far off."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    longs = draw(st.integers(1, 6))
    shorts = draw(st.integers(50, 200))
    gap = draw(st.sampled_from([0.01, 0.05, 0.2]))
    jobs = [Job(0.0, rng.randrange(1, 300), rng.randrange(20, 60), 1000) for _ in range(longs)]
    for number in range(shorts):
        output = rng.randrange(1, 6)
        estimate = rng.choice([None, 1, output, 50])
        jobs.append(Job(number * gap, rng.randrange(1, 40), output, estimate))
    return jobs


@pytest.mark.parametrize("name", PREEMPTIVE)
@settings(max_examples=15, deadline=None)
@given(jobs=adversaries(), slots=st.integers(1, 4), aging=st.sampled_from([0.0, 0.3, 1.0, 10.0]))
def test_nobody_waits_longer_than_the_bound_whatever_newcomers_do(
    name: str, jobs: list[Job], slots: int, aging: float
) -> None:
    promote_after = 0.2  # so that the most patience is often reached, too
    policy = policy_of(name, promote_after=promote_after, aging=aging)
    seen = [promote_after]
    served = serve(policy, jobs, COST, slots=slots, watch=lambda *_: seen.append(policy.patience))
    assert promote_after <= min(seen) <= max(seen) <= MOST_PATIENCE * promote_after
    rounds = served.most_waiting / slots + 1
    bound = max(seen) + SCAN_PAUSE + rounds * (0.05 + served.longest_pass) + served.longest_pass
    assert len(served.finished) == len(jobs)
    assert served.longest_wait <= bound


@pytest.mark.parametrize("name", PREEMPTIVE)
def test_a_higher_class_goes_before_the_starved_of_a_lower_one(name: str) -> None:
    policy = policy_of(name)
    old = start(policy, Job(0, 1, 9), id="old")
    policy.promote([old], now=50.0)
    assert old.standing is Standing.STARVED
    high = start(policy, Job(0, 900, 900, priority=1), now=50.0, id="high")
    assert policy.rank(high) < policy.rank(old)


@pytest.mark.parametrize("name", PREEMPTIVE)
def test_a_deadline_that_comes_close_goes_before_the_rest_of_its_class(name: str) -> None:
    policy = policy_of(name, promote_after=1e6)
    work = 0.022 * 100  # seconds, about
    hurried = start(policy, Job(0, 1, 100, 100, deadline=3 * work), id="hurried")
    other = start(policy, Job(0, 1, 2, 2), now=-0.1, id="other")
    policy.promote([hurried, other], now=1.2 * work)
    assert policy.rank(other) < policy.rank(hurried)
    policy.promote([hurried, other], now=1.7 * work)
    assert policy.rank(hurried) < policy.rank(other)


@pytest.mark.parametrize("name", PREEMPTIVE)
def test_a_deadline_that_is_lost_gives_no_precedence(name: str) -> None:
    policy = policy_of(name, promote_after=1e6)
    hopeless = start(policy, Job(0, 1, 100, 100, deadline=1.0), id="hopeless")
    other = start(policy, Job(0, 1, 2, 2), now=-0.1, id="other")
    policy.promote([hopeless, other], now=0.5)
    assert policy.rank(other) < policy.rank(hopeless)


@pytest.mark.parametrize("name", PREEMPTIVE)
def test_one_that_is_urgent_stays_so_while_it_runs_and_loses_it_with_its_chance(name: str) -> None:
    policy = policy_of(name, promote_after=1e6)
    work = 0.022 * 100
    hurried = start(policy, Job(0, 1, 100, 100, deadline=2.5 * work))
    now = 1.4 * work
    for _ in range(80):
        policy.promote([hurried], now)
        assert hurried.standing is Standing.URGENT
        now += 0.022
        advance(policy, hurried, 0.022, now)
    policy.promote([hurried], 2.5 * work)
    assert hurried.standing is Standing.ORDINARY


@pytest.mark.parametrize("name", PREEMPTIVE)
def test_the_earliest_deadline_of_the_urgent_comes_first(name: str) -> None:
    policy = policy_of(name, promote_after=1e6)
    deadlines = [3.2, 3.0, 3.1]
    sequences = [
        start(policy, Job(0, 1, 100, 100, deadline=d), id=str(i)) for i, d in enumerate(deadlines)
    ]
    policy.promote(sequences, now=0.3)
    assert {s.standing for s in sequences} == {Standing.URGENT}
    assert [s.request.id for s in sorted(sequences, key=policy.rank)] == ["1", "2", "0"]


def _check_stretch(policy: PreemptivePolicy, live: list[Sequence], slots: int, now: float) -> float:
    """Serve the best `slots` for as long as `steady` says, pass by pass: they must remain the best.
    Returns when that ended."""
    chosen, others = live[:slots], live[slots:]
    ends = now + min(policy.steady(chosen, others, now, COST.seconds(work_of(chosen))), 20.0)
    while now < ends:
        policy.promote(live, now)
        best = sorted(live, key=policy.rank)[:slots]
        assert set(best) == set(chosen)
        seconds = COST.seconds(work_of(chosen))
        if now + seconds >= ends - 1e-9 or any(s.generated > 400 for s in chosen):
            break
        now += seconds
        for s in chosen:
            advance(policy, s, seconds, now)
    return now


@pytest.mark.parametrize("name", [*PREEMPTIVE, "srpt-oracle"])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_steady_stretch_does_not_change_the_chosen(name: str, data: st.DataObject) -> None:
    mlfq = Mlfq(levels=5, quantum=0.05, ratio=3.0, promote_after=data.draw(st.sampled_from([1, 9])))
    policy = make_policy(name, mlfq=mlfq, cost=CostTracker(COST, every=0))
    estimates = st.one_of(st.none(), st.integers(1, 60))
    drawn = data.draw(st.lists(st.tuples(st.integers(1, 60), estimates), min_size=1, max_size=8))
    live = [
        start(policy, Job(0, prompt, 500, estimate), now=i * 0.01, id=str(i))
        for i, (prompt, estimate) in enumerate(drawn)
    ]
    slots, now = data.draw(st.integers(1, 3)), 0.1
    assert isinstance(policy, PreemptivePolicy)
    for _ in range(20):
        policy.promote(live, now)
        live.sort(key=policy.rank)
        now = _check_stretch(policy, live, slots, now)
        policy.promote(live, now)
        live.sort(key=policy.rank)
        seconds = COST.seconds(work_of(live[:slots]))
        now += seconds
        for s in live[:slots]:
            advance(policy, s, seconds, now)
        live = [s for s in live if s.generated < 400]
        if not live:
            break


@pytest.mark.parametrize(
    ("name", "patience", "standing"),
    [
        ("predicted-srpt", 30.0, Standing.ORDINARY),
        ("mlfq", 2.0, Standing.STARVED),
        ("skip-join-mlfq", 2.0, Standing.STARVED),
    ],
)
def test_where_everybody_has_waited_for_long_only_the_mlfqs_lift_everybody(
    name: str, patience: float, standing: Standing
) -> None:
    policy = policy_of(name)
    crowd = [start(policy, Job(0, 1, 100, 100), id=str(i)) for i in range(9)]
    policy.promote(crowd, now=10.0)
    assert policy.patience == patience
    assert {s.standing for s in crowd} == {standing}


@pytest.mark.parametrize("name", PREEMPTIVE)
def test_one_that_others_overtake_does_not_make_itself_wait_longer(name: str) -> None:
    policy = policy_of(name)
    old = start(policy, Job(0, 1, 100, 100), id="old")
    young = start(policy, Job(0, 1, 100, 100), now=9.9, id="young")
    policy.promote([old, young], now=10.0)
    assert policy.patience == 2.0
    assert old.standing is Standing.STARVED
