from __future__ import annotations

import pytest

from baton.types import Request, Sampling, Stopping
from scheduling.mlfq import Mlfq
from scheduling.sequence import Sequence

MLFQ = Mlfq(levels=4, quantum=1.0, ratio=2.0, promote_after=10.0)


def sequence() -> Sequence:
    return Sequence.start(Request("r", (1,), Sampling(), Stopping(4)), 0, now=0.0)


def test_quanta_grow_by_the_ratio_and_the_last_level_has_no_end() -> None:
    assert [MLFQ.quantum_of(level) for level in range(4)] == [1.0, 2.0, 4.0, float("inf")]


@pytest.mark.parametrize(
    ("cost", "level"), [(0.0, 0), (1.0, 0), (1.1, 1), (2.0, 1), (3.9, 2), (4.1, 3), (1e9, 3)]
)
def test_a_sequence_joins_the_first_level_that_covers_its_first_iteration(
    cost: float, level: int
) -> None:
    assert MLFQ.first_level(cost) == level


def test_a_spent_quantum_demotes_by_one_level_and_starts_a_new_one() -> None:
    s = sequence()
    MLFQ.charge(s, 0.6, now=1.0)
    assert (s.level, s.served) == (0, 0.6)
    MLFQ.charge(s, 0.6, now=2.0)
    assert (s.level, s.served) == (1, 0.0)
    MLFQ.charge(s, 1.9, now=4.0)
    assert s.level == 1
    MLFQ.charge(s, 0.1, now=5.0)
    assert s.level == 2


def test_nothing_sinks_below_the_last_level() -> None:
    s = sequence()
    for step in range(100):
        MLFQ.charge(s, 50.0, now=float(step))
    assert s.level == 3


def test_the_starved_rise_to_the_top_with_a_fresh_quantum() -> None:
    s = sequence()
    s.level, s.served, s.waiting_since = 3, 2.5, 20.0
    MLFQ.promote([s], now=29.9)
    assert s.level == 3
    MLFQ.promote([s], now=30.0)
    assert (s.level, s.served, s.waiting_since) == (0, 0.0, 30.0)


def test_whoever_runs_does_not_starve() -> None:
    s = sequence()
    s.level = 2
    MLFQ.charge(s, 0.1, now=25.0)
    MLFQ.promote([s], now=30.0)
    assert s.level == 2
