"""Writes a Llama directory as a GGUF file, without its tokenizer: only token ids are exchanged.

16-bit weights stay bfloat16 as they are. int8 is Q8_0: blocks of 32 weights with a scale each.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Format
from numpy.typing import NDArray

_FORMATS = {"bf16": Format.BF16, "int8": Format.Q8_0}
_DTYPES: dict[str, Any] = {"BF16": np.uint16, "F32": np.float32, "F16": np.float16}


def write(directory: Path, precision: str, target: Path) -> None:
    """Raises ValueError for models that are no plain Llama."""
    config = json.loads((directory / "config.json").read_text())
    if config["model_type"] != "llama" or config.get("attention_bias") or config.get("mlp_bias"):
        raise ValueError(
            f"only plain Llama can be written as GGUF here, not {config['model_type']}"
        )
    writer = gguf.GGUFWriter(target, "llama")
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads", heads)
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(_rope_base(config))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in _tensors(directory):
        if name == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue
        if name.endswith("q_proj.weight"):
            tensor = _interleaved(tensor, heads)
        elif name.endswith("k_proj.weight"):
            tensor = _interleaved(tensor, kv_heads)
        _add(writer, names.get_name(name, try_suffixes=(".weight",)), tensor, _FORMATS[precision])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _rope_base(config: dict[str, Any]) -> float:
    nested = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if nested.get("rope_type", "default") != "default":
        raise ValueError(f"rope type {nested['rope_type']} cannot be written as GGUF here")
    return float(config.get("rope_theta") or nested.get("rope_theta") or 10000.0)


def _tensors(directory: Path) -> Iterator[tuple[str, NDArray[Any]]]:
    """Names and tensors; bfloat16 as its bits. numpy knows no bfloat16, nor does safetensors'
    reader for numpy."""
    for file in sorted(directory.glob("*.safetensors")):
        data = np.memmap(file, dtype=np.uint8, mode="r")
        start = 8 + int.from_bytes(data[:8].tobytes(), "little")
        header = json.loads(data[8:start].tobytes())
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            first, last = entry["data_offsets"]
            dtype = _DTYPES[entry["dtype"]]
            yield name, data[start + first : start + last].view(dtype).reshape(entry["shape"])


def _interleaved(tensor: NDArray[Any], heads: int) -> NDArray[Any]:
    """llama.cpp rotates neighbours, Hugging Face the two halves of a head."""
    rows, columns = tensor.shape
    halves = tensor.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def _add(writer: gguf.GGUFWriter, name: str, tensor: NDArray[Any], wanted: Format) -> None:
    """Norms are float32, as llama.cpp has them."""
    if tensor.dtype == np.uint16 and tensor.ndim == 2 and wanted is Format.BF16:
        bits = np.ascontiguousarray(tensor)
        writer.add_tensor(name, bits.view(np.uint8), raw_dtype=Format.BF16)
        return
    plain = _float32(tensor)
    if tensor.ndim == 1:
        writer.add_tensor(name, plain)
    else:
        writer.add_tensor(name, gguf.quants.quantize(plain, wanted), raw_dtype=wanted)


def _float32(tensor: NDArray[Any]) -> NDArray[np.float32]:
    if tensor.dtype == np.uint16:
        return (tensor.astype(np.uint32) << 16).view(np.float32)
    return tensor.astype(np.float32)
