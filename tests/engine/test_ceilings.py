"""The machine's ceilings are measured, not assumed."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from engine import ceilings
from engine.ceilings import Ceilings, measure


def _ceilings() -> Ceilings:
    return Ceilings(
        threads=2,
        working_set=2**20,
        read_bandwidth=10.0,
        fp32_flops=100.0,
        bf16_flops=200.0,
        int8_ops=400.0,
    )


def test_a_step_takes_as_long_as_the_slower_of_reading_and_computing() -> None:
    found = _ceilings()
    assert found.floor(read_bytes=50, operations=100, precision="bf16") == 5.0
    assert found.floor(read_bytes=50, operations=2000, precision="bf16") == 10.0
    assert found.floor(read_bytes=0, operations=2000, precision="fp32") == 20.0
    assert found.floor(read_bytes=0, operations=2000, precision="int8") == 5.0


def test_of_two_measurements_the_better_of_each_ceiling_counts() -> None:
    other = replace(_ceilings(), read_bandwidth=5.0, int8_ops=800.0)
    assert _ceilings().or_better(other) == replace(_ceilings(), int8_ops=800.0)


def test_measuring_gives_every_ceiling_and_leaves_torchs_threads_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ceilings, "_SHAPES", ((64, 64, 64),))
    monkeypatch.setattr(ceilings, "_SECONDS", 0.0)
    before = torch.get_num_threads()
    found = measure(1, working_set=2**24)
    assert torch.get_num_threads() == before
    assert (found.threads, found.working_set) == (1, 2**24)
    speeds = (found.read_bandwidth, found.fp32_flops, found.bf16_flops, found.int8_ops)
    assert all(math.isfinite(speed) and speed > 1e6 for speed in speeds)


def test_every_product_multiplies_what_it_says() -> None:
    for product in (ceilings._fp32, ceilings._bf16, ceilings._packed, ceilings._int8):
        result = product(32, 48, 16)()
        assert isinstance(result, torch.Tensor)
        assert result.shape == (32, 48)
