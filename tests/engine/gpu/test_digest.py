"""Digests of blocks, against numpy's arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.gpu.kernels.digest import digests, transfer

_WIDTH = 2 * 4100  # bytes of a block: one program does not get through


def _storage(device: torch.device, count: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """[count, 2, ...] of `dtype`: random bytes."""
    generator = torch.Generator().manual_seed(count)
    shape = (count, 2, _WIDTH // 2)
    found = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return found.to(device).view(dtype)


def _numbers(device: torch.device, *numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device=device)


def _expected(storage: Tensor, blocks: list[int], first: int) -> list[int]:
    """The definition, in Python's integers: 64 bits, unsigned."""
    every, mask = storage.cpu().view(torch.uint8).reshape(len(storage), -1).numpy(), 2**64 - 1
    found = []
    for position, block in enumerate(blocks, first):
        words = [int(word) for word in every[block].view(np.uint64)]
        total = 0
        for column, word in enumerate(words):
            x = word + (position * len(words) + column) * 0x2545F4914F6CDD1D & mask
            x = (x ^ x >> 27) * 0x3C79AC492BA7B653 & mask
            x = (x ^ x >> 33) * 0x1C69B3F74AC4AE35 & mask
            total += x ^ x >> 27
        found.append(total & mask)
    return found


def _unsigned(sums: Tensor) -> list[int]:
    return [value % 2**64 for value in sums.tolist()]


def _same(found: Tensor, expected: Tensor) -> bool:
    return torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


def test_digests_are_those_of_the_definition(device: torch.device) -> None:
    storage = _storage(device, 5)
    found = digests(storage, _numbers(device, 4, 0), 7)
    assert _unsigned(found) == _expected(storage, [4, 0], 7)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn], ids=str
)
def test_a_copy_is_whole_and_its_digests_are_the_source_s(
    device: torch.device, dtype: torch.dtype
) -> None:
    source, target = _storage(device, 6, dtype), _storage(device, 4, dtype)
    expected = target.clone()
    bytes_there = source.view(torch.uint8)
    expected.view(torch.uint8)[_numbers(device, 1, 3)] = bytes_there[_numbers(device, 5, 2)]
    found = transfer(source, _numbers(device, 5, 2), target, _numbers(device, 1, 3), 3)
    assert _same(target, expected)
    assert torch.equal(found, digests(source, _numbers(device, 5, 2), 3))
    assert torch.equal(found, digests(target, _numbers(device, 1, 3), 3))


def test_a_bit_a_place_and_a_position_count(device: torch.device) -> None:
    storage = _storage(device, 1).repeat(5, 1, 1)
    storage[1, 1, 4000] ^= 1  # a bit
    words = storage[2].view(-1).view(torch.int64)
    words[[3, 1000]] = words[[1000, 3]]  # two words in each other's place
    storage[3, 0, :8] += 1  # that of a carry
    found = [int(digests(storage, _numbers(device, block), 9)) for block in range(5)]
    assert found[4] == found[0]
    assert len(set(found[:4])) == 4
    assert int(digests(storage, _numbers(device, 0), 10)) not in found


def test_blocks_of_zeros_have_digests_that_differ_by_position(device: torch.device) -> None:
    zeros = torch.zeros(1, 2, 64, dtype=torch.uint8, device=device)
    found = digests(zeros, _numbers(device, 0, 0, 0), 0)
    assert len(set(found.tolist())) == 3


def test_no_blocks_have_no_digests(device: torch.device) -> None:
    storage, none = _storage(device, 2), _numbers(device)
    assert digests(storage, none, 0).shape == (0,)
    assert transfer(storage, none, storage, none, 0).shape == (0,)
