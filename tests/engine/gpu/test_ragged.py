"""Where sequences begin and end, as kernels read it."""

from __future__ import annotations

import torch

from engine.gpu.ragged import Ragged
from tests.engine.gpu.attention_scene import Scene


def test_every_query_of_a_chunk_is_in_one_tile_and_long_work_comes_first(
    device: torch.device,
) -> None:
    scene = Scene(device, [(0, 9), (7, 1), (3, 8), (100, 2)])
    ragged = Ragged.of(scene.batch)
    assert ragged.contexts.tolist() == [9, 8, 11, 102]
    assert ragged.longest_single(16) == 8
    chunks = ragged.chunks
    assert chunks is not None
    assert chunks.singles.members.tolist() == [1]
    assert chunks.rows.tolist() == [0, 9, 10, 18]
    assert chunks.longest == 9
    assert chunks.tiles(4).tolist() == [[3, 0], [0, 8], [2, 4], [0, 4], [2, 0], [0, 0]]
    assert chunks.tiles(4) is chunks.tiles(4)
    assert chunks.tiles(100).tolist() == [[3, 0], [2, 0], [0, 0]]


def test_parts_are_aligned_so_that_kernels_are_compiled_once(device: torch.device) -> None:
    ragged = Ragged.of(Scene(device, [(0, 9), (7, 1), (3, 8)]).batch)
    chunks = ragged.chunks
    assert chunks is not None
    first = ragged.contexts.data_ptr()
    for part in (chunks.starts, chunks.lengths, chunks.rows, chunks.singles.members):
        assert (part.data_ptr() - first) % 16 == 0
        assert part.dtype is torch.int32


def test_a_pass_of_single_tokens_needs_no_choice_of_rows(device: torch.device) -> None:
    ragged = Ragged.of(Scene(device, [(7, 1), (3, 1)]).batch)
    assert ragged.chunks is None
    assert ragged.singles is None
    assert ragged.longest_single(16) == 8


def test_single_tokens_of_unknown_contexts_are_bounded_by_their_tables(
    device: torch.device,
) -> None:
    contexts = torch.tensor([3, 0], dtype=torch.int32, device=device)
    ragged = Ragged.of_singles(contexts, torch.zeros(2, 5, dtype=torch.int32, device=device))
    assert ragged.longest_single(16) == 80
    assert ragged.singles is None
