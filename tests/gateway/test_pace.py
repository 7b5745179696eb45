"""What the queue is told of a request follows what workers measure and what is predicted."""

from __future__ import annotations

from dataclasses import replace

import pytest

from baton.config import GatewayConfig
from baton.types import LengthEstimate, Load, Request, Sampling, Stopping
from gateway.job import Job
from gateway.pace import Pace
from queueing.contract import Role, WorkerRecord

GUESSES = GatewayConfig(
    policy="fcfs",
    prefill_seconds_base=1.0,
    prefill_seconds_per_token=0.1,
    token_seconds=0.5,
    srpt_aging=1.0,
)
SRPT = GUESSES.model_copy(update={"policy": "predicted-srpt"})


def job(predicted: int | None = None, *, n: int = 1, max_tokens: int = 10_000) -> Job:
    estimate = None if predicted is None else LengthEstimate(predicted, 2 * predicted)
    request = Request(
        "r", tuple(range(10)), Sampling(n=n), Stopping(max_tokens=max_tokens), estimate=estimate
    )
    return Job(request, "tenant", 30.0)


def worker(id: str, role: Role, **load: float) -> WorkerRecord:
    told = Load(0, 0, 1, 1, **load) if load else None  # type: ignore[arg-type]
    return WorkerRecord(id, 1, role, "a:1", "l", "m", 1, 1, 1, draining=False, load=told)


def test_a_request_costs_its_prefill_and_the_output_that_is_predicted():
    pace = Pace(GUESSES)
    assert pace.submission(job(20), None).cost == pytest.approx(2.0 + 20 * 0.5)
    assert pace.submission(job(20, n=3), None).cost == pytest.approx(2.0 + 60 * 0.5)
    assert pace.submission(job(20, max_tokens=4), None).cost == pytest.approx(2.0 + 4 * 0.5)


def test_without_a_prediction_an_output_has_the_mean_of_those_that_ended():
    pace = Pace(GUESSES)
    first = pace.submission(job(), None).cost
    for _ in range(1000):
        pace.ended(8)
    assert pace.submission(job(), None).cost == pytest.approx(2.0 + 8 * 0.5)
    assert first > 10


def test_measured_costs_replace_the_guesses_by_their_median():
    pace = Pace(GUESSES)
    silent = [worker("p0", Role.PREFILL), worker("d0", Role.DECODE)]
    assert not pace.workers(silent)
    prefill = [
        worker(f"p{i}", Role.PREFILL, prefill_base=b, prefill_per_token=b / 10)
        for i, b in enumerate((0.2, 0.3, 9.0))
    ]
    assert pace.workers([*prefill, worker("d0", Role.DECODE, token_seconds=0.25), *silent])
    assert (pace.prefill_base, pace.prefill_per_token) == (0.3, pytest.approx(0.03))
    assert pace.cost(job(20).request) == pytest.approx(0.3 + 10 * 0.03 + 20 * 0.25)


def test_a_cluster_without_prefill_workers_measures_on_its_decode_workers():
    pace = Pace(GUESSES)
    assert pace.workers([worker("d", Role.DECODE, prefill_base=0.4, prefill_per_token=0.01)])
    assert pace.prefill_base == 0.4


def test_only_predicted_srpt_gives_a_handicap_and_it_grows_with_the_work_and_the_load():
    assert Pace(GUESSES).submission(job(20), None).handicap == 0
    assert Pace(GUESSES).submission(job(20), None).predicted_tokens is None
    pace = Pace(SRPT)
    short, long = pace.submission(job(20), None), pace.submission(job(200), None)
    assert 0 < short.handicap < long.handicap
    assert long.predicted_tokens == 200
    pace.ages([1000.0, 3000.0], 0.0)
    assert pace.submission(job(20), None).handicap > 10 * short.handicap
    pace.ages([], 1.0)
    assert pace.submission(job(20), None).handicap == short.handicap


def test_kv_is_expected_for_the_allotment_and_never_for_more_than_may_come():
    pace = Pace(GUESSES)
    assert pace.kv_tokens(job(20).request) == 10 + 40
    assert pace.kv_tokens(job(20, n=2, max_tokens=15).request) == 10 + 30
    unpredicted = replace(job().request, stopping=Stopping(max_tokens=5))
    assert pace.kv_tokens(unpredicted) == 15
