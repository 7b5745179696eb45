"""Values of seeds become records."""

from __future__ import annotations

import pytest

from experiments.collect import Point, Samples


def test_a_record_has_the_mean_and_the_number_of_seeds() -> None:
    samples = Samples("B0", "simulator")
    for value in (1.0, 2.0, 3.0):
        samples.add(Point("fcfs", 0.9), jct_s=value)
    (record,) = samples.records()
    assert (record.policy, record.load, record.metric) == ("fcfs", 0.9, "jct_s")
    assert (record.value, record.seeds) == (2.0, 3)
    assert record.ci_low < 2.0 < record.ci_high


def test_a_comparison_is_made_seed_by_seed_and_keeps_the_swept_axis() -> None:
    samples = Samples("B0", "simulator")
    for value in (1.0, 5.0):
        samples.add(Point("slow"), gap_s=2 * value)
        samples.add(Point("fast", axis="budget", at=8), gap_s=value)
    samples.compare(Point("slow"), Point("fast", axis="budget", at=8), "gap_s")
    record = samples.records()[-1]
    assert (record.policy, record.metric) == ("slow / fast", "gap_s_ratio")
    assert (record.axis, record.at) == ("budget", 8)
    assert record.value == record.ci_low == record.ci_high == pytest.approx(2.0)


def test_what_was_not_measured_cannot_be_compared() -> None:
    samples = Samples("B0", "simulator")
    samples.add(Point("a"), x=1.0)
    with pytest.raises(KeyError):
        samples.compare(Point("a"), Point("b"), "x")
