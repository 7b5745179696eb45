"""KV in int8: both backends keep the same bytes, read each other's, and stay near float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from baton.types import Request, Sampling, Stopping
from engine.attention.plane import Plane
from engine.load import load_executor
from engine.model.batch import build_batch
from engine.model.runner import TorchExecutor
from engine.native.library import Isa, load
from scheduling.plan import Chunk, StepPlan
from scheduling.sequence import Sequence
from tests.engine.conftest import COMPILED

TEXT = [3 + (i * i * 7) % 190 for i in range(45)]
_LIBRARY = load()
BACKENDS = ["torch"] + [i.name.lower() for i in Isa if _LIBRARY is not None and i <= _LIBRARY.isa]


def start(path: Any, backend: str, kv_dtype: str = "int8", **options: Any) -> TorchExecutor:
    """An executor on torch, or on an instruction set of the compiled backend."""
    if backend == "torch":
        options["attention_backend"] = "torch"
    else:
        options |= {"attention_backend": "native", "instruction_set": backend}
    sizes = {"threads": 1, "kv_blocks": 8, "block_size": 16}
    return load_executor(path, kv_dtype=kv_dtype, **sizes, **options)


def logits(executor: TorchExecutor, tokens: list[int], computed: int = 0) -> torch.Tensor:
    """Logits after the last token; the first `computed` tokens are in the pool already."""
    request = Request("r", tuple(tokens), Sampling(), Stopping(1), logprobs=0)
    sequence = Sequence.start(request, 0, now=0.0)
    sequence.blocks = [5, 2, 7]
    chunk = Chunk(sequence, computed, len(tokens) - computed, sample=True)
    batch, _ = build_batch(StepPlan((chunk,)), block_size=16)
    with torch.inference_mode():
        return executor.model.forward(batch, executor.pool).logits[0].float().clone()


def distance(found: torch.Tensor, exact: torch.Tensor) -> float:
    """As a share of the spread of the exact logits."""
    exact = exact.detach()
    return float((found - exact).norm() / (exact - exact.mean()).norm())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["llama", "llama-biases-tied", "qwen3", "mistral-window"])
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [({"dtype": "float32"}, 0.05), ({"dtype": "bfloat16"}, 0.08)],
    ids=["float32", "bfloat16"],
)
def test_logits_stay_near_those_of_float32(
    name: str, backend: str, options: dict[str, str], tolerance: float, tiny: Callable[..., Any]
) -> None:
    model = tiny(name)
    exact = model.reference(torch.tensor([TEXT])).logits[0, -1]
    executor = start(model.path, backend, **options)
    found = logits(executor, TEXT)
    assert 0 < distance(found, exact) < tolerance
    again = start(model.path, backend, **options)
    logits(again, TEXT[:-1])
    assert distance(logits(again, TEXT, computed=44), exact) < tolerance


@pytest.mark.parametrize("name", ["opt", "llama-narrow-heads"])
def test_models_that_only_torch_runs_have_it_too(name: str, tiny: Callable[..., Any]) -> None:
    model = tiny(name)
    exact = model.reference(torch.tensor([TEXT])).logits[0, -1]
    assert 0 < distance(logits(start(model.path, "torch"), TEXT), exact) < 0.05


@COMPILED
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_both_backends_round_the_same_keys_and_values_alike(
    backend: str, tiny: Callable[..., Any]
) -> None:
    path = tiny("llama").path
    ours, theirs = start(path, backend, dtype="float32"), start(path, "torch", dtype="float32")
    assert ours.pool.geometry == theirs.pool.geometry
    for executor in (ours, theirs):
        logits(executor, TEXT)
    blocks = torch.tensor([5, 2, 7])
    for mine, its in zip(Plane.pair(ours.pool, 0), Plane.pair(theirs.pool, 0), strict=True):
        assert mine.scales is not None
        assert its.scales is not None
        assert mine.scales.any()
        torch.testing.assert_close(mine.scales, its.scales, rtol=1e-5, atol=0)
        different = (mine.numbers.int() - its.numbers.int()).abs()
        assert different.max() <= 1
        assert different.count_nonzero() < 0.01 * mine.read(blocks, torch.float32).numel()


@COMPILED
@pytest.mark.parametrize(("writes", "reads"), [("torch", "native"), ("native", "torch")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_prompt_of_one_backend_goes_on_in_the_other(
    writes: str, reads: str, dtype: str, tiny: Callable[..., Any]
) -> None:
    model = tiny("llama")
    exact = model.reference(torch.tensor([TEXT])).logits[0, -1]
    one, other = (
        load_executor(
            model.path, threads=1, kv_blocks=8, kv_dtype="int8", dtype=dtype, attention_backend=name
        )
        for name in (writes, reads)
    )
    logits(one, TEXT[:-1])
    for block in (5, 2, 7):
        other.pool.block(block)[:] = one.pool.block(block)
    assert distance(logits(other, TEXT, computed=44), exact) < 0.05


def test_a_pool_of_the_same_memory_holds_more_blocks(tiny: Callable[..., Any]) -> None:
    path = tiny("llama").path
    wide, narrow = (
        load_executor(path, threads=1, dtype="bfloat16", kv_dtype=kv, kv_memory=2**20)
        for kv in ("auto", "int8")
    )
    heads = wide.pool.block_bytes // (2 * 16)
    assert narrow.pool.block_bytes == heads * (16 + 4)  # head_dim 16
    assert narrow.fingerprint == wide.fingerprint
