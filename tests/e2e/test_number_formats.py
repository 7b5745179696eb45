"""Clusters whose weights or KV are in fewer bits: hand-offs and preemption as in any other format.

Where only KV is, tokens are transformers' own but for draws: it decides otherwise where two logits
are near each other (tests/engine/test_swapped_generation.py says how near).
"""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from tests.e2e.conftest import Named, Run
from tests.e2e.test_exactness import generate
from tests.engine.conftest import COMPILED, VOCAB
from tests.engine.test_swapped_generation import ROUNDING

BACKENDS = ["torch", pytest.param("native", marks=COMPILED)]
SCALED = [
    *((kv, "torch") for kv in ("int8", "fp8")),
    pytest.param("int8", "native", marks=COMPILED),
]
TOKENS = 8


def prompts(lengths: range) -> list[list[int]]:
    """Random ones of these lengths."""
    chooser = random.Random(5)
    return [[chooser.randrange(3, VOCAB) for _ in range(length)] for length in lengths]


async def computed(
    run_stack: Run, model: Any, asked: list[list[int]], tokens: int, **settings: Any
) -> tuple[float, Any]:
    """Have all answered at once. Returns how many tokens the decode worker computed for them, and
    the cluster that it was."""
    outputs, step_tokens, stack = await answered(run_stack, model, asked, tokens, **settings)
    rounding = ROUNDING["fp8" if settings["kv_dtype"] == "fp8" else "int8"]
    for prompt, output in zip(asked, outputs, strict=True):
        model.assert_generates(prompt, output, rounding=rounding)
    return step_tokens, stack


async def answered(
    run_stack: Run, model: Any, asked: list[list[int]], tokens: int, **settings: Any
) -> tuple[list[list[int]], float, Any]:
    """The same with the answers, whatever they are."""
    async with run_stack(model.path, dtype="float32", **settings) as stack:
        before = stack.decoded("step_tokens_sum")
        async with stack.client() as client:
            work = (generate(client, prompt, max_tokens=tokens) for prompt in asked)
            outputs = [output[0] for output in await asyncio.gather(*work)]
        await stack.quiet()
    assert [len(output) for output in outputs] == [tokens] * len(asked)
    return outputs, stack.decoded("step_tokens_sum") - before, stack


@pytest.mark.parametrize(("kv_dtype", "backend"), SCALED)
async def test_kv_with_scales_is_handed_over(
    kv_dtype: str, backend: str, run_stack: Run, named: Named
) -> None:
    model, _ = named("llama")
    asked = prompts(range(20, 60, 8))
    tokens, _ = await computed(
        run_stack, model, asked, TOKENS, kv_dtype=kv_dtype, attention_backend=backend
    )
    assert tokens == len(asked) * (TOKENS - 1)  # all but the first, which the other worker sampled


@COMPILED
@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
async def test_workers_with_weights_in_int4_hand_over(
    kv_dtype: str, run_stack: Run, named: Named
) -> None:
    model, _ = named("llama")
    asked = prompts(range(20, 60, 8))
    settings = {"quantization": "int4", "kv_dtype": kv_dtype}
    apart, computed_apart, _ = await answered(run_stack, model, asked, TOKENS, **settings)
    alone, computed_alone, _ = await answered(
        run_stack, model, asked, TOKENS, prefill=0, **settings
    )
    assert apart == alone
    assert computed_apart == len(asked) * (TOKENS - 1)
    assert computed_alone == computed_apart + sum(map(len, asked))


@COMPILED
@pytest.mark.parametrize(("prefills", "decodes"), [("torch", "native"), ("native", "torch")])
async def test_kv_in_int8_goes_from_one_backend_to_the_other(
    prefills: str, decodes: str, run_stack: Run, named: Named
) -> None:
    model, _ = named("llama")
    asked = prompts(range(20, 60, 8))
    settings = {"kv_dtype": "int8", "attention_backend": prefills}
    tokens, _ = await computed(
        run_stack, model, asked, TOKENS, decode_settings={"attention_backend": decodes}, **settings
    )
    assert tokens == len(asked) * (TOKENS - 1)


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
async def test_workers_whose_kv_differs_hand_nothing_over_and_serve_all_the_same(
    kv_dtype: str, run_stack: Run, named: Named
) -> None:
    model, _ = named("llama")
    asked = prompts(range(20, 60, 8))
    other = {"auto": "int8", "int8": "auto"}[kv_dtype]
    tokens, _ = await computed(
        run_stack, model, asked, TOKENS, kv_dtype=other, decode_settings={"kv_dtype": kv_dtype}
    )
    assert tokens == sum(map(len, asked)) + len(asked) * (TOKENS - 1)  # prompts, too


@pytest.mark.parametrize("preemption", ["swap", "recompute"])
@pytest.mark.parametrize("backend", BACKENDS)
async def test_preempted_sequences_go_on_in_int8(
    backend: str, preemption: str, run_stack: Run, named: Named
) -> None:
    model, _ = named("llama")
    scarce = {"kv_blocks": 24, "admission": "paged", "preemption": preemption}
    _, stack = await computed(
        run_stack,
        model,
        prompts(range(10, 34, 4)),
        24,
        kv_dtype="int8",
        block_size=4,
        attention_backend=backend,
        decode_settings=scarce | {"host_kv_memory": 2**18 if preemption == "swap" else 0},
    )
    assert stack.decoded("preemptions_total", kind=preemption) > 0
