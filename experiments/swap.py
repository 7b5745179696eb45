"""B7: what becomes of KV that has to give way. Swapped ahead of need, swapped when needed, or
computed again; as the request rate at which a latency promise breaks, with little KV memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments import plots
from experiments.benches import rotated
from experiments.collect import Point, Samples
from experiments.engines import Setup, SimulatedEngine
from experiments.experiment import Bar, Experiment, Run, Table
from experiments.records import Record, Results
from scheduling.mlfq import Mlfq
from scheduling.order import make_policy
from scheduling.rules import Rules
from scheduling.simulator.outcome import Outcome
from scheduling.simulator.profiles import profile
from scheduling.simulator.traffic import SHAREGPT, make_jobs, noisy, poisson

NAME = "B7"
WAYS = {
    "proactive": Rules(preemption="swap", swapping="proactive"),
    "reactive": Rules(preemption="swap", swapping="reactive"),
    "recompute": Rules(preemption="recompute"),
}
BATCH = 16
_HOST_BLOCKS = 1 << 16
_SLO_STEPS = 10
"""The promise: seconds per token, of as many full-batch passes. FastServe's 0.3 s is ten decode
iterations of its models, too."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A policy under a cap of KV memory; `promote_after` in seconds."""

    policy: str = "skip-join-mlfq"
    kv_tokens: int = 6000
    promote_after: float = 1.0

    @property
    def label(self) -> str:
        """As tables show it."""
        wait = "never" if math.isinf(self.promote_after) else f"after {self.promote_after:g} s"
        return f"{self.policy}, {self.kv_tokens} tokens of KV, promotion {wait}"


MAIN = Setting()
SETTINGS = (
    MAIN,
    Setting(kv_tokens=4500),
    Setting(kv_tokens=12000),
    Setting(promote_after=5.0),
    Setting(promote_after=math.inf),
    Setting(policy="predicted-srpt"),
)
_RATES = (5.0, 7.0, 10.0, 14.0, 20.0, 28.0)
"""Requests per second, tried in this order until the promise is broken."""


class _Machine:
    """Llama-2-7B on an H200, by the roofline: every layer and head has KV of its own, 512 KiB a
    token, which go over PCIe generation 5 at 50 GB/s each way."""

    def __init__(self) -> None:
        self._profile = profile("h200-llama-2-7b")
        self.step = self._engine(MAIN).step_seconds

    @property
    def slo(self) -> float:
        """Seconds per token."""
        return _SLO_STEPS * self.step

    def _engine(self, setting: Setting) -> SimulatedEngine:
        capacity = self._profile.capacity(
            max_tokens=2048,
            max_sequences=BATCH,
            blocks=setting.kv_tokens // self._profile.block_size,
            host_blocks=_HOST_BLOCKS,
        )
        return SimulatedEngine(
            self._profile.cost,
            capacity,
            swap_seconds_per_block=self._profile.swap_seconds_per_block,
        )

    def serve(self, setting: Setting, way: str, rate: float, count: int, seed: int) -> Outcome:
        """One run of `count` requests, the first to the last: a transient, as in the paper."""
        mlfq = Mlfq(levels=16, quantum=self.step, ratio=2.0, promote_after=setting.promote_after)
        jobs = make_jobs(SHAREGPT, poisson(rate), count, seed=seed, estimator=noisy(0.5))
        setup = Setup(lambda cost: make_policy(setting.policy, mlfq=mlfq, cost=cost), WAYS[way])
        return self._engine(setting).serve(jobs, setup)


def crossing(rates: Sequence[float], latencies: Sequence[float], limit: float) -> float:
    """The rate at which the latency reaches `limit`, by interpolation between the last one below
    it and the first one above, as the paper does. The nearest bound if it lies beyond them."""
    for number, (rate, latency) in enumerate(zip(rates, latencies, strict=False)):
        if latency > limit:
            if number == 0:
                return rate
            before, below = rates[number - 1], latencies[number - 1]
            return before + (rate - before) * (limit - below) / (latency - below)
    return rates[len(latencies) - 1]


def _measure(run: Run) -> list[Record]:
    samples = Samples(NAME, "simulator")
    machine = _Machine()
    count, rates = run.sized(400, 250), run.sized(_RATES, _RATES[::2])
    more = SETTINGS[1:] if not run.quick else ()
    run.progress.expect(len(WAYS) * (len(run.seeds) + len(more)))
    for number, seed in enumerate(run.seeds):
        for way in rotated(tuple(WAYS), number):
            for setting in (MAIN, *more) if seed == run.seeds[0] else (MAIN,):
                _sweep(samples, machine, setting, way, rates, count, seed)
                run.progress.done(f"{NAME} {way}, {setting.label}")
    for setting in (MAIN, *more):
        ahead = _point(setting, "proactive")
        for way in ("reactive", "recompute"):
            samples.compare(ahead, _point(setting, way), "rate_at_slo_per_s")
    return samples.records()


