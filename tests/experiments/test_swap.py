"""Where a promise breaks."""

from __future__ import annotations

import pytest

from experiments.swap import crossing


def test_crossing_lies_between_the_last_rate_below_and_the_first_above() -> None:
    assert crossing([1.0, 2.0, 4.0], [0.1, 0.2, 0.4], 0.3) == pytest.approx(3.0)


def test_rates_that_were_not_tried_after_the_break_are_not_needed() -> None:
    assert crossing([1.0, 2.0, 4.0], [0.1, 0.5], 0.3) == pytest.approx(1.5)


def test_a_promise_never_broken_gives_the_highest_rate_tried() -> None:
    assert crossing([1.0, 2.0], [0.1, 0.2], 0.3) == 2.0


def test_a_promise_broken_at_once_gives_the_lowest_rate() -> None:
    assert crossing([1.0, 2.0], [0.9], 0.3) == 1.0
