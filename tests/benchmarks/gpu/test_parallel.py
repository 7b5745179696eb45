"""Shards of a random model run the passes that one device runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.gpu import parallel
from benchmarks.gpu.models import Sizes
from benchmarks.gpu.passes import Shape


def test_passes_are_timed_on_one_device_and_on_several() -> None:
    on_gpus = torch.cuda.is_available()
    if on_gpus and torch.cuda.device_count() < 2:
        pytest.skip("there are no two GPUs")
    wanted = [Shape(1, 4), Shape(1, prompt=2)]
    device = torch.device("cuda:0" if on_gpus else "cpu")
    with np.errstate(all="ignore"):
        found = parallel.compare("tiny", 2, wanted, device, Sizes(2, 2, 1), torch.float32, 1, 1)
    assert [each.shape for each in found] == wanted
    for each in found:
        assert min(each.one + each.several) > 0
        assert each.ratio > 0
