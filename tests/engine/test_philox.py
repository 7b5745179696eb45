"""Philox against its published vectors, and what the sampler relies on."""

from __future__ import annotations

import pytest
import torch

from engine.model.philox import philox4x32, uniforms

CPU = torch.device("cpu")

# Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, result.
KNOWN_ANSWERS = [
    (
        (0, 0, 0, 0),
        (0, 0),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    k0, k1 = (torch.tensor([word]) for word in key)
    words = philox4x32((c0, c1, c2, c3), (k0, k1))
    assert tuple(int(word) for word in words) == expected


def test_every_part_of_the_counter_and_both_halves_of_the_seed_matter() -> None:
    rows = [(0, 0, 0), (1, 0, 0), (1 << 32, 0, 0), (1 << 63, 0, 0), (0, 1, 0), (0, 0, 1)]
    seeds, streams, positions = zip(*rows, strict=True)
    numbers = uniforms(seeds, streams, positions, 8, CPU)
    assert len({tuple(row) for row in numbers.tolist()}) == len(rows)


def test_numbers_of_a_row_do_not_depend_on_the_other_rows_or_on_how_many_are_drawn() -> None:
    together = uniforms([3, 2**64 - 1, 5], [0, 1, 2], [9, 8, 7], 11, CPU)
    alone = uniforms([2**64 - 1], [1], [8], 3, CPU)
    assert torch.equal(together[1, :3], alone[0])


def test_numbers_are_uniform_and_never_reach_the_ends() -> None:
    numbers = uniforms(range(1000), [0] * 1000, [0] * 1000, 100, CPU).flatten()
    assert float(numbers.min()) > 0.0 and float(numbers.max()) < 1.0
    counts = torch.histc(numbers.float(), bins=100, min=0.0, max=1.0)
    chi_square = float(((counts - 1000) ** 2 / 1000).sum())
    assert chi_square < 148.2  # 99 degrees of freedom, p = 0.001
