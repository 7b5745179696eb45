"""Tiny random models of every native family, a small scheduler, and transformers to compare to."""

from __future__ import annotations

import random
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.utils import logging

from baton.types import Request, Sampling, Stopping
from engine.load import load_executor
from engine.model.runner import TorchExecutor
from engine.native.library import load
from scheduling.plan import Chunk, Sampled, StepPlan, StepResult
from scheduling.sequence import Sequence

VOCAB = 199
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LLAMA = _SIZES | {
    "intermediate_size": 96,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.3,
}


def _rope(rope_type: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_type": rope_type, "rope_theta": 10000.0} | parameters


CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_LLAMA),
    "llama-biases-tied": lambda: LlamaConfig(
        **_LLAMA, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "llama-wide-heads": lambda: LlamaConfig(
        **_LLAMA | {"num_key_value_heads": 6, "head_dim": 32, "hidden_act": "gelu_pytorch_tanh"}
    ),
    "llama-narrow-heads": lambda: LlamaConfig(**_LLAMA | {"head_dim": 8}),
    "mistral": lambda: MistralConfig(**_LLAMA, sliding_window=None),
    "mistral-window": lambda: MistralConfig(**_LLAMA, sliding_window=13),
    "qwen2": lambda: Qwen2Config(**_LLAMA),
    "qwen2-window": lambda: Qwen2Config(
        **_LLAMA, use_sliding_window=True, sliding_window=21, max_window_layers=1
    ),
    "qwen3": lambda: Qwen3Config(**_LLAMA),
    "opt": lambda: OPTConfig(**_SIZES, ffn_dim=96, init_std=0.3),
    "opt-post-norm-projected": lambda: OPTConfig(
        **_SIZES, ffn_dim=96, init_std=1.0, do_layer_norm_before=False, word_embed_proj_dim=32
    ),
    "rope-linear": lambda: LlamaConfig(**_LLAMA, rope_parameters=_rope("linear", factor=4.0)),
    "rope-dynamic": lambda: LlamaConfig(
        **_LLAMA | {"max_position_embeddings": 32}, rope_parameters=_rope("dynamic", factor=4.0)
    ),
    "rope-llama3": lambda: LlamaConfig(
        **_LLAMA,
        rope_parameters=_rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
    "rope-yarn": lambda: LlamaConfig(
        **_LLAMA,
        rope_parameters=_rope("yarn", factor=4.0, original_max_position_embeddings=32),
    ),
    "rope-longrope": lambda: LlamaConfig(
        **_LLAMA,
        rope_parameters=_rope(
            "longrope",
            factor=4.0,
            original_max_position_embeddings=32,
            short_factor=[1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
            long_factor=[1.5, 2.0, 3.0, 4.0, 4.0, 4.0, 4.0, 4.0],
        ),
    ),
}


def one_layer(vocab_size: int) -> PretrainedConfig:
    """A Llama of one layer and few heads, for Triton's interpreter, which is slow."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=64,
        initializer_range=0.5,
        bos_token_id=1,
        eos_token_id=2,
    )


COMPILED = pytest.mark.skipif(load() is None, reason="the compiled backend was not built here")
_FAMILY = ("llama", "mistral", "qwen", "rope")


def on_backends(*names: str) -> list[Any]:
    """Parameters (name, backend): models on torch, and on the compiled backend those it serves."""
    return [
        pytest.param(name, backend, id=f"{name}-{backend}", marks=marks)
        for name in names
        for backend, marks in (("torch", ()), ("native", COMPILED))
        if backend == "torch" or (name.startswith(_FAMILY) and name != "llama-narrow-heads")
    ]


@dataclass
class TinyModel:
    """A model directory, and transformers' own model of it."""

    path: Path
    reference: PreTrainedModel
    _cache: dict[tuple[tuple[int, ...], int], tuple[list[int], list[float]]] = field(
        default_factory=dict
    )

    def generate(self, prompt: Items[int], tokens: int) -> tuple[list[int], list[float]]:
        """Greedy output of transformers, and how far apart the two best logits were each time."""
        if (tuple(prompt), tokens) not in self._cache:
            self.generate_all([prompt], tokens)
        return self._cache[tuple(prompt), tokens]

    def generate_all(self, prompts: Items[Items[int]], tokens: int) -> None:
        """Have `generate` know the outputs of prompts of one length, which are made together."""
        self.reference(torch.tensor([[0]]))  # dynamic RoPE keeps state between calls: reset it
        ids = torch.tensor([list(prompt) for prompt in prompts])
        result = self.reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=None,
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_logits=True,
        )
        best = torch.stack(result.logits, 1).float().topk(2).values  # [prompts, tokens, 2]
        gaps = (best[..., 0] - best[..., 1]).tolist()
        outputs = result.sequences[:, ids.shape[1] :].tolist()
        for prompt, *found in zip(prompts, outputs, gaps, strict=True):
            self._cache[tuple(prompt), tokens] = (found[0], found[1])

    def assert_generates(
        self, prompt: Items[int], output: Items[int], *, rounding: float = 1e-4
    ) -> None:
        """`output` is what transformers generates; two logits within `rounding` are a draw, after
        which the sequences may differ."""
        expected, gaps = self.generate(prompt, len(output))
        for position, (ours, theirs) in enumerate(zip(output, expected, strict=True)):
            if ours != theirs:
                assert gaps[position] < rounding, f"position {position}: {ours} instead of {theirs}"
                return


def save_model(
    config: PretrainedConfig, path: Path, *, dtype: torch.dtype = torch.float32, **options: Any
) -> TinyModel:
    """Make a random model, biases and norms included, and save it as users have it."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.to(dtype).save_pretrained(path, **options)
    Tokenizer(models.BPE()).save(str(path / "tokenizer.json"))
    # Not SDPA, which older versions use for Gemma 2 as well and which knows no softcap.
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )
    return TinyModel(path, model)


@pytest.fixture(scope="session", autouse=True)
def _quiet_torch() -> None:
    torch.set_num_threads(1)
    logging.disable_progress_bar()


@pytest.fixture(scope="session")
def tiny(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], TinyModel]:
    """The tiny model of a name in CONFIGS, in float32; made once."""
    made: dict[str, TinyModel] = {}

    def make(name: str) -> TinyModel:
        if name not in made:
            made[name] = save_model(CONFIGS[name](), tmp_path_factory.mktemp(name))
        return made[name]

    return make


class Driver:
    """The simplest scheduler that is one: generation first, then prompts, in shuffled blocks.

    Keeps every step's result, to look at.
    """

    def __init__(self, executor: TorchExecutor, budget: int, seed: int = 0) -> None:
        self.executor, self.budget = executor, budget
        self.random = random.Random(seed)
        self.free = list(range(executor.capacity.blocks))
        self.random.shuffle(self.free)
        self.running: list[Sequence] = []
        self.results: list[tuple[StepPlan, StepResult]] = []

    def add(self, prompt: Items[int], max_tokens: int, **request: Any) -> Sequence:
        """A new sequence."""
        sampling = request.pop("sampling", Sampling())
        stopping = Stopping(max_tokens=max_tokens, **request.pop("stopping", {}))
        made = Request(f"request-{len(self.running)}", tuple(prompt), sampling, stopping, **request)
        sequence = Sequence.start(made, 0, now=0.0)
        self.running.append(sequence)
        return sequence

    def logprobs(self) -> list[float]:
        """Those of every step's results, of prompts and of outputs."""
        return [
            logprob.logprob
            for _, result in self.results
            for given, prompt in zip(result.sampled, result.prompt_logprobs, strict=True)
            for logprob in (*prompt, *([given.logprob] if given and given.logprob else []))
        ]

    def preempt(self, sequence: Sequence) -> None:
        """Take its blocks; it has to compute everything again."""
        self.free += sequence.blocks
        self.random.shuffle(self.free)
        sequence.blocks, sequence.computed = [], 0

    def step(self) -> bool:
        """One pass; False when nothing was left to do."""
        live = [s for s in self.running if s.finish is None]
        left, chunks = self.budget, []
        for sequence in sorted(live, key=lambda s: not s.generating):
            length = min(left, sequence.uncomputed)
            if length:
                chunks.append(self._chunk(sequence, length))
                left -= length
        if not chunks:
            return False
        plan = StepPlan(tuple(chunks))
        result = self.executor.execute(plan)
        self.results.append((plan, result))
        for chunk, sampled in zip(chunks, result.sampled, strict=True):
            self._apply(chunk, sampled)
        return True

    def run(self) -> None:
        """Until all have finished."""
        while self.step():
            pass

    def _chunk(self, sequence: Sequence, length: int) -> Chunk:
        end = sequence.computed + length
        while len(sequence.blocks) < self.executor.capacity.blocks_for(end):
            sequence.blocks.append(self.free.pop())
        return Chunk(sequence, sequence.computed, length, sample=end == len(sequence.tokens))

    def _apply(self, chunk: Chunk, sampled: Sampled | None) -> None:
        sequence = chunk.sequence
        sequence.computed += chunk.length
        assert (sampled is not None) == chunk.sample
        if sampled is not None:
            sequence.finish = sequence.append(sampled.token_id)
            if sequence.finish is not None:
                self.free += sequence.blocks
                sequence.blocks = []


@pytest.fixture
def drive() -> Callable[..., Driver]:
    """A driver over a fresh executor: `drive(path, budget=..., block_size=...)`."""

    def make(path: Path, *, budget: int = 512, **options: Any) -> Driver:
        options = {"block_size": 16, "threads": 1, "kv_memory": 2**21} | options
        return Driver(load_executor(path, max_batch_tokens=budget, **options), budget)

    return make


@pytest.fixture(scope="session")
def save() -> Callable[..., TinyModel]:
    """`save_model`, for tests that need a checkpoint of their own."""
    return save_model
