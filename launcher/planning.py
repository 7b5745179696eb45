"""`baton plan`: how many workers a traffic needs, found in the simulator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from baton.config import DecodeConfig, SchedulingConfig
from baton.errors import ConfigError
from launcher.chart_values import write_values
from scheduling.cost import CostTracker
from scheduling.mlfq import Mlfq
from scheduling.order import Policy, policy_from
from scheduling.rules import Rules
from scheduling.simulator.hardware import GPUS, SHAPES, ModelShape
from scheduling.simulator.profiles import Profile, of_hardware, profile
from scheduling.simulator.search import Search
from scheduling.simulator.sizing import Answer, Question, Slo, Trial
from scheduling.simulator.traces import at_rate, read_jobs
from scheduling.simulator.traffic import (
    ALPACA,
    SHAREGPT,
    Job,
    Lengths,
    fixed,
    gamma,
    make_jobs,
    noisy,
    unpredicted,
)

SPREAD = 0.3  # of lengths given as IN/OUT: FastGen's benchmark


@dataclass(frozen=True, slots=True)
class Options:
    """The command line. Times in seconds; 0 is no limit."""

    model: str
    gpu: str
    kv_dtype: Literal["auto", "int8", "fp8"]
    profile: str
    trace: Path | None
    rate: float
    lengths: str
    burstiness: float
    ttft: float
    tpot: float
    percentile: float
    policy: str
    predictor_error: float
    max_workers: int
    prefill_price: float
    requests: int
    seed: int
    values: Path | None


def run(options: Options) -> int:
    """Search and print. Returns the exit code: 1 if nothing meets the SLOs. Raises ConfigError."""
    question = question_from(options)
    errors = Console(stderr=True)
    with errors.status("starting") as status:
        answer = Search(question, lambda line: status.update(f"simulating {line}")).run()
    show(answer, question, Console())
    if answer.best is None:
        return 1
    if options.values is not None:
        write_values(options.values, answer.best, question)
        errors.print(f"wrote {options.values}")
    return 0


def question_from(options: Options) -> Question:
    """What is asked. Raises ConfigError."""
    if not options.ttft and not options.tpot:
        raise ConfigError("give --ttft, --tpot or both: without a limit one worker is enough")
    device = _profile(options)
    return Question(
        jobs=_traffic(options, device),
        slo=Slo(options.ttft or None, options.tpot or None, options.percentile),
        prefill=device,
        decode=device,
        policy_name=options.policy,
        policy=_policy(options.policy),
        rules=Rules.of(DecodeConfig.model_construct()),
        max_workers=options.max_workers,
        price=options.prefill_price,
        requests=options.requests,
        seed=options.seed,
    )


def _profile(options: Options) -> Profile:
    """The device, by one of three ways to name it."""
    if options.profile:
        return profile(options.profile)
    if options.gpu not in GPUS:
        raise ConfigError(f"--gpu {options.gpu}: one of {', '.join(GPUS)}")
    shape = SHAPES.get(options.model)
    if shape is None:
        if not Path(options.model).is_dir():
            known = ", ".join(SHAPES)
            raise ConfigError(f"--model {options.model}: no directory, and none of {known}")
        shape = ModelShape.load(Path(options.model))
    return of_hardware(replace(shape, kv_dtype=options.kv_dtype), GPUS[options.gpu])


def _policy(name: str) -> Callable[[Mlfq, CostTracker], Policy]:
    """The order that the workers' own configuration would give."""

    def build(mlfq: Mlfq, cost: CostTracker) -> Policy:
        settings: dict[str, Any] = {
            "policy": name,
            "mlfq_levels": mlfq.levels,
            "mlfq_quantum": mlfq.quantum,
            "mlfq_ratio": mlfq.ratio,
            "mlfq_promote_after": mlfq.promote_after,
        }
        return policy_from(SchedulingConfig.model_construct(**settings), cost)

    return build


# -- Traffic -------------------------------------------------------------------------------


