"""Whole passes in the compiled library: which models it takes, and in which formats.

That its tokens are transformers' own is in tests/engine/test_exactness.py, beside torch's.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from baton.errors import ConfigError
from baton.types import Request, Sampling, Stopping
from engine.attention.contract import Batch
from engine.load import load_executor
from engine.model.batch import build_batch
from engine.model.runner import TorchExecutor
from engine.native import select
from engine.native.library import Isa, Library, load
from engine.native.model import CompiledLlama
from scheduling.plan import Chunk, StepPlan
from scheduling.sequence import Sequence
from tests.engine.conftest import COMPILED, CONFIGS, VOCAB
from tests.engine.native.conftest import TeamOf
from tests.engine.native.test_gemm import packed_int4

PROMPT = [5, 17, 3, 44, 101, 9, 120, 7]
_LIBRARY = load()
ISAS = [isa for isa in Isa if _LIBRARY is not None and isa <= _LIBRARY.isa]


def logits_of(executor: TorchExecutor, *prompts: list[int]) -> torch.Tensor:
    """Logits after each prompt, [prompts, vocab], from one pass."""
    with torch.inference_mode():
        output = executor.model.forward(batch_of(prompts, logprobs=0), executor.pool)
    return output.logits.clone()


def best_of(executor: TorchExecutor, *prompts: list[int]) -> list[int]:
    """The best token after each prompt, without logits."""
    with torch.inference_mode():
        output = executor.model.forward(batch_of(prompts, logprobs=None), executor.pool)
    assert output.logits.shape == (0, VOCAB)
    best: list[int] = output.best.tolist()
    return best


def batch_of(prompts: tuple[list[int], ...], logprobs: int | None) -> Batch:
    """One pass over whole prompts."""
    chunks = []
    for index, prompt in enumerate(prompts):
        request = Request(f"r{index}", tuple(prompt), Sampling(), Stopping(1), logprobs=logprobs)
        sequence = Sequence.start(request, 0, now=0.0)
        sequence.blocks = [2 * index, 2 * index + 1]
        chunks.append(Chunk(sequence, 0, len(prompt), sample=True))
    return build_batch(StepPlan(tuple(chunks)), block_size=16)[0]


@pytest.fixture
def directory(tiny: Callable[..., Any], tmp_path: Path) -> Path:
    """A copy of the tiny Llama, to change."""
    return Path(shutil.copytree(tiny("llama").path, tmp_path / "model"))


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the weights."""
    file = directory / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


# -- Who runs it ---------------------------------------------------------------------------


