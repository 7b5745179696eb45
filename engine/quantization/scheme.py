"""What a configuration says of how a checkpoint's weights are stored.

Understood are GPTQ and AWQ as AutoGPTQ, GPTQModel, AutoAWQ and AutoRound write them,
compressed-tensors as llm-compressor does, and fp8 by blocks, by channels or by tensors as DeepSeek,
Qwen, AutoFP8, FBGEMM and ModelOpt have it. What is not understood is refused by its name.

How activations and KV are to be quantized is read over: here that is a worker's own choice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from baton.errors import ModelError

# Where tools keep or once kept what config.json has now, and the method of those.
OTHER_FILES = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
}
_SPECIAL = frozenset("*+?^$()[]{}|\\")  # by which AutoRound tells expressions from names


class Layout(Enum):
    """Which tensors a quantized weight consists of, beside `name`'s module prefix."""

    GPTQ = "gptq"  # qweight, qzeros, scales, g_idx
    AWQ = "awq"  # qweight, qzeros, scales
    AWQ_GEMV = "awq gemv"  # the same, the other way round and filled up
    PACKED = "packed"  # weight_packed, weight_scale, weight_shape, weight_zero_point, weight_g_idx
    PLAIN = "plain"  # weight in int8 or fp8, weight_scale, weight_zero_point


@dataclass(frozen=True, slots=True)
class Form:
    """How a group of modules is stored. `block` (rows, columns) has one scale; else `group_size`
    inputs of an output do, all of them if None."""

    layout: Layout
    bits: int
    floating: bool = False  # e4m3, else integers
    symmetric: bool = True
    group_size: int | None = None
    block: tuple[int, int] | None = None
    zeros_less_one: bool = False  # GPTQ's first version stores zeros minus one

    @property
    def name(self) -> str:
        """As --quantization spells it."""
        return "fp8" if self.floating else f"int{self.bits}"


Forms = tuple[tuple[tuple[str, ...], Form], ...]  # patterns, and what they stand for


@dataclass(frozen=True, slots=True)
class Scheme:
    """The quantization of a checkpoint: a form per pattern of module names.

    A pattern is a name, or "re:" and a regular expression that matches its beginning, or a class.
    """

    method: str
    forms: Forms
    ignored: tuple[str, ...] = field(default=())

    @property
    def name(self) -> str:
        """The formats of its weights, as --quantization spells them: "int4", "fp8, int8"."""
        return ", ".join(sorted({form.name for _, form in self.forms}))

    def form(self, module: str) -> Form | None:
        """That of a linear module; names go before classes. None if it is not to be quantized."""
        if any(_names(pattern, module) for pattern in self.ignored):
            return None
        for matches in (_names, _is_class):
            for patterns, form in self.forms:
                if any(matches(pattern, module) for pattern in patterns):
                    return form
        return None


def read_scheme(path: Path) -> Scheme | None:
    """The quantization of a model directory; None if it has none.

    Raises ModelError that names the method or the option that is not supported, and for a
    configuration that makes no sense.
    """
    config = _json(path / "config.json")
    found = config.get("quantization_config", config.get("compression_config"))
    for name, method in OTHER_FILES.items():
        if found is None and (path / name).is_file():
            found = {"quant_method": method} | _json(path / name)
    if found is None:
        return None
    if not isinstance(found, dict):
        raise ModelError(f"{path / 'config.json'}: quantization_config is no object")
    method = str(found.get("quant_method"))
    if method not in _METHODS:
        known = ", ".join(sorted(_METHODS))
        raise ModelError(
            f"{path}: quantized checkpoints of method {method!r} are not supported (those of "
            f"{known} are)"
        )
    try:
        scheme = _METHODS[method](found)
        return scheme if scheme.forms else None  # of KV alone, say
    except _Unsupported as error:
        raise ModelError(f"{path}: {method} checkpoints with {error} are not supported") from None
    except (AttributeError, KeyError, TypeError, ValueError, re.error) as error:
        raise ModelError(f"{path}: quantization_config makes no sense: {error!r}") from error


class _Unsupported(Exception):
    """An option, spelled out."""


def _gptq(config: Mapping[str, Any]) -> Scheme:
    version = config.get("checkpoint_format") or config.get("format") or "gptq"
    _only(version, "checkpoint_format", ("gptq", "gptq_v2"))
    _only(bool(config.get("is_marlin_format")), "is_marlin_format", (False,))
    _only(config.get("pack_dtype") or "int32", "pack_dtype", ("int32",))

    def form(options: Mapping[str, Any]) -> Form:
        _only(options.get("bits"), "bits", (4, 8))
        return Form(
            Layout.GPTQ,
            options["bits"],
            symmetric=False,  # the zeros are stored, whatever they are
            group_size=_group_size(options.get("group_size", 128)),
            zeros_less_one=version == "gptq",
        )

    # Of modules that "-:" excludes there is nothing to say: their weights are not quantized.
    dynamic = (config.get("dynamic") or {}).items()
    forms = [
        ((f"re:{pattern.removeprefix('+:')}",), form({**config, **options}))
        for pattern, options in dynamic
        if not pattern.startswith("-:")
    ]
    return Scheme("gptq", _checked((*forms, (("Linear",), form(config)))))


def _awq(config: Mapping[str, Any]) -> Scheme:
    # Zeros are stored and used whatever `zero_point` says: where it is false they are all 8.
    _only(config.get("bits", config.get("w_bit", 4)), "bits", (4,))
    _only(config.get("backend") or "autoawq", "backend", ("autoawq",))
    version = str(config.get("version") or config.get("format") or "gemm").lower()
    layouts = {"gemm": Layout.AWQ, "gemv": Layout.AWQ_GEMV}
    _only(version, "version", layouts)
    form = Form(
        layouts[version],
        4,
        symmetric=False,
        group_size=_group_size(config.get("group_size", config.get("q_group_size", 128))),
    )
    return Scheme("awq", ((("Linear",), form),))


