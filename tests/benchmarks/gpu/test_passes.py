"""Passes and requests are run as a worker would run them, on a tiny model."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from benchmarks.gpu import passes, serving
from benchmarks.gpu.ceilings import Ceilings
from benchmarks.gpu.models import SHAPES, Sizes, config_of, executor
from benchmarks.gpu.work import jobs
from engine.bench.work import ModelCount
from engine.gpu.executor import GpuExecutor

LIMITS = Ceilings(read=1e9, bf16=1e9, fp8=0.0)


@pytest.fixture(scope="module")
def tiny() -> Iterator[GpuExecutor]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with np.errstate(all="ignore"):
        made = executor("tiny", device, Sizes(4, 4, 2), dtype=torch.float32)
        yield made
        made.close()


@pytest.mark.parametrize("shape", [passes.Shape(2, 10), passes.Shape(2, prompt=2)])
def test_shares_are_what_was_counted_over_what_was_timed(
    tiny: GpuExecutor, shape: passes.Shape
) -> None:
    count = ModelCount.of(config_of(SHAPES["tiny"]()), "float32", "float32")
    found = passes.measure(tiny, shape, count, LIMITS, steps=1)
    work = count.work(shape.parts)
    assert found.mbu * found.seconds * LIMITS.read == pytest.approx(work.bytes)
    assert found.mfu * found.seconds * LIMITS.bf16 == pytest.approx(work.operations)
    assert (found.gap is None) == bool(shape.prompt)


def test_every_token_that_is_asked_for_is_made(tiny: GpuExecutor) -> None:
    taken = tiny.taken
    assert serving.baton(tiny, jobs(2, 100, prompt=2, output=3)) > 0
    assert tiny.taken > taken  # passes were begun before they were planned
