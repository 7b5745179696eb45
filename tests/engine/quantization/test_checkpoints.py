"""Weights that others have quantized are read as others read them.

The files in tests/data/quantized were made by the code of GPTQModel, AutoAWQ, AutoRound, ModelOpt,
compressed-tensors and transformers, and so were the weights expected from them (`source` in the
metadata of each).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from baton.errors import ModelError
from engine.model.weights import Checkpoint
from engine.quantization.groupwise import Fp8Quantized, GroupQuantized
from engine.quantization.window import Window, span

NAME = "m.weight"
ReadGolden = Callable[[str], Any]


def test_weights_are_what_the_project_that_packed_them_unpacks(
    golden_name: str, golden: ReadGolden, tmp_path: Path
) -> None:
    case = golden(golden_name)
    checkpoint = Checkpoint(case.save(tmp_path), torch.float32)
    assert NAME in checkpoint
    assert checkpoint.stored_shape(NAME) == tuple(case.expected.shape)
    for found in (
        checkpoint(NAME, *case.expected.shape),
        checkpoint.mapped(NAME, *case.expected.shape),
    ):
        torch.testing.assert_close(found, case.expected, rtol=1e-6, atol=1e-7)
    half = Checkpoint(tmp_path, torch.bfloat16)(NAME, *case.expected.shape)
    assert half.dtype is torch.bfloat16
    torch.testing.assert_close(half.float(), case.expected, rtol=2**-8, atol=1e-7)


def test_the_stored_form_means_the_same(
    golden_name: str, golden: ReadGolden, tmp_path: Path
) -> None:
    case = golden(golden_name)
    found = Checkpoint(case.save(tmp_path), torch.float32).quantized(NAME, *case.expected.shape)
    floating = "float" in golden_name or "fp8" in golden_name
    assert isinstance(found, Fp8Quantized if floating else GroupQuantized)
    torch.testing.assert_close(found.dequantize(), case.expected, rtol=1e-6, atol=1e-7)
    if isinstance(found, GroupQuantized):
        assert found.packed.nbytes == found.shape[0] * found.shape[1] * found.bits // 8


@pytest.mark.parametrize("shards", [2, 4, 5])  # fives cut words and groups
def test_a_window_is_that_of_the_whole(
    shards: int, golden_name: str, golden: ReadGolden, tmp_path: Path
) -> None:
    case = golden(golden_name)
    checkpoint = Checkpoint(case.save(tmp_path), torch.float32)
    out, into = case.expected.shape
    whole = checkpoint.mapped(NAME, out, into)
    for shard in range(shards):
        rows = range(out * shard // shards, out * (shard + 1) // shards)
        columns = range(into * shard // shards, into * (shard + 1) // shards)
        for window in (
            Window(rows, range(into)),
            Window(range(out), columns),
            Window(rows, columns),
        ):
            expected = whole[span(window.outputs), span(window.inputs)]
            assert torch.equal(checkpoint.mapped(NAME, out, into, window=window), expected)
            stored = checkpoint.quantized(NAME, out, into, window)
            if stored is not None:
                assert stored.shape == window.shape
                assert torch.equal(stored.dequantize(), expected)
            else:
                assert "block" in golden_name


def test_groups_that_a_window_cuts_become_smaller_ones(golden: ReadGolden, tmp_path: Path) -> None:
    case = golden("gptq-int4")  # groups of 16, of 64 inputs
    case.tensors["m.g_idx"] = torch.arange(64, dtype=torch.int32) // 32
    case.tensors["m.qzeros"], case.tensors["m.scales"] = (
        case.tensors[f"m.{name}"][:2].contiguous() for name in ("qzeros", "scales")
    )
    case.config["group_size"] = 32
    checkpoint = Checkpoint(case.save(tmp_path), torch.float32)
    sizes = {}
    for begin, end in ((0, 32), (16, 48), (0, 48), (16, 32), (8, 40)):
        window = Window(range(16), range(begin, end))
        found = checkpoint.quantized(NAME, 16, 64, window)
        assert isinstance(found, GroupQuantized)
        dense = checkpoint.mapped(NAME, 16, 64, window=window)
        assert torch.equal(found.dequantize(), dense)
        sizes[begin, end] = found.group_size, found.columns
    assert sizes == {
        (0, 32): (32, 32),
        (16, 48): (16, 32),
        (0, 48): (16, 48),
        (16, 32): (16, 16),
        (8, 40): (16, 48),  # 24 and 8 inputs, filled up
    }


def test_symmetric_weights_carry_no_zeros(golden: ReadGolden, tmp_path: Path) -> None:
    for name, symmetric in (("gptq-int4", True), ("gptq-int4-v2", False), ("awq-int4", False)):
        case = golden(name)
        found = Checkpoint(case.save(tmp_path / name), torch.float32).quantized(
            NAME, *case.expected.shape
        )
        assert isinstance(found, GroupQuantized)
        assert (found.zeros is None) == symmetric


def test_only_act_order_has_an_order(golden: ReadGolden, tmp_path: Path) -> None:
    for name, ordered in (
        ("gptq-int4", False),
        ("gptq-int4-act-order", True),
        ("packed-int4-group", False),
        ("packed-int4-act-order", True),
    ):
        case = golden(name)
        found = Checkpoint(case.save(tmp_path / name), torch.float32).quantized(
            NAME, *case.expected.shape
        )
        assert isinstance(found, GroupQuantized)
        assert (found.order is not None) == ordered


def test_groups_of_unequal_sizes_are_filled_up(golden: ReadGolden, tmp_path: Path) -> None:
    for name in ("gptq-int4-act-order", "gptq-int4-v2", "packed-int4-asymmetric"):
        case = golden(name)
        out, into = case.expected.shape
        generator = torch.Generator().manual_seed(3)
        group_of = torch.randint(2, (into,), generator=generator, dtype=torch.int32)
        case.tensors["m.weight_g_idx" if "packed" in name else "m.g_idx"] = group_of
        checkpoint = Checkpoint(case.save(tmp_path / name), torch.float32)
        found = checkpoint.quantized(NAME, out, into)
        assert isinstance(found, GroupQuantized)
        counts = torch.bincount(group_of)
        assert found.columns == (-(-counts // 16) * 16).sum() > into
        assert found.group_size == 16
        dense = checkpoint(NAME, out, into)
        assert torch.equal(found.dequantize(), dense)
        # What fills groups up is nothing, whatever the input is.
        assert found.order is not None
        each = replace(found, order=None, shape=(out, found.columns)).dequantize()
        repeated = (found.order.diff() == 0).nonzero().flatten() + 1
        assert len(repeated) == found.columns - into
        assert not each[:, repeated].any()


def test_without_group_indices_groups_come_in_order(golden: ReadGolden, tmp_path: Path) -> None:
    case = golden("gptq-int4")
    del case.tensors["m.g_idx"]
    checkpoint = Checkpoint(case.save(tmp_path), torch.float32)
    torch.testing.assert_close(checkpoint(NAME, *case.expected.shape), case.expected)


def test_group_indices_that_compressed_tensors_has_not_used_mean_nothing(
    golden: ReadGolden, tmp_path: Path
) -> None:
    case = golden("packed-int4-group")
    into = case.expected.shape[1]
    case.tensors["m.weight_g_idx"] = torch.full((into,), -1, dtype=torch.int32)
    checkpoint = Checkpoint(case.save(tmp_path), torch.float32)
    torch.testing.assert_close(checkpoint(NAME, *case.expected.shape), case.expected)


def test_dense_weights_beside_quantized_ones_stay_what_they_are(
    golden: ReadGolden, tmp_path: Path
) -> None:
    case = golden("packed-int4-group")
    case.tensors["lm_head.weight"] = torch.randn(4, 3)
    checkpoint = Checkpoint(case.save(tmp_path), torch.float32)
    assert torch.equal(checkpoint("lm_head.weight", 4, 3), case.tensors["lm_head.weight"])
    assert checkpoint.quantized("lm_head.weight", 4, 3) is None


def test_the_dtype_of_a_checkpoint_is_not_that_of_its_scales(
    golden: ReadGolden, tmp_path: Path
) -> None:
    case = golden("fp8-block")  # scales in float32
    case.tensors["norm.weight"] = torch.ones(4, dtype=torch.bfloat16)
    assert Checkpoint(case.save(tmp_path)).dtype is torch.bfloat16


def _drop(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__delitem__(name)


def _cut(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__setitem__(name, tensors[name][:-1].contiguous())


def _cast(name: str, dtype: torch.dtype) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__setitem__(name, tensors[name].to(dtype))


def _fill(name: str, value: int) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__setitem__(name, torch.full_like(tensors[name], value))


@pytest.mark.parametrize(
    ("name", "spoil", "reason"),
    [
        ("gptq-int4", _drop("m.scales"), "'m.scales' is missing"),
        ("gptq-int4", _drop("m.qzeros"), "'m.qzeros' is missing"),
        ("gptq-int4", _cut("m.qweight"), r"'m.qweight' has shape \(7, 16\), .* \(8, 16\)"),
        ("gptq-int4", _cut("m.scales"), r"'m.scales' has shape \(3, 16\)"),
        ("gptq-int4", _cast("m.qweight", torch.int64), "'m.qweight' holds torch.int64, not int32"),
        ("gptq-int4", _cast("m.scales", torch.int32), "'m.scales' holds torch.int32"),
        ("gptq-int4", _fill("m.g_idx", 4), "'m.g_idx' names groups that are not among 4"),
        ("gptq-int4", _fill("m.g_idx", -1), "'m.g_idx' names groups"),
        ("awq-int4", _cut("m.qweight"), r"'m.qweight' has shape \(63, 4\)"),
        ("packed-int4-group", _drop("m.weight_scale"), "'m.weight_scale' is missing"),
        ("packed-int4-group", _fill("m.weight_shape", 3), r"'m.weight_shape' says \[3, 3\]"),
        ("packed-int4-asymmetric", _drop("m.weight_zero_point"), "'m.weight_zero_point' is miss"),
        ("packed-int4-asymmetric", _cut("m.weight_zero_point"), "'m.weight_zero_point' has shape"),
        ("naive-int8-channel", _drop("m.weight_scale"), "'m.weight_scale' is missing"),
        ("naive-int8-channel", _cut("m.weight_scale"), "'m.weight_scale' has shape"),
        ("float-channel", _cut("m.weight"), "'m.weight' has shape"),
        ("float-channel", _drop("m.weight_scale"), "'m.weight_scale' is missing"),
        ("float-block", _cut("m.weight_scale"), r"'m.weight_scale' has shape \(1, 2\)"),
        ("fp8-block", _drop("m.weight_scale_inv"), "'m.weight_scale' is missing"),
    ],
)
def test_what_is_wrong_with_a_weight_is_named(
    name: str,
    spoil: Callable[[dict[str, Tensor]], None],
    reason: str,
    golden: ReadGolden,
    tmp_path: Path,
) -> None:
    case = golden(name)
    spoil(case.tensors)
    checkpoint = Checkpoint(case.save(tmp_path), torch.float32)
    for read in (checkpoint, checkpoint.mapped, checkpoint.quantized):
        with pytest.raises(ModelError, match=reason):
            read(NAME, *case.expected.shape)


def test_a_weight_that_is_quantized_although_ignored_is_refused(
    golden: ReadGolden, tmp_path: Path
) -> None:
    case = golden("packed-int4-group")
    case.config["ignore"] = ["re:m.*"]
    checkpoint = Checkpoint(case.save(tmp_path), torch.float32)
    with pytest.raises(ModelError, match=re.escape("'m' is stored quantized, and quantization_co")):
        checkpoint(NAME, *case.expected.shape)


def test_a_quantized_vector_is_refused(golden: ReadGolden, tmp_path: Path) -> None:
    checkpoint = Checkpoint(golden("gptq-int4").save(tmp_path), torch.float32)
    with pytest.raises(ModelError, match=r"'m\.weight' is quantized but no matrix"):
        checkpoint(NAME, 64)
