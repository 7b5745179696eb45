from __future__ import annotations

import pytest

from baton.rate import Rate


def test_one_look_says_nothing() -> None:
    assert Rate().update(1000, now=7.0) == 0.0


def test_a_steady_count_has_its_rate() -> None:
    rate = Rate()
    assert [rate.update(10 * i, now=i / 2) for i in range(4)] == [0.0, 20.0, 20.0, 20.0]


def test_what_is_older_than_the_window_is_forgotten() -> None:
    rate = Rate(window=5.0)
    for second in range(10):
        rate.update(100 * second, now=float(second))
    rates = [rate.update(900, now=float(second)) for second in range(10, 15)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(0.0)
