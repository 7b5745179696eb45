import numpy as np
import pytest

from experiments.stats import interval, ratio, student_t95


def test_the_interval_of_three_seeds_is_students() -> None:
    found = interval([1.0, 2.0, 3.0])
    assert (found.mean, found.count) == (2.0, 3)
    assert found.high - found.mean == pytest.approx(4.303 / np.sqrt(3), rel=1e-3)
    assert found.mean - found.low == pytest.approx(found.high - found.mean)


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    drawn = [interval(rng.normal(5.0, 2.0, 4).tolist()) for _ in range(2000)]
    covered = np.mean([each.low <= 5.0 <= each.high for each in drawn])
    assert 0.93 <= covered <= 0.97


def test_one_seed_has_no_spread() -> None:
    found = interval([4.0])
    assert (found.low, found.mean, found.high, found.count) == (4.0, 4.0, 4.0, 1)


def test_no_values_are_refused() -> None:
    with pytest.raises(ValueError, match="no values"):
        interval([])


def test_a_ratio_over_paired_seeds_is_surer_than_either_mean() -> None:
    under = [1.0, 10.0, 100.0]
    found = ratio([2.0, 20.0, 200.0], under)
    assert found.mean == pytest.approx(2.0)
    assert found.high - found.low == pytest.approx(0.0, abs=1e-9)
    assert interval(under).high - interval(under).low > 100


def test_a_ratio_that_varies_has_an_interval() -> None:
    found = ratio([2.0, 5.0, 9.0, 8.0], [1.0, 2.0, 3.0, 4.0])
    assert found.mean == pytest.approx(2.4)
    assert found.low < 2.4 < found.high


def test_a_ratio_needs_the_same_seeds() -> None:
    with pytest.raises(ValueError, match="same seeds"):
        ratio([1.0], [1.0, 2.0])


def test_t_falls_towards_the_normal_point() -> None:
    points = [student_t95(freedom) for freedom in (1, 5, 30, 31, 60, 1000)]
    assert points == sorted(points, reverse=True)
    assert points[3] == pytest.approx(2.0395, abs=2e-3)
    assert points[-1] == pytest.approx(1.962, abs=2e-3)