@COMPILED
@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen2", "qwen3", "rope-dynamic"])
def test_the_llama_family_is_taken_by_itself(
    name: str, tiny: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        executor = load_executor(tiny(name).path, threads=2)
    assert isinstance(executor.model, CompiledLlama)
    assert "compiled backend: " in caplog.text
    assert ", 2 threads, float32 weights" in caplog.text


@COMPILED
@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("opt", {}, "OPTForCausalLM is not of the Llama family"),
        ("llama-narrow-heads", {}, "head_dim 8 is no multiple of 16"),
        ("llama", {"dtype": "float16"}, "--dtype float16"),
        ("llama", {"attention_backend": "torch"}, "--attention-backend torch"),
        ("llama", {"kv_dtype": "fp8"}, "--kv-dtype fp8"),
    ],
)
def test_torch_runs_the_others_and_one_line_says_why(
    name: str,
    options: dict[str, str],
    reason: str,
    tiny: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        executor = load_executor(tiny(name).path, threads=1, **options)
    assert not isinstance(executor.model, CompiledLlama)
    assert caplog.messages == [f"compiled backend: {reason}; torch runs the step"]
    if "attention_backend" not in options:
        with pytest.raises(ConfigError, match=f"--attention-backend native: .*{reason}"):
            load_executor(tiny(name).path, **{"attention_backend": "native"} | options)
    with pytest.raises(ConfigError, match=f"--quantization int8: .*{reason}"):
        load_executor(tiny(name).path, quantization="int8", **options)


def test_torch_runs_everything_where_no_library_was_built(
    tiny: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(select, "load", lambda: None)
    with caplog.at_level(logging.INFO):
        load_executor(tiny("llama").path, threads=1)
    assert caplog.messages == ["compiled backend: not built here; torch runs the step"]
    with pytest.raises(ConfigError, match="not built here"):
        load_executor(tiny("llama").path, attention_backend="native")


# -- Formats -------------------------------------------------------------------------------


@COMPILED
@pytest.mark.parametrize(
    ("stored", "runs"),
    [
        (torch.float32, "float32"),
        (torch.bfloat16, "bfloat16"),
        (torch.float16, "bfloat16"),
        (torch.float64, "float32"),
    ],
)
def test_a_checkpoint_runs_in_the_nearest_format_that_the_library_has(
    stored: torch.dtype, runs: str, save: Callable[..., Any], tmp_path: Path
) -> None:
    save(CONFIGS["llama"](), tmp_path, dtype=stored)
    executor = load_executor(tmp_path, threads=1)
    assert isinstance(executor.model, CompiledLlama)
    assert executor.pool.geometry.dtype == runs


@COMPILED
@pytest.mark.parametrize("name", ["llama", "llama-biases-tied", "qwen3", "mistral-window"])
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"dtype": "bfloat16"}, 0.05),
        ({"dtype": "float32", "quantization": "int8"}, 0.08),
        ({"dtype": "bfloat16", "quantization": "int8"}, 0.08),
    ],
    ids=["bfloat16", "int8-float32", "int8-bfloat16"],
)
def test_narrow_formats_stay_near_the_float32_logits_on_every_instruction_set(
    name: str, options: dict[str, str], tolerance: float, tiny: Callable[..., Any]
) -> None:
    model, text = tiny(name), PROMPT * 3
    exact = model.reference(torch.tensor([text])).logits[0, -1]
    for isa in ISAS:
        chosen = options | {"instruction_set": isa.name.lower()}
        found = logits_of(load_executor(model.path, threads=1, **chosen), text)[0]
        distance = (found - exact).norm() / (exact - exact.mean()).norm()
        assert distance < tolerance, isa.name


@COMPILED
@pytest.mark.parametrize("name", ["llama", "llama-biases-tied", "qwen3", "mistral-window"])
def test_int4_is_near_the_model_whose_matrices_were_rounded_so(
    name: str, tiny: Callable[..., Any], library: Library, team: TeamOf, tmp_path: Path
) -> None:
    def round_matrices(tensors: dict[str, torch.Tensor]) -> None:
        for key, tensor in tensors.items():
            if key.endswith("proj.weight"):
                tensors[key] = packed_int4(library, team(1), tensor.float()).contiguous()

    model, text = tiny(name), PROMPT * 3
    directory = Path(shutil.copytree(model.path, tmp_path / "model"))
    rewrite(directory, round_matrices)
    exact = logits_of(load_executor(directory, threads=1, attention_backend="torch"), text)[0]
    for isa in ISAS:
        chosen = {"quantization": "int4", "instruction_set": isa.name.lower()}
        found = logits_of(load_executor(model.path, threads=1, dtype="float32", **chosen), text)[0]
        distance = (found - exact).norm() / (exact - exact.mean()).norm()
        assert distance < 0.08, isa.name


@COMPILED
def test_weights_in_fp8_are_refused(tiny: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"--quantization fp8: .* has no fp8 weights"):
        load_executor(tiny("llama").path, quantization="fp8")


@COMPILED
def test_quantized_weights_are_another_model_with_the_same_kv(tiny: Callable[..., Any]) -> None:
    path = tiny("llama").path
    plain, eight, four = (
        load_executor(path, threads=1, quantization=name) for name in ("none", "int8", "int4")
    )
    assert len({one.fingerprint for one in (plain, eight, four)}) == 3
    assert {one.pool.geometry.dtype for one in (plain, eight, four)} == {"float32"}
    sizes = [one.model.packed_bytes for one in (plain, eight, four)]  # type: ignore[attr-defined]
    assert sizes[0] > sizes[1] >= sizes[2]
    assert [one.weight_dtype for one in (plain, eight, four)] == ["float32", "int8", "int4"]
    on_torch = load_executor(path, threads=1, attention_backend="torch")
    assert on_torch.pool.geometry == plain.pool.geometry


