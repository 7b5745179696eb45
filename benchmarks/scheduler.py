"""What a plan costs: the time of DecodeScheduler.plan, by policy.

    python benchmarks/scheduler.py [--sequences 1000] [--running 256] [--plans 300] [--tenants 1]

So many sequences of so many tenants on one worker, some of them in the batch and the others waiting
or swapped out, without a host pool and with proactive swapping. Wall time, of which the median
counts: asking for processor time takes as long as a plan on some machines.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

from baton.types import LengthEstimate, Request, Sampling, Stopping
from scheduling.cost import CostTracker, LinearCost
from scheduling.decode import DecodeScheduler
from scheduling.order import NAMES, make_policy
from scheduling.plan import Capacity, Sampled, StepPlan, StepResult
from scheduling.rules import Rules

COST = LinearCost(base=0.01, per_token=1e-4, per_sequence=1e-4, per_context=1e-7)
WARMUP = 50  # plans
LONGEST = 2048


def request(number: int, rng: random.Random, tenants: int) -> Request:
    """A prompt of some tokens, and an output that does not end while plans are timed."""
    expected = rng.randrange(100, 1000)
    return Request(
        f"r{number}",
        (1,) * rng.randrange(20, 300),
        Sampling(),
        Stopping(1200),
        estimate=LengthEstimate(expected, expected + 100),
        tenant=f"tenant-{number % tenants}",
    )


def result_of(plan: StepPlan) -> StepResult:
    """What the pass gives; its swaps end with it."""
    sampled = tuple(Sampled(1) if chunk.sample else None for chunk in plan.chunks)
    swapped = tuple(swap.number for swap in (*plan.swap_out, *plan.swap_in))
    return StepResult(sampled, ((),) * len(sampled), COST.of(plan), swapped)


def seconds_per_plan(
    policy: str, rules: Rules, sequences: int, running: int, plans: int, tenants: int
) -> list[float]:
    """Seconds of each of so many plans."""
    rng = random.Random(0)
    cost = CostTracker(COST, every=0)
    capacity = Capacity(running * 40, 16, 2048, running, LONGEST, host_blocks=sequences * 40)
    scheduler = DecodeScheduler(
        capacity,
        make_policy(policy, cost=cost),
        max_waiting=sequences,
        rules=rules,
        cost=cost,
    )
    for number in range(sequences):
        scheduler.submit(request(number, rng, tenants), number * 1e-3)
    now, taken = sequences * 1e-3, []
    for _ in range(WARMUP + plans):
        start = time.perf_counter()
        plan = scheduler.plan(now)
        taken.append(time.perf_counter() - start)
        assert plan is not None
        result = result_of(plan)
        now += result.seconds
        scheduler.apply(plan, result, now)
    return taken[WARMUP:]


def main() -> None:
    """Print a line per policy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=1000)
    parser.add_argument("--running", type=int, default=256)
    parser.add_argument("--plans", type=int, default=300)
    parser.add_argument("--tenants", type=int, default=1)
    options = parser.parse_args()
    sizes = (options.sequences, options.running, options.plans, options.tenants)
    for name in NAMES:
        for preemption in ("recompute", "swap"):
            taken = seconds_per_plan(name, Rules(preemption=preemption), *sizes)
            median, p95 = statistics.median(taken), statistics.quantiles(taken, n=20)[-1]
            print(
                f"{name:16} {preemption:10} median {median * 1e3:6.3f} ms, p95 {p95 * 1e3:6.3f} ms"
            )


if __name__ == "__main__":
    main()
