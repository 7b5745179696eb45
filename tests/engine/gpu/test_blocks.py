"""Blocks moved as bytes, against torch's indexing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.gpu.kernels import blocks

_FORMATS = [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn]


def _storage(device: torch.device, count: int, dtype: torch.dtype, width: int = 80) -> Tensor:
    """[count, 2, width] of `dtype`: random bytes, not all of them numbers."""
    generator = torch.Generator().manual_seed(count)
    shape = (count, 2, width * dtype.itemsize)
    found = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return found.to(device).view(dtype)


def _numbers(device: torch.device, *numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device=device)


def _same(found: Tensor, expected: Tensor) -> bool:
    return torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("dtype", _FORMATS, ids=str)
def test_what_is_gathered_and_scattered_is_in_its_place(
    device: torch.device, dtype: torch.dtype
) -> None:
    storage = _storage(device, 6, dtype)
    wanted = _numbers(device, 5, 0, 3)
    out = torch.zeros_like(storage[:3])
    assert blocks.gather(storage, wanted, out) is out
    assert _same(out, storage.view(torch.uint8)[wanted])

    target = _storage(device, 7, dtype)
    expected = target.clone()
    expected[_numbers(device, 1, 6, 2)] = out
    blocks.scatter(_numbers(device, 1, 6, 2), out, target)
    assert _same(target, expected)


def test_a_block_longer_than_a_program_moves_as_a_whole(device: torch.device) -> None:
    storage = _storage(device, 4, torch.int8, width=4 * 1700)
    out = torch.empty_like(storage[:2])
    assert _same(blocks.gather(storage, _numbers(device, 3, 1), out), storage[[3, 1]])


def test_cleared_blocks_are_zeros_and_others_are_left_alone(device: torch.device) -> None:
    storage = _storage(device, 5, torch.bfloat16)
    expected = storage.clone()
    expected[_numbers(device, 4, 1)] = 0.0
    blocks.clear(storage, _numbers(device, 4, 1))
    assert _same(storage, expected)


def test_no_blocks_are_no_work(device: torch.device) -> None:
    storage = _storage(device, 2, torch.float32)
    before, none = storage.clone(), _numbers(device)
    blocks.gather(storage, none, storage[:0])
    blocks.scatter(none, storage[:0], storage)
    blocks.clear(storage, none)
    assert _same(storage, before)


@pytest.mark.gpu
def test_a_block_beyond_two_to_the_31_words_is_found(device: torch.device) -> None:
    storage = torch.zeros(1100, 2**23, dtype=torch.uint8, device=device)  # 8.6 GiB
    source = torch.ones(1, 2**23, dtype=torch.uint8, device=device)
    blocks.scatter(_numbers(device, 1099), source, storage)
    assert storage[1099].all()
    assert not storage[:1099].any()
