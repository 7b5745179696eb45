"""Llama directories with random weights, of shapes that people serve on CPUs.

Weights mean nothing, their speed does. The tokenizer is a real byte-level BPE with as many tokens
as the shape says, because converters of other systems insist on one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

_EMBEDDING_STD = 0.1  # small, so that outputs are not the same token again and again
_SEED = 0
END = "<|endoftext|>"  # token 0


@dataclass(frozen=True, slots=True)
class Shape:
    """What a Llama's cost depends on."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = True  # the output head is the embedding
    context: int = 2048

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden // self.heads


SHAPES = {
    "tiny": Shape(hidden=128, intermediate=256, layers=2, heads=2, kv_heads=1, vocabulary=1024),
    "135m": Shape(hidden=576, intermediate=1536, layers=30, heads=9, kv_heads=3, vocabulary=49152),
    "0.5b": Shape(
        hidden=896, intermediate=4864, layers=24, heads=14, kv_heads=2, vocabulary=151936
    ),
}  # 135m is SmolLM-135M's, 0.5b is Qwen2.5-0.5B's without biases; tiny is to try things out


def make(shape: Shape, directory: Path) -> None:
    """Write the model into `directory`, in bfloat16. The same for every call, and scaled so that
    what passes between layers stays of the order of 1."""
    directory.mkdir(parents=True, exist_ok=True)
    _write_json(directory / "config.json", _config(shape))
    _write_json(directory / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 0})
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "pad_token": END,
        "model_max_length": shape.context,
        "clean_up_tokenization_spaces": False,
    }
    _write_json(directory / "tokenizer_config.json", tokenizer)
    _tokenizer(shape.vocabulary).save(str(directory / "tokenizer.json"))
    save_file(dict(_tensors(shape)), directory / "model.safetensors", metadata={"format": "pt"})


def vocabulary(directory: Path) -> int:
    """Tokens that a model knows."""
    found: int = json.loads((directory / "config.json").read_text())["vocab_size"]
    return found


def _write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _config(shape: Shape) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": shape.tied,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "use_cache": True,
    }


def _tensors(shape: Shape) -> Iterator[tuple[str, Tensor]]:
    random = torch.Generator().manual_seed(_SEED)

    def matrix(outputs: int, inputs: int) -> Tensor:
        return torch.randn(outputs, inputs, generator=random).div_(inputs**0.5).bfloat16()

    def embedding() -> Tensor:
        drawn = torch.randn(shape.vocabulary, shape.hidden, generator=random)
        return drawn.mul_(_EMBEDDING_STD).bfloat16()

    def norm() -> Tensor:
        return torch.ones(shape.hidden, dtype=torch.bfloat16)

    hidden, wide, kv = shape.hidden, shape.intermediate, shape.kv_heads * shape.head_dim
    yield "model.embed_tokens.weight", embedding()
    for number in range(shape.layers):
        layer = f"model.layers.{number}."
        yield layer + "input_layernorm.weight", norm()
        yield layer + "self_attn.q_proj.weight", matrix(hidden, hidden)
        yield layer + "self_attn.k_proj.weight", matrix(kv, hidden)
        yield layer + "self_attn.v_proj.weight", matrix(kv, hidden)
        yield layer + "self_attn.o_proj.weight", matrix(hidden, hidden)
        yield layer + "post_attention_layernorm.weight", norm()
        yield layer + "mlp.gate_proj.weight", matrix(wide, hidden)
        yield layer + "mlp.up_proj.weight", matrix(wide, hidden)
        yield layer + "mlp.down_proj.weight", matrix(hidden, wide)
    yield "model.norm.weight", norm()
    if not shape.tied:
        yield "lm_head.weight", matrix(shape.vocabulary, hidden)


def _tokenizer(vocabulary: int) -> Tokenizer:
    """Bytes, then made-up merges of them, until there are `vocabulary` tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = list(islice(_merges(letters), vocabulary - 1 - len(letters)))
    tokens = [END, *letters, *(left + right for left, right in merges)]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([END])
    return made


def _merges(letters: list[str]) -> Iterator[tuple[str, str]]:
    yield from product(letters, letters)
    pairs = (left + right for left, right in product(letters, letters))
    yield from product(pairs, letters)