def _auto_round(config: Mapping[str, Any]) -> Scheme:
    makers = {"auto_round:auto_gptq": _gptq, "auto_round:auto_awq": _awq}
    _only(config.get("packing_format"), "packing_format", makers)
    _only(config.get("data_type") or "int", "data_type", ("int",))
    _only(config.get("rotation_config") or None, "rotation_config", (None,))
    make = makers[config["packing_format"]]
    keys = ("bits", "group_size")
    form = make({key: config[key] for key in keys}).forms[0][1]
    forms = []
    for name, options in (config.get("extra_config") or {}).items():
        found = {key: options.get(key, config[key]) for key in keys}
        if found["bits"] <= 8:  # else it is not quantized
            pattern = f"re:.*?(?:{name})" if set(name) & _SPECIAL else name
            forms.append(((pattern,), make(found).forms[0][1]))
    return Scheme("auto-round", _checked((*forms, (("Linear",), form))))


def _fp8(config: Mapping[str, Any]) -> Scheme:
    _only(config.get("scale_fmt") or "float", "scale_fmt", ("float",))
    _only(config.get("fmt") or "e4m3", "fmt", ("e4m3",))
    block = config.get("weight_block_size")
    form = Form(Layout.PLAIN, 8, floating=True, block=_block(block) if block else None)
    return Scheme("fp8", ((("Linear",), form),))


def _fbgemm_fp8(config: Mapping[str, Any]) -> Scheme:
    return Scheme("fbgemm_fp8", ((("Linear",), Form(Layout.PLAIN, 8, floating=True)),))


def _modelopt(config: Mapping[str, Any]) -> Scheme:
    algorithm = config.get("quantization", config).get("quant_algo")
    _only(algorithm, "quant_algo", ("FP8", "FP8_PER_CHANNEL_PER_TOKEN"))
    return Scheme("modelopt", ((("Linear",), Form(Layout.PLAIN, 8, floating=True)),))


def _compressed_tensors(config: Mapping[str, Any]) -> Scheme:
    _only(config.get("transform_config") or None, "transform_config", (None,))
    sparsity = (config.get("sparsity_config") or {}).get("format", "dense")
    _only(sparsity, "sparsity_config.format", ("dense",))
    status = config.get("quantization_status", "compressed")
    _only(status, "quantization_status", ("compressed", "frozen"))
    forms = []
    for group in (config.get("config_groups") or {}).values():
        if not isinstance(group, dict):
            raise _Unsupported("presets in config_groups")
        if group.get("weights") is None:
            continue
        form = _compressed_form(group["weights"], group.get("format") or config["format"])
        forms.append((tuple(str(target) for target in group["targets"]), form))
    ignored = tuple(str(name) for name in config.get("ignore") or ())
    _compile(ignored)
    return Scheme("compressed-tensors", _checked(tuple(forms)), ignored)


def _compressed_form(weights: Mapping[str, Any], stored: str) -> Form:
    kinds = {
        "pack-quantized": Layout.PACKED,
        "naive-quantized": Layout.PLAIN,
        "int-quantized": Layout.PLAIN,
        "float-quantized": Layout.PLAIN,
    }
    _only(stored, "format", kinds)
    layout, floating = kinds[stored], weights.get("type", "int") == "float"
    bits = (4, 8) if layout is Layout.PACKED and not floating else (8,)
    _only(weights.get("num_bits", 8), f"{weights.get('type', 'int')} num_bits", bits)
    size, block = weights.get("group_size"), weights.get("block_structure")
    strategy = weights.get("strategy") or {None: "tensor", -1: "channel"}.get(size, "group")
    _only(strategy, "strategy", ("tensor", "channel", "group", "block"))
    if layout is Layout.PACKED and (floating or strategy == "block"):
        raise _Unsupported(f"format {stored!r} of {'floats' if floating else 'blocks'}")
    return Form(
        layout,
        weights.get("num_bits", 8),
        floating,
        bool(weights.get("symmetric", True)),
        _group_size(size) if strategy == "group" else None,
        _block(block) if strategy == "block" else None,
    )


def _group_size(value: Any) -> int | None:
    if value in (-1, None):
        return None
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"group_size {value!r}")
    return value


def _block(value: Any) -> tuple[int, int]:
    if isinstance(value, str):  # "128x128"
        value = value.split("x")
    rows, columns = (int(side) for side in value)
    if rows < 1 or columns < 1:
        raise ValueError(f"blocks of {value!r}")
    return rows, columns


def _checked(forms: Forms) -> Forms:
    """The same, if their patterns are."""
    for patterns, _ in forms:
        _compile(patterns)
    return forms


def _compile(patterns: Sequence[str]) -> None:
    for pattern in patterns:
        if pattern.startswith("re:"):
            re.compile(pattern.removeprefix("re:"))


def _only(value: Any, name: str, supported: Any) -> None:
    if value not in supported:
        raise _Unsupported(f"{name} {value!r}")


def _names(pattern: str, module: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), module) is not None
    return pattern == module


def _is_class(pattern: str, module: str) -> bool:
    """Every weight that is asked for as quantized belongs to a torch.nn.Linear."""
    return pattern == "Linear"


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: {type(error).__name__}: {error}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{file}: is no object")
    return found


_METHODS = {
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed_tensors,
    "fp8": _fp8,
    "fbgemm_fp8": _fbgemm_fp8,
    "modelopt": _modelopt,
    "auto-round": _auto_round,
}