@COMPILED
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral-window"])
def test_every_instruction_set_generates_what_transformers_generates(
    name: str, tiny: Callable[..., Any], drive: Callable[..., Any]
) -> None:
    model = tiny(name)
    for isa in ISAS:
        driver = drive(model.path, budget=13, instruction_set=isa.name.lower())
        sequences = [driver.add(PROMPT * n, 16) for n in (1, 3, 5)]
        driver.run()
        for sequence in sequences:
            output = sequence.tokens[sequence.prompt_length :]
            model.assert_generates(sequence.request.prompt_ids, output)


@COMPILED
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_number_of_threads_changes_no_bit(dtype: str, tiny: Callable[..., Any]) -> None:
    prompts = [PROMPT * n for n in (1, 2, 4)]
    found = [
        logits_of(load_executor(tiny("llama").path, threads=n, dtype=dtype), *prompts)
        for n in (1, 2, 3)
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


# -- Logits, and the largest of them -------------------------------------------------------


@COMPILED
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_best_token_without_logits_is_the_one_with_them(
    dtype: str, tiny: Callable[..., Any]
) -> None:
    executor = load_executor(tiny("llama").path, threads=1, dtype=dtype)
    prompts = [PROMPT[i:] + PROMPT[:i] for i in range(len(PROMPT))]
    assert best_of(executor, *prompts) == logits_of(executor, *prompts).argmax(-1).tolist()


@COMPILED
def test_the_lowest_of_equal_logits_wins(directory: Path) -> None:
    def double(tensors: dict[str, torch.Tensor]) -> None:
        head = tensors["lm_head.weight"]
        head[VOCAB - 99 :] = head[:99]  # every one of the first 99 tokens has a twin

    rewrite(directory, double)
    executor = load_executor(directory, threads=2)
    prompts = [PROMPT[i:] for i in range(len(PROMPT))]
    logits = logits_of(executor, *prompts)
    assert best_of(executor, *prompts) == logits.argmax(-1).tolist()
    assert max(best_of(executor, *prompts)) < VOCAB - 99


@COMPILED
@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("rows", [slice(None), slice(40, 41), slice(0, 1)])
def test_logits_that_are_no_numbers_are_treated_as_torch_treats_them(
    broken: float, rows: slice, directory: Path, drive: Callable[..., Any]
) -> None:
    rewrite(directory, lambda tensors: tensors["lm_head.weight"][rows].fill_(broken))

    def run(backend: str) -> list[list[int]]:
        driver = drive(directory, attention_backend=backend)
        sequences = [driver.add(PROMPT[i:], 6) for i in range(4)]
        driver.run()
        return [sequence.tokens for sequence in sequences]

    assert run("native") == run("torch")


@COMPILED
def test_rows_with_and_without_logits_mix_in_one_pass(
    tiny: Callable[..., Any], drive: Callable[..., Any]
) -> None:
    model = tiny("llama")
    driver = drive(model.path, budget=9)
    wants: list[dict[str, Any]] = [
        {},
        {"sampling": Sampling(temperature=1.0, seed=3)},
        {"logprobs": 2},
        {"prompt_logprobs": 1},
    ]
    sequences = [driver.add(PROMPT, 10, **want) for want in wants]
    driver.run()
    for sequence in (sequences[0], *sequences[2:]):
        model.assert_generates(PROMPT, sequence.tokens[len(PROMPT) :])


# -- Limits --------------------------------------------------------------------------------


@COMPILED
def test_contexts_beyond_the_first_table_of_rotations(
    save: Callable[..., Any], drive: Callable[..., Any], tmp_path: Path
) -> None:
    config = LlamaConfig(**CONFIGS["llama"]().to_dict() | {"max_position_embeddings": 8192})
    model = save(config, tmp_path)
    driver = drive(tmp_path, budget=512, kv_memory=2**25)
    text = [3 + (index * index) % 190 for index in range(2040)]
    sequence = driver.add(text, 20)
    driver.run()
    model.assert_generates(text, sequence.tokens[len(text) :])


@COMPILED
def test_the_embedding_is_read_where_it_lies_in_its_file(directory: Path) -> None:
    model = load_executor(directory, threads=1).model
    (embedding,) = model._step._held  # type: ignore[attr-defined]
    assert embedding.shape == (VOCAB, 48)
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= embedding.data_ptr() < end:
            assert line.endswith(str(directory / "model.safetensors"))
            return
    pytest.fail("mapped nowhere")
