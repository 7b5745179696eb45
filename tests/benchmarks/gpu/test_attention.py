"""What the attention benchmark counts, and the shares that it makes of it."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu import attention
from benchmarks.gpu.attention import Case, Shape, case, measure
from benchmarks.gpu.ceilings import Ceilings

SHAPE = Shape(heads=4, kv_heads=2, head_dim=16)
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("dtype", "head_bytes"),
    [(torch.bfloat16, 32), (torch.int8, 20), (torch.float8_e4m3fn, 20)],
)
def test_bytes_are_those_of_the_contexts_the_queries_and_the_results(
    dtype: torch.dtype, head_bytes: int
) -> None:
    found = case("a", SHAPE, [(99, 1), (49, 1)], dtype, CPU)
    assert found.moved == 150 * 2 * 2 * head_bytes + 2 * (2 * 4 * 16 * 2)


def test_operations_are_those_of_the_pairs_that_see_each_other() -> None:
    found = case("a", SHAPE, [(10, 5), (0, 1)], torch.bfloat16, CPU)
    pairs = sum(range(11, 16)) + 1
    assert found.operations == pairs * 4 * (16 + 16) * 2


def test_shares_are_of_the_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "seconds", lambda call, device: 0.5)
    made = Case("a", torch.Tensor, moved=300, operations=2000)
    (found,) = measure([made], Ceilings(read=1000.0, bf16=8000.0, fp8=0.0), CPU)
    assert (found.seconds, found.of_bandwidth, found.of_product) == (0.5, 0.6, 0.5)
