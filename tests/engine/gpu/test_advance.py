"""A pass's inputs after the device has advanced them itself."""

from __future__ import annotations

import torch

from engine.gpu.kernels.advance import advance


def test_rows_go_on_at_their_next_position_until_their_blocks_are_full(
    device: torch.device,
) -> None:
    def column(*numbers: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor(numbers, dtype=dtype, device=device)

    # In the middle of a block, at its end, at the end of all its blocks, and a spare row.
    positions = column(5, 7, 15, 0)
    contexts = column(6, 8, 16, 0, dtype=torch.int32)
    slots = column(99, 99, 99, -1)
    token_ids = column(1, 2, 3, 4)
    tables = column(4, 9, 2, 7, 8, 6, 0, 0, dtype=torch.int32).view(4, 2)
    for tokens in (column(10, 20, 30, 40), column(11, -1, 31, 41)):
        advance(
            tokens,
            token_ids=token_ids,
            positions=positions,
            contexts=contexts,
            slots=slots,
            block_tables=tables,
            limits=column(16, 16, 16, 0),
            block_size=8,
        )
    assert token_ids.tolist() == [11, 0, 3, 4]
    assert positions[:2].tolist() == [7, 9]
    assert contexts.tolist() == [8, 10, 0, 0]
    assert slots.tolist() == [4 * 8 + 7, 7 * 8 + 1, -1, -1]


def test_a_batch_without_rows_is_left_alone(device: torch.device) -> None:
    none = torch.zeros(0, dtype=torch.int64, device=device)
    tables = torch.zeros(0, 3, dtype=torch.int32, device=device)
    advance(
        none,
        token_ids=none,
        positions=none,
        contexts=none,
        slots=none,
        block_tables=tables,
        limits=none,
        block_size=16,
    )
