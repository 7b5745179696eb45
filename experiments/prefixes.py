"""PREFIX: conversations on four workers with prefix caches. Which of them gets the next turn: any
that has little to do, or the one that has the beginning of its prompt; in the simulator."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from experiments.benches import OPT_13B_ON_A100, rotated
from experiments.collect import Point, Samples
from experiments.experiment import Bar, Experiment, Run, Table
from experiments.records import Record, Results
from scheduling.order import make_policy
from scheduling.plan import Capacity
from scheduling.simulator.cluster import ClusterSpec, simulate_cluster
from scheduling.simulator.conversations import Conversations, Talks
from scheduling.simulator.outcome import Outcome
from scheduling.simulator.prefill_worker import Transfer
from scheduling.simulator.queue import QueueOrder
from scheduling.simulator.traffic import noisy
from scheduling.simulator.worker import WorkerSpec

NAME = "PREFIX"
WORKERS = 4
LOADS = (0.5, 0.8, 1.1)
"""Of the requests per second that the workers complete without caches."""

_POLICY = "predicted-srpt"
_TRANSFER = Transfer(block_bytes=16 * 2 * 40 * 5120 * 2, bytes_per_second=25e9, latency=0.002)
"""Of OPT-13B's KV in two bytes per number, over 200 Gbit/s."""

_CAPACITY = Capacity(
    blocks=1 << 12, block_size=16, max_tokens=512, max_sequences=16, max_context=4096
)
# Name of a policy: its router, whether workers have caches, and how many of them only prefill.
_POLICIES = {
    "no caches": ("kv-aware", False, 0),
    "kv-aware": ("kv-aware", True, 0),
    "prefix-aware": ("prefix-aware", True, 0),
    "kv-aware, 2 prefill": ("kv-aware", True, 2),
    "prefix-aware, 2 prefill": ("prefix-aware", True, 2),
}
_PAIRS = tuple((f"kv-aware{shape}", f"prefix-aware{shape}") for shape in ("", ", 2 prefill"))
_METRICS = ("computed_share", "mean_ttft_s", "p99_ttft_s", "mean_jct_s")


def _spec(policy: str) -> ClusterSpec:
    routing, caches, helpers = _POLICIES[policy]
    worker = WorkerSpec(
        _CAPACITY,
        OPT_13B_ON_A100,
        lambda cost: make_policy(_POLICY, cost=cost),
        prefix_cache=caches,
    )
    return ClusterSpec(
        worker,
        WORKERS - helpers,
        worker if helpers else None,
        helpers,
        _TRANSFER,
        queue=QueueOrder(_POLICY),
        routing=routing,
        ahead_sequences=_CAPACITY.max_sequences,
    )


def _measure(run: Run) -> list[Record]:
    samples = Samples(NAME, "simulator")
    count = run.sized(300, 40)
    run.progress.expect(len(run.seeds) * len(_POLICIES) * len(LOADS))
    for number, seed in enumerate(run.seeds):
        rate = _saturation(count, seed)
        for load in LOADS:
            for policy in rotated(tuple(_POLICIES), number):
                talks = _talks(load * rate, count, seed)
                metrics = _metrics(simulate_cluster(talks, _spec(policy)))
                samples.add(Point(policy, load), **metrics)
                run.progress.done(f"{NAME} {policy} at {load:g}")
    for load in LOADS:
        for over, under in _PAIRS:
            for metric in _METRICS:
                samples.compare(Point(over, load), Point(under, load), metric)
    return samples.records()


def _talks(rate: float, count: int, seed: int) -> Conversations:
    """Talks of which so many turns a second come, once as many begin as end."""
    made = Conversations(Talks(rate=1.0), count, seed=seed, estimator=noisy(0.5))
    turns = made.jobs / count
    return Conversations(Talks(rate=rate / turns), count, seed=seed, estimator=noisy(0.5))


def _saturation(count: int, seed: int) -> float:
    """Turns per second of a backlog of all of them, without caches."""
    jobs = [replace(job, arrived_at=0.0) for job in _talks(1.0, count, seed).turns()]
    return simulate_cluster(jobs, _spec("no caches")).completion_rate()


def _metrics(outcome: Outcome) -> dict[str, float]:
    kept = outcome.after_warmup()
    prompts = sum(served.job.prompt_tokens for served in outcome.served)
    return {
        "computed_share": outcome.tally.prompt_tokens / prompts,
        "mean_ttft_s": float(kept.first_token().mean()),
        "p99_ttft_s": float(np.percentile(kept.first_token(), 99)),
        "mean_jct_s": kept.mean_completion(),
    }


def _tables(results: Results) -> list[Table]:
    mine = results.where(experiment=NAME)
    rows = []
    for load in LOADS:
        for policy in _POLICIES:
            values = [mine.value(policy=policy, load=load, metric=name) for name in _METRICS]
            if None not in values:
                cells = (f"{value:.3g}" for value in values if value is not None)
                rows.append((f"{policy}, load {load:g}", *cells))
    header = ("", "prompt tokens computed", "mean TTFT, s", "P99 TTFT, s", "mean JCT, s")
    return [Table(f"{WORKERS} workers", header, tuple(rows))] if rows else []


def _bars(results: Results) -> list[Bar]:
    bars = []
    mine = results.where(experiment=NAME)
    over, under = _PAIRS[0]
    pair = f"{over} / {under}"
    for metric, said, limit in (
        ("computed_share_ratio", "prompt tokens computed", 2.0),
        ("mean_ttft_s_ratio", "mean TTFT", 1.5),
    ):
        for load in LOADS:
            found = mine.value(policy=pair, load=load, metric=metric)
            if found is not None:
                claim = f"{NAME} {said} of kv-aware over prefix-aware, load {load:g}"
                bars.append(Bar(claim, "simulator", found, limit, at_least=True))
    return bars


EXPERIMENTS = (
    Experiment(
        name=NAME,
        title="Which worker gets the next turn of a conversation",
        engines=("simulator",),
        measure=_measure,
        bars=_bars,
        tables=_tables,
    ),
)