def _sweep(
    samples: Samples,
    machine: _Machine,
    setting: Setting,
    way: str,
    rates: Sequence[float],
    count: int,
    seed: int,
) -> None:
    """One rate after the other, until the promise is broken."""
    latencies = []
    for rate in rates:
        outcome = machine.serve(setting, way, rate, count, seed)
        latencies.append(outcome.after_warmup().mean_normalized())
        if setting == MAIN:
            samples.add(Point(way, axis="requests/s", at=rate), **_metrics(outcome))
        if latencies[-1] > machine.slo:
            break
    found = crossing(rates, latencies, machine.slo)
    samples.add(_point(setting, way), rate_at_slo_per_s=found)


def _point(setting: Setting, way: str) -> Point:
    """Settings are told apart by their place in SETTINGS."""
    return Point(way, axis="setting", at=SETTINGS.index(setting))


def _metrics(outcome: Outcome) -> dict[str, float]:
    kept = outcome.after_warmup()
    return {
        "s_per_token": kept.mean_normalized(),
        "mean_jct_s": kept.mean_completion(),
        "p99_jct_s": kept.completion_percentile(99),
        "stall_share": outcome.stall_seconds / outcome.busy_seconds,
        "swapped_out": outcome.tally.swapped_out,
        "recomputed": outcome.tally.recomputed,
    }


def _tables(results: Results) -> list[Table]:
    mine = results.where(experiment=NAME)
    rows = []
    for number, setting in enumerate(SETTINGS):
        here = mine.where(at=number, metric="rate_at_slo_per_s")
        rates = [here.value(policy=way) for way in WAYS]
        ratios = [_ratio(mine, number, way) for way in ("reactive", "recompute")]
        values = [value for value in (*rates, *ratios) if value is not None]
        if len(values) == len(WAYS) + 2:
            rows.append((setting.label, *(f"{value:.2f}" for value in values)))
    tables = []
    if rows:
        header = ("requests/s at the promise", *WAYS, "over reactive", "over recompute")
        tables.append(Table("Rate at ten passes per token", header, tuple(rows)))
    curve = [r for r in mine if r.axis == "requests/s"]
    lines = []
    for rate in _RATES:
        for way in WAYS:
            found = {r.metric: r.value for r in curve if r.at == rate and r.policy == way}
            if found:
                lines.append(
                    (
                        f"{way}, {rate:g}/s",
                        f"{1e3 * found['s_per_token']:.1f}",
                        f"{found['mean_jct_s']:.1f}",
                        f"{found['p99_jct_s']:.1f}",
                        f"{found['stall_share']:.1%}",
                        f"{found['swapped_out']:,.0f}",
                        f"{found['recomputed']:,.0f}",
                    )
                )
    if lines:
        head = ("", "ms/token", "mean JCT, s", "P99 JCT, s", "stall", "swaps out", "recomputed")
        tables.append(Table(MAIN.label, head, tuple(lines)))
    return tables


def _ratio(mine: Results, number: int, way: str) -> float | None:
    return mine.value(policy=f"proactive / {way}", at=number, metric="rate_at_slo_per_s_ratio")


def _bars(results: Results) -> list[Bar]:
    mine = results.where(experiment=NAME)
    bars = []
    for way, limit in (("reactive", 1.3), ("recompute", 1.5)):
        found = _ratio(mine, 0, way)
        if found is not None:
            claim = f"B7 rate at the promise, proactive over {way}"
            bars.append(Bar(claim, "simulator", found, limit, True))
    stalls = [r.value for r in mine.where(policy="proactive", metric="stall_share")]
    if stalls:
        claim = "B7 proactive: exposed swap stall, share of the time of all passes"
        bars.append(Bar(claim, "simulator", max(stalls), 0.05, False))
    return bars


def _draw(results: Results, folder: Path) -> list[Path]:
    path = folder / "b7-swap.png"
    return plots.panels(results.where(experiment=NAME), path, 2, _draw_panels, width=5.0)


def _draw_panels(mine: Results, panels: plots.Panels) -> None:
    left, right = panels
    for way in WAYS:
        found = [r for r in mine.where(policy=way, metric="s_per_token") if r.axis]
        plots.line(left, [r.at or 0 for r in found], found, way)
    slo = _Machine().slo
    left.axhline(slo, ls="--", lw=1, color="#555555")
    left.text(_RATES[0], slo * 1.06, "promise", fontsize=8, color="#555555")
    left.set(xlabel="requests per second", ylabel="seconds per token", yscale="log")
    left.legend(frameon=False)
    for place, way in enumerate(WAYS):
        rates = list(mine.where(policy=way, metric="rate_at_slo_per_s"))
        spots = [(r.at or 0) + (place - 1) * 0.26 for r in rates]
        right.barh(spots, [r.value for r in rates], 0.26, color=plots.color(way), label=way)
    right.set_yticks(range(len(SETTINGS)), [s.label for s in SETTINGS], fontsize=7)
    right.invert_yaxis()
    right.grid(axis="y", visible=False)
    right.set_xlabel("requests per second at the promise")


EXPERIMENTS = (
    Experiment(
        name=NAME,
        title="KV that gives way: swapped ahead, swapped when needed, recomputed",
        engines=("simulator",),
        measure=_measure,
        draw=_draw,
        bars=_bars,
        tables=_tables,
    ),
)
