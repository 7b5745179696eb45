from dataclasses import replace

from experiments.benches import Bench, bench, rotated, saturation
from experiments.compare import records, trials
from experiments.engines import Setup
from experiments.experiment import Run
from experiments.orders import BOUND, FCFS, LEARNED, ORACLE, UNPREDICTED, predicted
from experiments.rates import _crossing
from experiments.records import Results
from experiments.traffic import of_demo
from scheduling.order import make_policy
from scheduling.simulator.traffic import offline, poisson


def small(seeds: int = 2) -> tuple[Run, Bench]:
    run = Run("simulator", tuple(range(seeds)), quick=True)
    made = bench(run)
    return run, Bench(made.engine, made.traffic, made.scale, count=60, backlog=80)


def test_the_same_seeds_give_the_same_trials() -> None:
    first, second = (trials(*small(), UNPREDICTED[:1], 0.9) for _ in range(2))
    assert first == second


def test_all_orders_get_the_same_jobs() -> None:
    run, made = small()
    found = trials(run, made, (*UNPREDICTED, BOUND), 0.9)
    assert set(found) == {*(o.label for o in UNPREDICTED), ORACLE}
    assert all(len(each) == 2 for each in found.values())
    mean = {label: sum(m["mean_jct_s"] for m in each) for label, each in found.items()}
    assert mean[ORACLE] < mean[FCFS]


def test_an_order_is_measured_once() -> None:
    run, made = small()
    first = trials(run, made, UNPREDICTED[:1], 0.9)
    again = trials(run, made, UNPREDICTED[:2], 0.9)
    assert again[FCFS] is first[FCFS]


def test_the_rate_of_a_trial_follows_the_load() -> None:
    run, made = small()
    slow, fast = (trials(run, made, UNPREDICTED[:1], load)[FCFS] for load in (0.2, 2.0))
    assert slow[0]["makespan_s"] > 2 * fast[0]["makespan_s"]
    assert slow[0]["mean_jct_s"] < fast[0]["mean_jct_s"]


def test_saturation_is_what_an_engine_completes_of_a_backlog_of_the_trial_s_jobs() -> None:
    run, made = small()
    jobs = made.traffic.jobs(offline, made.count, 7)
    again = [replace(job, id=f"again-{job.id}") for job in jobs]
    fcfs = Setup(lambda cost: make_policy("fcfs", cost=cost))
    outcome = made.engine.serve([*jobs, *again], fcfs)
    twice = replace(made, backlog=made.count + 1)
    assert saturation(run, twice, made.traffic, 7) == outcome.completion_rate()


def test_records_have_ratios_to_first_come_first_served_and_to_the_oracle() -> None:
    run, made = small()
    found = trials(run, made, (*UNPREDICTED[:1], BOUND), 0.9)
    results = Results(records("B1", run, found, load=0.9))
    values = {p: results.value(policy=p, metric="mean_jct_s") for p in (FCFS, ORACLE)}
    quotient = results.value(policy=FCFS, metric="mean_jct_s_vs_oracle")
    assert quotient is not None
    assert values[FCFS] is not None
    assert values[ORACLE] is not None
    assert abs(quotient - values[FCFS] / values[ORACLE]) < 1e-9
    assert results.value(policy=FCFS, metric="mean_jct_s_vs_fcfs") == 1.0


def test_learned_estimates_are_made_before_the_length_is_known() -> None:
    """A predictor that has seen a question knows its answer; one that has not does not."""
    run = Run("simulator", (0,), quick=True)
    jobs = of_demo().jobs(poisson(5.0), 50, 3)
    source = predicted().feed(run, of_demo(), jobs, 0)
    estimates = [job.estimate for job in source.start()]
    assert all(estimate is not None for estimate in estimates)
    assert [job.estimate for job in jobs] == [None] * 50


def test_the_learned_order_runs() -> None:
    run, made = small(1)
    assert LEARNED in trials(run, made, [predicted()], 0.9)


def test_rotation_begins_with_another_item_each_time() -> None:
    assert [rotated("abc", by)[0] for by in range(4)] == ["a", "b", "c", "a"]


def test_a_crossing_lies_between_the_loads_around_it() -> None:
    assert _crossing((1.0, 2.0), (0.1, 0.4), 0.2) == 1.5
    assert _crossing((1.0, 2.0), (0.1, 0.4), 0.5) == 2.0
    assert _crossing((1.0, 2.0), (0.3, 0.4), 0.2) == 1.0
