from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduling.simulator.stride import Stride

_STRIDES = st.builds(Stride, st.floats(1e-4, 1.0), st.one_of(st.just(0.0), st.floats(1e-9, 1e-2)))


@given(_STRIDES, st.integers(1, 400))
def test_the_closed_form_is_the_sum(stride: Stride, passes: int) -> None:
    each = [stride.first + i * stride.growth for i in range(passes)]
    assert stride.seconds(passes) == pytest.approx(sum(each))
    assert stride.last(passes) == pytest.approx(each[-1])
    ends = stride.ends(2.0, passes)
    assert ends[-1] == pytest.approx(2.0 + sum(each))
    assert ends[0] == pytest.approx(2.0 + each[0])


@given(_STRIDES, st.floats(0.0, 100.0))
def test_the_pass_under_way_is_the_last_that_has_begun(stride: Stride, seconds: float) -> None:
    passes = stride.begun_by(seconds)
    assert stride.seconds(passes) >= seconds
    assert passes == 1 or stride.seconds(passes - 1) < seconds


def test_at_a_boundary_the_pass_that_ends_there_is_under_way() -> None:
    stride = Stride(0.5, 0.0)
    assert stride.begun_by(1.0) == 2
    assert stride.begun_by(0.0) == 1
