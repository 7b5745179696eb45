"""How fast the simulator is: engine steps and requests per second of processor time.

    python benchmarks/simulator.py [--requests 1500] [--workers 100 --cluster-requests 20000]

One engine at load 0.9 (OPT-13B on an A100, batch 16, ShareGPT-like lengths), by policy; then a
cluster of many H200 with Llama 3 8B. Processor time, so that a busy machine counts for less.
0 requests leave a part out. A large cluster run shows how far it is:

    python benchmarks/simulator.py --requests 0 --workers 100 --cluster-requests 1000000
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator

from scheduling.cost import CostTracker
from scheduling.mlfq import Mlfq
from scheduling.order import Policy, make_policy
from scheduling.simulator.cluster import ClusterSpec, simulate_cluster
from scheduling.simulator.engine import simulate
from scheduling.simulator.outcome import Outcome
from scheduling.simulator.profiles import profile
from scheduling.simulator.traffic import SHAREGPT, Job, OpenLoop, make_jobs, noisy, poisson
from scheduling.simulator.worker import WorkerSpec

POLICIES = ("fcfs", "mlfq", "skip-join-mlfq", "predicted-srpt")
ENGINE_RATE = 2.0  # per second: 0.9 of what this engine can do
WORKER_RATE = 25.0  # per second and worker of the cluster
SHOWN_EVERY = 50_000  # arrivals


def policy_of(name: str) -> Callable[[CostTracker], Policy]:
    """The policy, with the research set-up's levels."""
    levels = Mlfq(levels=12, quantum=0.02, ratio=2.0, promote_after=math.inf)
    return lambda cost: make_policy(name, mlfq=levels, cost=cost)


def timed(run: Callable[[], Outcome]) -> tuple[Outcome, float]:
    """What a run gave, and its processor time."""
    start = time.process_time()
    outcome = run()
    return outcome, time.process_time() - start


def show(name: str, outcome: Outcome, seconds: float) -> None:
    """One line."""
    steps, requests = outcome.steps, len(outcome.served)
    print(
        f"{name:32} {requests:>8,} requests {steps:>10,} steps {seconds:7.1f} s "
        f"{steps / seconds:>9,.0f} steps/s {requests / seconds:>8,.0f} requests/s",
        flush=True,
    )


def engine(requests: int) -> None:
    """One engine, by policy."""
    device = profile("a100-opt-13b")
    capacity = device.capacity(max_tokens=2048, max_sequences=16, blocks=20_000)
    jobs = make_jobs(SHAREGPT, poisson(ENGINE_RATE), requests, seed=0, estimator=noisy(0.5))
    for name in POLICIES:
        spec = WorkerSpec(capacity, device.cost, policy_of(name))
        show(f"one engine, {name}", *timed(lambda spec=spec: simulate(jobs, spec)))


class Shown(OpenLoop):
    """Says now and then how many have arrived, and in what processor time."""

    def start(self) -> Iterator[Job]:
        """All of them."""
        start = time.process_time()
        for number, job in enumerate(super().start()):
            if number and number % SHOWN_EVERY == 0:
                seconds = time.process_time() - start
                print(f"{number:>10,} have arrived, {seconds:7.1f} s", flush=True)
            yield job


def cluster(workers: int, requests: int) -> None:
    """Many decode workers with prefill workers beside them."""
    device = profile("h200-llama-3-8b")
    capacity = device.capacity(max_tokens=2048, max_sequences=256)
    spec = WorkerSpec(capacity, device.cost, policy_of("fcfs"))
    helpers = max(1, workers // 5)
    shape = ClusterSpec(spec, workers - helpers, spec, helpers, device.transfer)
    jobs = make_jobs(SHAREGPT, poisson(WORKER_RATE * (workers - helpers)), requests, seed=0)
    outcome, seconds = timed(lambda: simulate_cluster(Shown(jobs), shape))
    show(f"{helpers} prefill + {workers - helpers} decode, fcfs", outcome, seconds)


def main() -> None:
    """Run both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=1500)
    parser.add_argument("--workers", type=int, default=100)
    parser.add_argument("--cluster-requests", type=int, default=20_000)
    options = parser.parse_args()
    if options.requests:
        engine(options.requests)
    if options.cluster_requests:
        cluster(options.workers, options.cluster_requests)


if __name__ == "__main__":
    main()
