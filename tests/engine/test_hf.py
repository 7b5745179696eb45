"""Architectures without native code: equal to transformers, or refused at load."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    T5Config,
)

from baton.errors import ModelError
from engine.attention.reference import TorchAttention
from engine.model.config import read_config
from engine.model.hf import TransformersModel, load_fallback

LIMIT = 96
_COMMON: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": LIMIT,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
_LLAMA_LIKE = _COMMON | {"intermediate_size": 80, "num_key_value_heads": 2}
_GPT2_LIKE: dict[str, Any] = {
    "vocab_size": 199,
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 6,
    "n_positions": LIMIT,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
_MIXED_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}

SERVED: dict[str, dict[str, Any]] = {
    "gpt2": _GPT2_LIKE,
    "gpt_bigcode": _GPT2_LIKE | {"multi_query": True},
    "gpt_neox": _COMMON | {"intermediate_size": 80},
    "gemma2": _LLAMA_LIKE
    | {
        "head_dim": 8,
        "sliding_window": 9,
        "layer_types": _MIXED_LAYERS,
        "tie_word_embeddings": False,
    }
    | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 9},
    "gemma3_text": _LLAMA_LIKE
    | {
        "head_dim": 8,
        "sliding_window": 9,
        "layer_types": _MIXED_LAYERS,
        "tie_word_embeddings": False,
    },
    "phi3": _LLAMA_LIKE | {"sliding_window": 11},
    "starcoder2": _LLAMA_LIKE | {"sliding_window": None},
    "cohere2": _LLAMA_LIKE | {"sliding_window": 9, "layer_types": _MIXED_LAYERS},
    "olmo2": _LLAMA_LIKE,
    "mixtral": _LLAMA_LIKE | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": _COMMON
    | _EXPERTS
    | {"intermediate_size": 80, "num_key_value_heads": 6, "n_routed_experts": 4, "n_group": 2}
    | {"topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1, "q_lora_rank": 16}
    | {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12},
}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bloom": (
        {"vocab_size": 199, "hidden_size": 48, "n_layer": 2, "n_head": 6}
        | {"max_position_embeddings": LIMIT},
        "does not let its attention be replaced",
    ),
    "falcon": (
        _COMMON | {"num_hidden_layers": 2, "alibi": True},
        "does not let its attention be replaced",
    ),
    "gptj": (_GPT2_LIKE | {"rotary_dim": 4}, "does not let its attention be replaced"),
    "mpt": (
        {"vocab_size": 199, "d_model": 48, "n_heads": 6, "n_layers": 2}
        | {"max_position_embeddings": LIMIT},
        "does not let its attention be replaced",
    ),
    "mamba": (
        {"vocab_size": 199, "hidden_size": 48, "num_hidden_layers": 2, "state_size": 4}
        | {"max_position_embeddings": LIMIT, "num_attention_heads": 1},
        "does not let its attention be replaced",
    ),
    "gpt_oss": (
        _LLAMA_LIKE | {"num_local_experts": 4, "head_dim": 8, "sliding_window": 9},
        "s_aux",
    ),
    "minimax": (
        _LLAMA_LIKE | {"num_local_experts": 4, "head_dim": 8, "num_hidden_layers": 2},
        "layers of kind linear_attention",
    ),
    "llama4_text": (
        _LLAMA_LIKE | {"num_local_experts": 2, "head_dim": 8, "intermediate_size_mlp": 80},
        "layers of kind chunked_attention",
    ),
    "bert": (_COMMON | {"intermediate_size": 80}, "not causal"),
    "diffllama": (_LLAMA_LIKE, r"attention is replaced in \[0, 0, 1, 1, 2, 2\]"),
    "apertus": (
        _LLAMA_LIKE | {"sliding_window": 9},  # configured, but the architecture ignores it
        r"ask for windows \[None, None, None\] instead of \[9, 9, 9\]",
    ),
}


def config_of(kind: str, **settings: Any) -> PretrainedConfig:
    return AutoConfig.for_model(kind, **settings)


def load(path: Path, attention: TorchAttention | None = None) -> TransformersModel:
    return load_fallback(
        path, read_config(path), torch.float32, "cpu", attention or TorchAttention()
    )


@pytest.fixture(scope="module")
def olmo(save: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Copies of one model's directory, to damage."""
    original = tmp_path_factory.mktemp("original")
    save(config_of("olmo2", **_LLAMA_LIKE), original)

    def copy() -> Path:
        path = tmp_path_factory.mktemp("copy")
        for file in original.iterdir():
            (path / file.name).write_bytes(file.read_bytes())
        return path

    return copy


@pytest.mark.parametrize("kind", SERVED)
def test_greedy_tokens_equal_transformers_over_chunks_and_mixed_batches(
    kind: str, save: Callable[..., Any], drive: Callable[..., Any], tmp_path: Path
) -> None:
    model = save(config_of(kind, **SERVED[kind]), tmp_path)
    chooser = random.Random(3)
    driver = drive(tmp_path, budget=13, block_size=4)
    assert isinstance(driver.executor.model, TransformersModel)
    assert driver.executor.capacity.max_context == LIMIT
    sequences = [
        driver.add([chooser.randrange(3, 199) for _ in range(length)], min(16, LIMIT - length))
        for length in (1, 5, 14, 38, LIMIT - 3)
    ]
    driver.run()
    seen: set[int] = set()
    for sequence in sequences:
        output = sequence.tokens[sequence.prompt_length :]
        model.assert_generates(sequence.request.prompt_ids, output)
        seen.update(output)
    assert len(seen) > 10  # a model that repeats itself would prove little


