"""Predictions of a chosen accuracy."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.predictor import CLASSES, accurate


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_the_right_class_is_named_as_often_as_wanted(share: float) -> None:
    rng, lengths = np.random.default_rng(0), np.random.default_rng(1).integers(1, 2048, 2000)
    estimate = accurate(share)
    right = 0
    for length in lengths.tolist():
        made = estimate(rng, length, 2048)
        assert made is not None
        distance = abs(CLASSES.of(made.tokens) - CLASSES.of(length))
        assert distance <= 1
        right += distance == 0
    assert right / len(lengths) == pytest.approx(share, abs=0.05)


def test_an_allotment_is_the_upper_end_of_the_class() -> None:
    made = accurate(1.0)(np.random.default_rng(0), 300, 2048)
    assert made is not None
    assert made.allotment == CLASSES.edges[CLASSES.of(300)] >= 300
