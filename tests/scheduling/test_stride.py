"""Many passes at once have the effect of one after another."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.types import LengthEstimate, Output, Request, Sampling, Stopping
from scheduling.cost import CostTracker, LinearCost
from scheduling.mlfq import Mlfq
from scheduling.order import make_policy
from scheduling.plan import Capacity, Sampled, StepPlan, StepResult
from scheduling.rules import Rules
from scheduling.striding import StridingScheduler

SECONDS = 1 / 64  # of a pass; sums of it are exact
TOKEN = 7
POLICIES = ["fcfs", "mlfq", "skip-join-mlfq", "predicted-srpt", "srpt-oracle"]


def result_of(plan: StepPlan) -> StepResult:
    """What a pass gives; its swaps end with it."""
    sampled = tuple(Sampled(TOKEN) if chunk.sample else None for chunk in plan.chunks)
    swapped = tuple(swap.number for swap in (*plan.swap_out, *plan.swap_in))
    return StepResult(sampled, ((),) * len(plan.chunks), SECONDS, swapped)


def make_scheduler(capacity: Capacity, rules: Rules, name: str, **mlfq: float) -> StridingScheduler:
    cost = CostTracker(LinearCost(SECONDS / 2, SECONDS / 64), every=0)
    policy = make_policy(name, mlfq=Mlfq(**mlfq), cost=cost)
    return StridingScheduler(capacity, policy, max_waiting=1000, rules=rules, cost=cost)


def traffic(seed: int, capacity: Capacity) -> list[Request]:
    """Requests in order of arrival, some of them at once, some after a pause."""
    rng = random.Random(seed)
    requests, now = [], 0
    for number in range(rng.randrange(1, 25)):
        now += rng.choice([0, 0, 1, 5, 30])
        prompt = rng.randrange(1, capacity.max_context)
        most = rng.randrange(1, capacity.max_context - prompt + 1)
        guess = rng.randrange(1, 60)
        requests.append(
            Request(
                id=f"r{number:02}",
                prompt_ids=(1,) * prompt,
                sampling=Sampling(n=rng.choice([1, 1, 1, 2])),
                stopping=Stopping(most),
                priority=rng.choice([0, 0, 0, 1]),
                arrived_at=now * SECONDS,
                estimate=rng.choice([None, LengthEstimate(guess, guess + 3)]),
            )
        )
    return requests


class Run:
    """Serves requests pass by pass, or in strides."""

    def __init__(self, scheduler: StridingScheduler, requests: list[Request], *, strides: bool):
        self._scheduler = scheduler
        self._strides = strides
        self._arrivals = iter(requests)
        self._next = next(self._arrivals, None)
        self.now = 0.0
        self.plans = 0
        self.finished: dict[tuple[str, int], tuple[float, int]] = {}
        self.free: dict[float, int] = {}  # blocks, by the time a plan was made

    def run(self) -> Run:
        for _ in range(100_000):
            while self._next is not None and self._next.arrived_at <= self.now:
                self._scheduler.submit(self._next, self.now)
                self._next = next(self._arrivals, None)
            if not self._step():
                return self
        raise AssertionError("never ends")

    def _step(self) -> bool:
        self.free[self.now] = self._scheduler.load().free_blocks
        plan = self._scheduler.plan(self.now)
        if plan is None:
            times = (
                self._scheduler.opens_at,
                None if self._next is None else self._next.arrived_at,
            )
            self.now = min((t for t in times if t is not None), default=math.inf)
            return self.now < math.inf
        self.plans += 1
        passes = self._passes(plan) if self._strides else 1
        self.now += passes * SECONDS
        if passes == 1:
            events = self._scheduler.apply(plan, result_of(plan), self.now)
        else:
            events = self._scheduler.apply_stride(plan, passes, TOKEN, passes * SECONDS, self.now)
        self._scheduler.check_integrity()
        for event in events:
            if isinstance(event, Output) and event.finish is not None:
                free = self._scheduler.load().free_blocks
                self.finished[event.request_id, event.index] = (self.now, free)
        return True

    def _passes(self, plan: StepPlan) -> int:
        passes = self._scheduler.stride(plan, self.now, SECONDS)
        if self._next is not None:
            passes = min(passes, math.ceil((self._next.arrived_at - self.now) / SECONDS))
        return max(1, passes)


@st.composite
def setups(draw: st.DrawFn) -> tuple[Capacity, Rules]:
    block_size = draw(st.sampled_from([1, 4, 16]))
    max_context = draw(st.integers(8, 120))
    capacity = Capacity(
        blocks=-(-max_context // block_size) + draw(st.integers(0, 40)),
        block_size=block_size,
        max_tokens=draw(st.sampled_from([1, 4, 16, 64])),
        max_sequences=draw(st.integers(1, 8)),
        max_context=max_context,
        host_blocks=draw(st.sampled_from([0, 8, 100])),
    )
    rules = Rules(
        admission=draw(
            st.sampled_from(["paged", "reserve-predicted", "reserve-sum", "reserve-max"])
        ),
        batching=draw(st.sampled_from(["splitfuse", "prefill-first"])),
        filling=draw(st.sampled_from(["continuous", "continuous", "static", "dynamic"])),
        dynamic_wait=SECONDS * 4,
        preemption=draw(st.sampled_from(["recompute", "swap", "auto"])),
        swapping=draw(st.sampled_from(["proactive", "reactive"])),
        swap_reserve=draw(st.sampled_from([0.0, 0.1, 0.3])),
    )
    return capacity, rules


def serve_both(
    setup: tuple[Capacity, Rules], name: str, seed: int, levels: dict[str, float]
) -> tuple[Run, Run]:
    """The same traffic pass by pass, and in strides."""
    capacity, rules = setup
    slow, fast = (
        Run(
            make_scheduler(capacity, rules, name, **levels),
            traffic(seed, capacity),
            strides=strides,
        ).run()
        for strides in (False, True)
    )
    return slow, fast


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=15, deadline=None)
@given(setup=setups(), seed=st.integers(0, 10_000), quantum=st.sampled_from([1, 3, 8]))
def test_strides_change_nothing_but_the_number_of_plans(name, setup, seed, quantum) -> None:
    # Nobody counts as starved: when the starved are looked for depends on when plans are made.
    levels = {"levels": 4, "quantum": quantum * SECONDS, "ratio": 2.0, "promote_after": math.inf}
    slow, fast = serve_both(setup, name, seed, levels)
    assert fast.finished == slow.finished
    assert fast.plans <= slow.plans
    assert fast.free.items() <= slow.free.items()


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=10, deadline=None)
@given(setup=setups(), seed=st.integers(0, 10_000))
def test_strides_serve_the_same_whatever_the_policy_looks_at(name, setup, seed) -> None:
    slow, fast = serve_both(setup, name, seed, {"levels": 4, "promote_after": 64 * SECONDS})
    assert fast.finished.keys() == slow.finished.keys()
    assert fast.plans <= 1.2 * slow.plans


@pytest.mark.parametrize("name", POLICIES)
def test_a_batch_that_nobody_disturbs_is_served_in_few_strides(name) -> None:
    capacity = Capacity(blocks=400, block_size=16, max_tokens=64, max_sequences=8, max_context=2000)
    requests = [
        Request(f"r{i}", (1,) * 8, Sampling(), Stopping(500), estimate=LengthEstimate(500, 500))
        for i in range(8)
    ]
    scheduler = make_scheduler(capacity, Rules(), name, levels=4)
    fast = Run(scheduler, requests, strides=True).run()
    assert len(fast.finished) == 8
    assert fast.plans < 40


def test_a_stride_ends_before_an_allotment_is_outgrown(capacity, make_request) -> None:
    scheduler = make_scheduler(capacity, Rules(admission="reserve-predicted"), "fcfs")
    (sequence,) = scheduler.submit(
        make_request("a", prompt=4, most=40, estimate=LengthEstimate(8, 10)), 0.0
    )
    plan = scheduler.plan(0.0)
    scheduler.apply(plan, result_of(plan), SECONDS)
    plan = scheduler.plan(SECONDS)
    assert scheduler.stride(plan, SECONDS, SECONDS) == 9
    scheduler.apply_stride(plan, 9, TOKEN, 9 * SECONDS, 10 * SECONDS)
    assert sequence.generated == sequence.allotment == 10
    scheduler.plan(10 * SECONDS)
    assert sequence.allotment == 20


def test_a_pass_with_a_prompt_is_not_repeated(capacity, make_request) -> None:
    scheduler = make_scheduler(capacity, Rules(), "fcfs")
    scheduler.submit(make_request("a", prompt=30, most=8), 0.0)
    plan = scheduler.plan(0.0)
    assert scheduler.stride(plan, 0.0, SECONDS) == 1


def test_the_tokens_of_a_stride_come_in_one_output(capacity, make_request) -> None:
    scheduler = make_scheduler(capacity, Rules(), "fcfs")
    scheduler.submit(make_request("a", prompt=4, most=6), 0.0)
    plan = scheduler.plan(0.0)
    scheduler.apply(plan, result_of(plan), SECONDS)
    plan = scheduler.plan(SECONDS)
    (output,) = scheduler.apply_stride(plan, 5, TOKEN, 5 * SECONDS, 6 * SECONDS)
    assert output.token_ids == (TOKEN,) * 5
    assert output.finish is not None
    assert scheduler.plan(6 * SECONDS) is None


def test_the_cost_model_learns_as_many_passes_as_there_were(make_request) -> None:
    capacity = Capacity(blocks=64, block_size=4, max_tokens=64, max_sequences=8, max_context=200)
    cost = CostTracker(every=10)
    policy = make_policy("fcfs", cost=cost)
    scheduler = StridingScheduler(capacity, policy, max_waiting=9, cost=cost)
    for id in "abc":
        scheduler.submit(make_request(id, prompt=4, most=60), 0.0)
    plan = scheduler.plan(0.0)
    scheduler.apply(plan, result_of(plan), 0.0)
    plan = scheduler.plan(0.0)
    model = cost.model
    scheduler.apply_stride(plan, 40, TOKEN, 40 * SECONDS, 0.0)
    assert cost.model != model
    assert cost.model.of(plan) == pytest.approx(SECONDS)