@pytest.mark.parametrize("kind", ["gpt2", "gemma2"])
def test_prompt_logprobs_are_those_of_transformers(
    kind: str, save: Callable[..., Any], drive: Callable[..., Any], tmp_path: Path
) -> None:
    model = save(config_of(kind, **SERVED[kind]), tmp_path)
    driver = drive(tmp_path, budget=7)
    prompt = list(range(20, 43))
    driver.add(prompt, 1, prompt_logprobs=0)
    driver.run()
    found = [
        logprob.logprob
        for _, result in driver.results
        for logprobs in result.prompt_logprobs
        for logprob in logprobs
    ]
    with torch.inference_mode():
        expected = model.reference(torch.tensor([prompt])).logits[0].log_softmax(-1)
    targets = torch.tensor(prompt[1:])[:, None]
    assert found == pytest.approx(expected[:-1].gather(-1, targets).flatten().tolist(), abs=1e-4)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_paged_attention_cannot_do_is_refused(
    kind: str, save: Callable[..., Any], tmp_path: Path
) -> None:
    settings, reason = REFUSED[kind]
    save(config_of(kind, **settings), tmp_path)
    # Some of these name their sizes in ways of their own, which is a reason too.
    with pytest.raises(ModelError, match=f"{reason}|must be a positive integer"):
        load(tmp_path)


def test_an_encoder_decoder_is_refused(olmo: Callable[[], Path], tmp_path: Path) -> None:
    config = T5Config(vocab_size=199, d_model=48, num_layers=2, num_heads=6, d_kv=8, d_ff=80)
    config.max_position_embeddings = LIMIT
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((olmo() / "tokenizer.json").read_bytes())
    with pytest.raises(ModelError, match="not a decoder-only language model"):
        load(tmp_path)


class Unscaled(TorchAttention):
    """Ignores the scale that the model asks for."""

    def attend(self, *inputs: Any, scale: float, **options: Any) -> Tensor:
        return super().attend(*inputs, scale=1.1 * scale, **options)


class Unwindowed(TorchAttention):
    """Ignores sliding windows."""

    def attend(self, *inputs: Any, window: int | None = None, **options: Any) -> Tensor:
        return super().attend(*inputs, **options)


class Forgetful(TorchAttention):
    """Loses what earlier passes wrote for the first position."""

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any
    ) -> Tensor:
        batch, cache = rest
        if batch.starts[0]:
            cache.values(layer)[batch.block_tables[0, 0], 0] = 0
        return super().attend(layer, q, k, v, *rest, **options)


@pytest.mark.parametrize("broken", [Unscaled, Unwindowed, Forgetful])
def test_the_check_at_load_sees_wrong_attention(
    broken: type[TorchAttention], save: Callable[..., Any], tmp_path: Path
) -> None:
    save(config_of("phi3", **SERVED["phi3"]), tmp_path)
    load(tmp_path)
    with pytest.raises(ModelError, match="differs from transformers' own result"):
        load(tmp_path, broken())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_passes_the_check(
    dtype: torch.dtype, save: Callable[..., Any], tmp_path: Path
) -> None:
    save(config_of("gemma2", **SERVED["gemma2"]), tmp_path, dtype=dtype)
    model = load_fallback(tmp_path, read_config(tmp_path), None, "cpu", TorchAttention())
    assert model.dtype is dtype


@pytest.mark.parametrize(
    ("kind", "settings", "limit"),
    [
        ("olmo2", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, LIMIT),
        (
            "phi3",
            {
                "original_max_position_embeddings": 24,
                "rope_parameters": {
                    "rope_type": "longrope",
                    "short_factor": [1.0, 1.1, 1.2, 1.3],
                    "long_factor": [2.0, 3.0, 4.0, 5.0],
                },
            },
            24,
        ),
    ],
)
def test_context_ends_where_angles_would_depend_on_other_sequences(
    kind: str, settings: dict[str, Any], limit: int, save: Callable[..., Any], tmp_path: Path
) -> None:
    settings["rope_parameters"]["rope_theta"] = 10000.0
    save(config_of(kind, **_LLAMA_LIKE, **settings), tmp_path)
    assert load(tmp_path).max_context == limit


def test_weights_that_do_not_fit_are_refused(olmo: Callable[[], Path]) -> None:
    path = olmo()
    weights = load_file(path / "model.safetensors")
    removed = weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"missing keys: model\.layers\.1\.mlp\.up_proj\.weight"):
        load(path)
    weights["model.layers.1.mlp.up_proj.weight"] = removed
    weights["model.layers.1.mlp.extra.weight"] = removed.clone()
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="unexpected keys"):
        load(path)


def test_truncated_weights_are_refused(olmo: Callable[[], Path]) -> None:
    path = olmo()
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=str(path)):
        load(path)


def test_pickled_weights_are_never_read(olmo: Callable[[], Path]) -> None:
    path = olmo()
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").rename(path / "other.safetensors")
    with pytest.raises(ModelError):
        load(path)


@pytest.mark.parametrize("known", [True, False])
def test_code_in_the_model_directory_never_runs(known: bool, olmo: Callable[[], Path]) -> None:
    path, marker = olmo(), "ran"
    config = json.loads((path / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    if not known:
        config["model_type"] = "something_new"
    (path / "config.json").write_text(json.dumps(config))
    code = f"from pathlib import Path\nPath({str(path / marker)!r}).touch()\n"
    (path / "code.py").write_text(code)
    if known:  # transformers' own implementation serves it
        load(path)
    else:
        with pytest.raises(ModelError, match="contains custom code"):
            load(path)
    assert not (path / marker).exists()