def _traffic(options: Options, device: Profile) -> Callable[[int, int], list[Job]]:
    """(count, seed) to jobs."""
    if options.trace is not None:
        return _of_trace(options)
    if options.rate <= 0:
        raise ConfigError("give --rate, in requests per second, or --trace")
    lengths = _lengths(options.lengths, device)
    estimator = noisy(options.predictor_error) if _predicts(options) else unpredicted

    def draw(count: int, seed: int) -> list[Job]:
        arrivals = gamma(options.rate, options.burstiness)
        return make_jobs(lengths, arrivals, count, seed=seed, estimator=estimator)

    return draw


def _predicts(options: Options) -> bool:
    return options.policy == "predicted-srpt"


def _of_trace(options: Options) -> Callable[[int, int], list[Job]]:
    assert options.trace is not None
    try:
        jobs = read_jobs(options.trace.read_text().splitlines())
    except OSError as error:
        raise ConfigError(f"--trace: {error}") from None
    if options.rate > 0:
        jobs = at_rate(jobs, options.rate)

    def head(count: int, seed: int) -> list[Job]:
        """Its beginning, or its end for other seeds: what a longer run proves is on other
        requests, as far as the trace has them."""
        if seed == options.seed or len(jobs) <= count:
            return jobs[:count]
        return jobs[-count:]

    return head


def _lengths(name: str, device: Profile) -> Lengths:
    if name in ("sharegpt", "alpaca"):
        return SHAREGPT if name == "sharegpt" else ALPACA
    prompt, slash, output = name.partition("/")
    if not (slash and prompt.isdigit() and output.isdigit() and int(prompt) and int(output)):
        raise ConfigError(f"--lengths {name}: sharegpt, alpaca, or IN/OUT in tokens")
    lengths = fixed(int(prompt), int(output), cv=SPREAD)
    if int(prompt) + int(output) > device.max_context:
        raise ConfigError(f"--lengths {name}: the context is {device.max_context} tokens")
    return lengths


# -- What is printed -----------------------------------------------------------------------


def show(answer: Answer, question: Question, console: Console) -> None:
    """The table of what was tried, and the answer below it."""
    console.print(_table(answer, question))
    best = answer.best
    if best is None:
        console.print(
            f"[red]No cluster of up to {question.max_workers} workers does:[/] {answer.reason}."
        )
        return
    tuning = best.tuning
    console.print(
        f"[green]{best.layout}[/], passes of up to {tuning.max_tokens} tokens and "
        f"{tuning.max_sequences} sequences"
        + ("" if question.policy_name == "fcfs" else f", quantum {tuning.mlfq.quantum * 1e3:g} ms")
        + f", {question.policy_name}.\nWhat binds: {answer.reason}."
    )
    if question.decode.source:
        console.print(f"[dim]Cost model: {question.decode.source}.[/]")


def _table(answer: Answer, question: Question) -> Table:
    percent = f"P{question.slo.percentile:g}"
    table = Table(box=box.SIMPLE_HEAD, title_justify="left", title=f"{question.decode.name}")
    for name in ("prefill", "decode", "TTFT P50", percent, "TPOT P50", percent, "tokens/s", ""):
        table.add_column(name, justify="left" if not name else "right")
    trials = {trial.layout: trial for trial in answer.trials}
    if answer.best is not None:
        trials[answer.best.layout] = answer.best
    for layout in sorted(trials, key=lambda t: (t.prefill, t.decode)):
        table.add_row(*_row(trials[layout], question), style=_style(trials[layout], answer))
    return table


def _row(trial: Trial, question: Question) -> list[str]:
    outcome, percent = trial.outcome, question.slo.percentile
    ttft, tpot = outcome.first_token(), outcome.per_output_token()
    verdict = "meets" if trial.meets else f"misses {trial.limit}"
    return [
        str(trial.layout.prefill),
        str(trial.layout.decode),
        *(f"{np.percentile(ttft, p) * 1e3:,.0f} ms" for p in (50, percent)),
        *(f"{np.percentile(tpot, p) * 1e3:,.1f} ms" if len(tpot) else "-" for p in (50, percent)),
        f"{outcome.throughput():,.0f}",
        verdict,
    ]


def _style(trial: Trial, answer: Answer) -> str:
    if answer.best is not None and trial.layout == answer.best.layout:
        return "green"
    return "" if trial.meets else "dim"
