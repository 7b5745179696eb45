"""Requests over gRPC that begin as others did: less is computed and moved, and tokens are right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from scheduling.simulator.replay import replay
from tests.e2e.answers import ask
from tests.e2e.conftest import Named, Run
from tests.engine.conftest import COMPILED
from tests.engine.test_swapped_generation import ROUNDING

PROMPT = [3 + i * 7 % 190 for i in range(37)]
FORMATS = [
    ("torch", "auto"),
    ("torch", "fp8"),
    pytest.param("native", "auto", marks=COMPILED),
    pytest.param("native", "int8", marks=COMPILED),
]


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize(("backend", "kv_dtype"), FORMATS)
async def test_the_turns_of_a_conversation_are_computed_and_handed_over_once(
    backend: str, kv_dtype: str, transport: str, run_stack: Run, named: Named, tmp_path: Path
) -> None:
    model, _ = named("llama")
    files = [tmp_path / "prefill.jsonl", tmp_path / "decode.jsonl"]
    prompt = PROMPT
    async with run_stack(
        model.path,
        block_size=4,
        dtype="float32",
        kv_dtype=kv_dtype,
        attention_backend=backend,
        record_run=files[0],
        gateway_settings={"local_prefill_tokens": 0},
        decode_settings={"kv_transports": transport, "record_run": files[1]},
    ) as stack:
        async with stack.client() as client:
            for turn, cached in enumerate([0, 36, 48]):
                before = stack.decoded("prefix_hit_tokens_total")
                answer = await ask(client, prompt, max_tokens=9)
                model.assert_generates(prompt, answer.ids[0], rounding=ROUNDING[kv_dtype])
                assert answer.usage.cached_tokens == cached
                # The decode worker has the last answer, too, but for its last token.
                found = stack.decoded("prefix_hit_tokens_total") - before
                assert found == (0 if turn == 0 else (len(prompt) - 4) // 4 * 4)
                prompt = [*prompt, *answer.ids[0], 100 + turn, 60, 61]
            assert len(prompt) == 37 + 3 * 12
        await stack.quiet()
    for file in files:
        result = replay(file.read_text().splitlines())
        assert result.difference is None
        assert result.plans > 2


async def test_a_prefix_is_found_by_its_tenant_only_and_if_that_is_wanted(
    run_stack: Run, named: Named
) -> None:
    model, _ = named("llama")
    bypass, salted = {"bypass_prefix_cache": True}, {"salt": "else"}
    asked: list[tuple[int, dict[str, Any]]] = [
        (0, {}),
        (36, {}),
        (36, {"user": "default"}),
        (0, {"user": "else"}),
        (36, {"user": "else"}),
        (0, {"cache": salted}),
        (36, {"cache": salted}),
        (0, {"cache": bypass}),
        (0, {"prompt_logprobs": 1}),
        (36, {"n": 2}),
    ]
    async with run_stack(model.path, prefill=0, block_size=4, dtype="float32") as stack:
        async with stack.client() as client:
            for cached, options in asked:
                answer = await ask(client, PROMPT, max_tokens=5, **options)
                assert answer.usage.cached_tokens == cached, options
                for output in answer.ids:
                    model.assert_generates(PROMPT, output)
            unary = await client.generate_unary(PROMPT, max_tokens=3)
            assert unary.message.accepted.cached_tokens == 36
        await stack.quiet()


async def test_it_can_be_turned_off(run_stack: Run, named: Named) -> None:
    model, _ = named("llama")
    async with run_stack(model.path, block_size=4, dtype="float32", prefix_cache=False) as stack:
        async with stack.client() as client:
            answers = [await ask(client, PROMPT, max_tokens=5) for _ in range(2)]
        await stack.quiet()
    assert [answer.usage.cached_tokens for answer in answers] == [0, 0]
    assert stack.decoded("prefix_lookup_tokens_total") == 0


async def test_a_model_whose_kv_depends_on_the_length_of_the_prompt_has_none(
    run_stack: Run, named: Named, caplog: pytest.LogCaptureFixture
) -> None:
    """Past the length that it was trained with; up to there it has one as others."""
    model, _ = named("rope-dynamic")
    for most, cached in ((128, [0, 0]), (32, [0, 16])):
        settings = {"block_size": 4, "dtype": "float32", "max_context": most}
        async with run_stack(model.path, prefill=0, **settings) as stack:
            async with stack.client() as client:
                answers = [await ask(client, PROMPT[:20], max_tokens=5) for _ in range(2)]
            await stack.quiet()
        assert [answer.usage.cached_tokens for answer in answers] == cached
        for answer in answers:
            model.assert_generates(PROMPT[:20], answer.ids[0])
    assert any("no prefix cache" in message for message in caplog.messages)
