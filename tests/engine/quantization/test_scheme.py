"""What configurations say of quantization is understood, or refused by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from baton.errors import ModelError
from engine.quantization.scheme import Layout, read_scheme

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
AUTO_ROUND = {
    "quant_method": "auto-round",
    "bits": 4,
    "group_size": 128,
    "sym": True,
    "data_type": "int",
    "packing_format": "auto_round:auto_gptq",
}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


BLOCKS = {"strategy": "block", "group_size": None, "block_structure": "128x128"}


def compressed(fmt: str = "pack-quantized", /, **weights: Any) -> dict[str, Any]:
    """A configuration of compressed-tensors with one group."""
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128} | weights
    group = {"targets": ["Linear"], "weights": weights}
    return {
        "quant_method": "compressed-tensors",
        "format": fmt,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def write(path: Path, config: Any) -> Path:
    """A directory with that quantization_config."""
    (path / "config.json").write_text(json.dumps({"quantization_config": config}))
    return path


def test_a_model_without_quantized_weights_has_no_scheme(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert read_scheme(tmp_path) is None
    only_kv = compressed() | {"config_groups": {}, "kv_cache_scheme": {"num_bits": 8}}
    assert read_scheme(write(tmp_path, only_kv)) is None


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (GPTQ, "int4"),
        (GPTQ | {"bits": 8, "checkpoint_format": "gptq_v2"}, "int8"),
        (AWQ, "int4"),
        (AWQ | {"zero_point": False, "version": "GEMV"}, "int4"),
        (AUTO_ROUND, "int4"),
        (AUTO_ROUND | {"packing_format": "auto_round:auto_awq"}, "int4"),
        (FP8, "fp8"),
        ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, "fp8"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "fp8"),
        (compressed(), "int4"),
        (compressed() | {"quantization_status": "frozen"}, "int4"),
        (compressed("float-quantized", type="float", num_bits=8, **BLOCKS), "fp8"),
        (compressed("int-quantized", num_bits=8, strategy="channel", group_size=None), "int8"),
        (
            compressed("float-quantized", type="float", num_bits=8, strategy="tensor"),
            "fp8",
        ),
    ],
)
def test_supported_formats_have_the_names_of_quantizations(
    config: dict[str, Any], name: str, tmp_path: Path
) -> None:
    scheme = read_scheme(write(tmp_path, config))
    assert scheme is not None
    assert scheme.name == name
    assert scheme.method == config["quant_method"]


@pytest.mark.parametrize(
    ("file", "config", "name", "layout"),
    [
        ("quantize_config.json", {"bits": 8, "group_size": 32, "desc_act": True}, "int8", "gptq"),
        ("quant_config.json", {"w_bit": 4, "q_group_size": 32, "version": "GEMM"}, "int4", "awq"),
        ("hf_quant_config.json", {"quantization": {"quant_algo": "FP8"}}, "fp8", "plain"),
    ],
)
def test_a_tools_own_file_is_read_where_the_configuration_says_nothing(
    file: str, config: dict[str, Any], name: str, layout: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / file).write_text(json.dumps(config))
    scheme = read_scheme(tmp_path)
    assert scheme is not None
    assert scheme.name == name
    form = scheme.form("model.layers.0.mlp.up_proj")
    assert form is not None
    assert form.layout is Layout(layout)
    assert form.group_size == (None if name == "fp8" else 32)
    assert form.zeros_less_one == (layout == "gptq")
    write(tmp_path, FP8)  # which goes before it
    scheme = read_scheme(tmp_path)
    assert scheme is not None
    assert scheme.method == "fp8"


def _forms(config: dict[str, Any], path: Path, *names: str) -> list[tuple[int, int | None] | None]:
    """Bits and group size of modules."""
    scheme = read_scheme(write(path, config))
    assert scheme is not None
    forms = [scheme.form(name) for name in names]
    return [None if form is None else (form.bits, form.group_size) for form in forms]


def test_gptq_may_differ_by_module(tmp_path: Path) -> None:
    dynamic: dict[str, Any] = {
        r"-:.*\.o_proj": {},
        r"+:.*\.down_proj": {"bits": 8, "group_size": 64},
        r".*layers\.1\.": {"group_size": 32},
    }
    names = ("layers.0.up_proj", "layers.1.up_proj", "layers.1.down_proj", "a.layers.0.down_proj")
    found = _forms(GPTQ | {"dynamic": dynamic}, tmp_path, *names)
    assert found == [(4, 128), (4, 32), (8, 64), (8, 64)]


def test_auto_round_may_differ_by_module(tmp_path: Path) -> None:
    extra = {
        "model.layers.0.up_proj": {"bits": 16, "data_type": "float"},
        "model.layers.1.up_proj": {"bits": 8},
        "lm_head": {"bits": 4, "group_size": 32},
        r"layers\.[23]\.down": {"group_size": -1},
    }
    names = (*extra, "model.layers.2.down_proj", "model.layers.0.q_proj")
    config = AUTO_ROUND | {"extra_config": extra}
    assert _forms(config, tmp_path, *names[1:3], *names[4:]) == [
        (8, 128),
        (4, 32),
        (4, None),
        (4, 128),
    ]


def test_modules_get_the_form_of_their_name_before_that_of_their_class(tmp_path: Path) -> None:
    config = compressed()
    eight = {"num_bits": 8, "strategy": "channel"}
    config["config_groups"]["group_1"] = {"targets": ["re:.*down_proj$", "a.b"], "weights": eight}
    config["ignore"] = ["lm_head", "re:.*layers\\.3\\..*"]
    scheme = read_scheme(write(tmp_path, config))
    assert scheme is not None
    found = {
        name: form.bits if form is not None else None
        for name in ("layers.0.up_proj", "layers.0.down_proj", "a.b", "lm_head", "layers.3.up_proj")
        for form in [scheme.form(name)]
    }
    assert list(found.values()) == [4, 8, 8, None, None]
    assert scheme.name == "int4, int8"


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"quant_method": "bitsandbytes"}, "method 'bitsandbytes' are not supported"),
        ({}, "method 'None'"),
        (GPTQ | {"bits": 3}, "gptq checkpoints with bits 3 are"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        (GPTQ | {"is_marlin_format": True}, "is_marlin_format True"),
        (GPTQ | {"dynamic": {"+:.*": {"bits": 3}}}, "bits 3"),
        (GPTQ | {"dynamic": {"+:(": {}}}, "makes no sense"),
        (GPTQ | {"pack_dtype": "int64"}, "pack_dtype 'int64'"),
        (GPTQ | {"group_size": "many"}, "makes no sense"),
        (GPTQ | {"group_size": 0}, "makes no sense"),
        (AWQ | {"version": "gemv_fast"}, "awq checkpoints with version 'gemv_fast'"),
        (AWQ | {"backend": "llm-awq"}, "backend 'llm-awq'"),
        (AWQ | {"bits": 8}, "bits 8"),
        (AUTO_ROUND | {"packing_format": "auto_round"}, "packing_format 'auto_round'"),
        (AUTO_ROUND | {"data_type": "mx_fp"}, "data_type 'mx_fp'"),
        (AUTO_ROUND | {"rotation_config": {"block_size": 32}}, "rotation_config"),
        (AUTO_ROUND | {"bits": 2}, "auto-round checkpoints with bits 2"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_algo 'NVFP4'"),
        (FP8 | {"scale_fmt": "ue8m0"}, "scale_fmt 'ue8m0'"),
        (FP8 | {"weight_block_size": [128]}, "makes no sense"),
        (compressed("nvfp4-pack-quantized"), "format 'nvfp4-pack-quantized'"),
        (compressed(num_bits=3), "int num_bits 3"),
        (compressed(type="float"), "float num_bits 4"),
        (compressed(strategy="tensor_group"), "strategy 'tensor_group'"),
        (compressed() | {"quantization_status": "initialized"}, "quantization_status 'init"),
        (compressed() | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        (compressed() | {"transform_config": {"config_groups": {"u": {}}}}, "transform_config"),
        (compressed() | {"config_groups": {"W4A16": ["Linear"]}}, "presets"),
        (compressed() | {"config_groups": 4}, "makes no sense"),
        (compressed() | {"ignore": ["re:("]}, "makes no sense"),
        ("gptq", "is no object"),
    ],
)
def test_what_is_not_supported_is_named(config: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=reason):
        read_scheme(write(tmp_path, config))
