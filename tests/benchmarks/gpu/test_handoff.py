"""The hand-off's benchmark, from a process to another."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu.handoff import WAYS, Size, compare
from engine.gpu.kernels.launch import interpreted


@pytest.mark.cluster
@pytest.mark.skipif(not interpreted(), reason="kernels run on the GPU here")
def test_both_ways_are_measured() -> None:
    cpu = torch.device("cpu")
    found = compare(cpu, cpu, rounds=1, size=Size(layers=1, blocks=2))
    assert found.bytes == 2 * 2**16
    assert set(found.all_blocks) == set(found.one_block) == set(WAYS)
    assert all(seconds > 0 for seconds in (*found.all_blocks.values(), *found.one_block.values()))
    assert found.ratio > 0
