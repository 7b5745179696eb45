from __future__ import annotations

from dataclasses import replace

import pytest

from scheduling.cost import CostTracker
from scheduling.mlfq import Mlfq
from scheduling.order import Policy, make_policy
from scheduling.simulator.profiles import Profile
from scheduling.simulator.search import Search
from scheduling.simulator.sizing import Layout, Question, Slo, simulate_trial
from scheduling.simulator.traffic import Job, fixed, make_jobs, poisson

SLOW = Profile("slow", 0.01, 2e-4, 0.0, 1e-4, 0.0, block_bytes=1000, blocks=2000, max_context=512)


def _fcfs(levels: Mlfq, cost: CostTracker) -> Policy:
    return make_policy("fcfs", cost=cost)


def _question(rate: float, slo: Slo, **rest: object) -> Question:
    def jobs(count: int, seed: int) -> list[Job]:
        return make_jobs(fixed(60, 20, cv=0.3), poisson(rate), count, seed=seed)

    question = Question(
        jobs=jobs,
        slo=slo,
        prefill=SLOW,
        decode=SLOW,
        policy_name="fcfs",
        policy=_fcfs,
        requests=160,
        token_budgets=(128, 256),
        sequence_limits=(4, 8),
    )
    return replace(question, **rest)  # type: ignore[arg-type]


def test_the_answer_meets_the_limits_on_longer_traffic_and_one_worker_less_does_not() -> None:
    question = _question(100.0, Slo(ttft=0.2, tpot=0.04), max_workers=16, split=False)
    answer = Search(question).run()
    best = answer.best
    assert best is not None and best.meets
    assert len(best.outcome.served) > question.requests
    fewer = Layout(best.layout.prefill, best.layout.decode - 1)
    jobs = question.jobs(2 * question.requests, question.seed + 1)
    assert not simulate_trial(question, fewer, best.tuning, jobs).meets
    assert answer.reason


def test_more_traffic_needs_more_workers() -> None:
    slo = Slo(ttft=0.3, tpot=None)
    sizes = []
    for rate in (20.0, 150.0):
        best = Search(_question(rate, slo, split=False)).run().best
        assert best is not None
        sizes.append(best.layout.decode)
    assert sizes[0] < sizes[1]


def test_prefill_workers_are_used_where_they_are_cheap() -> None:
    slo = Slo(ttft=0.3, tpot=0.0135)  # a prompt beside it makes a pass too long
    dear, cheap = (
        Search(_question(40.0, slo, price=price, max_workers=12)).run() for price in (1.0, 0.1)
    )
    assert cheap.best is not None
    assert cheap.best.layout.prefill > 0
    assert dear.best is None or dear.best.layout.decode >= cheap.best.layout.decode


def test_a_limit_below_what_one_request_takes_is_hopeless() -> None:
    answer = Search(_question(5.0, Slo(ttft=0.001, tpot=None))).run()
    assert answer.best is None
    assert "even one request at a time misses the TTFT limit" in answer.reason


def test_too_few_workers_are_named_with_what_they_miss() -> None:
    answer = Search(_question(300.0, Slo(ttft=0.2, tpot=0.04), max_workers=2)).run()
    assert answer.best is None
    assert "do not keep up" in answer.reason or "still miss" in answer.reason


def test_requests_longer_than_a_worker_can_hold_are_named() -> None:
    small = replace(SLOW, max_context=70)
    answer = Search(_question(5.0, Slo(1.0, None), prefill=small, decode=small)).run()
    assert answer.best is None
    assert "longer than a worker can hold" in answer.reason


def test_a_search_is_deterministic_and_tells_what_it_tries() -> None:
    question = _question(60.0, Slo(ttft=0.3, tpot=0.05), max_workers=8, split=False)
    lines: list[str] = []
    first = Search(question, lines.append).run()
    second = Search(question).run()
    assert first.best == second.best
    assert any("0 prefill + 1 decode" in line for line in lines)


def test_an_slo_limits_something() -> None:
    with pytest.raises(ValueError, match="limits"):
        Slo(None, None)
