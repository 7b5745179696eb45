"""What a pass has to move and compute, against values worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from baton.errors import ModelError
from engine.bench.work import ModelCount, Part

# Per layer: QKV 8 x (4 + 2 + 2) = 64, output 4 x 8 = 32, MLP 3 x 8 x 16 = 384: 480 in all.
SMALL = ModelCount(
    layer_weights=2 * 480,
    head_weights=8 * 100,
    hidden=8,
    heads=2,
    kv_heads=1,
    head_dim=2,
    windows=(None, None),
    weights="bfloat16",
    kv="bfloat16",
)


def test_one_generated_token_reads_all_weights_and_its_context() -> None:
    work = SMALL.work([Part(start=9, length=1)])
    weights, embedding = 2 * (960 + 800), 2 * 8
    kv = 2 * 10 * (2 * 1 * 2) * 2  # layers, 9 positions read and one written, K and V, bytes
    assert work.bytes == weights + embedding + kv
    attention = 2 * (4 * 2 * 2) * 10  # layers; two products over 2 heads of 2; 10 positions
    assert work.operations == 2 * 960 + 2 * 800 + attention


def test_a_batch_reads_the_weights_once_and_computes_for_each_sequence() -> None:
    one, four = SMALL.work([Part(9, 1)]), SMALL.work([Part(9, 1)] * 4)
    assert four.operations == 4 * one.operations
    weights = 2 * (960 + 800)
    assert four.bytes - weights == 4 * (one.bytes - weights)


def test_a_prompt_chunk_attends_causally_and_needs_one_row_of_the_head() -> None:
    work = SMALL.work([Part(start=2, length=3)])
    attention = 2 * (4 * 2 * 2) * (3 + 4 + 5)  # positions that tokens 2, 3 and 4 attend to
    assert work.operations == 2 * 960 * 3 + 2 * 800 + attention
    assert work.bytes == 2 * (960 + 800) + 3 * 2 * 8 + 2 * 5 * (2 * 1 * 2) * 2


def test_without_sampling_the_head_is_neither_read_nor_computed() -> None:
    with_head, without = SMALL.work([Part(0, 4)]), SMALL.work([Part(0, 4, rows=0)])
    assert with_head.bytes - without.bytes == 2 * 800
    assert with_head.operations - without.operations == 2 * 800


def test_a_window_bounds_what_is_attended_and_read() -> None:
    windowed = replace(SMALL, windows=(None, 4))
    work = windowed.work([Part(start=9, length=1)])
    pairs = 10 + 4
    assert work.operations == 2 * 960 + 2 * 800 + (4 * 2 * 2) * pairs
    assert work.bytes == 2 * (960 + 800) + 2 * 8 + (10 + 4) * (2 * 1 * 2) * 2
    chunk = windowed.work([Part(start=2, length=3, rows=0)])
    assert chunk.operations == 2 * 960 * 3 + (4 * 2 * 2) * ((3 + 4 + 5) + (3 + 4 + 4))


def test_other_formats_change_the_bytes_and_not_the_operations() -> None:
    parts = [Part(9, 1)]
    eight = SMALL.with_weights("int8")
    assert eight.work(parts).operations == SMALL.work(parts).operations
    assert SMALL.work(parts).bytes - eight.work(parts).bytes == 960 + 800 + 8
    four = SMALL.with_weights("int4")
    assert four.work(parts).bytes == eight.work(parts).bytes - (960 + 8) * (1 - 17 / 32)
    assert (SMALL.precision, eight.precision, four.precision) == ("bf16", "int8", "int8")


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral-window", "llama-biases-tied"])
def test_the_matrices_of_a_model_are_all_counted(name: str, tiny: Callable[..., Any]) -> None:
    made = tiny(name)
    count = ModelCount.at(made.path, "float32", "float32")
    modules = {
        key: sum(
            part.weight.numel() for part in module.modules() if isinstance(part, torch.nn.Linear)
        )
        for key, module in (("layers", made.reference.model), ("all", made.reference))
    }
    assert count.layer_weights == modules["layers"]
    assert count.layer_weights + count.head_weights == modules["all"]
    assert count.weight_bytes == 4 * modules["all"]
    assert count.kv_bytes_per_position == 2 * 2 * 2 * count.head_dim * 4


def test_a_model_whose_shape_is_not_known_is_refused(tiny: Callable[..., Any]) -> None:
    with pytest.raises(ModelError):
        ModelCount.at(tiny("opt").path, "float32", "float32")


def test_weights_count_as_large_as_they_are_found_to_be() -> None:
    known = SMALL.measured(layer_bytes=1234, head_bytes=567)
    parts = [Part(9, 1)]
    assert SMALL.work(parts).bytes - known.work(parts).bytes == 2 * (960 + 800) - 1234 - 567
    assert known.work(parts).operations == SMALL.work(parts).operations
    assert known.weight_bytes == 1234 + 567


@pytest.mark.parametrize("kv", ["int8", "float8_e4m3fn"])
def test_kv_of_eight_bits_counts_with_a_scale_for_each_head(kv: str) -> None:
    eight = replace(SMALL, kv=kv)
    assert SMALL.kv_bytes_per_position == 2 * (2 * 1 * 2) * 2
    assert eight.kv_bytes_per_position == 2 * (2 * 1) * (2 + 4)
