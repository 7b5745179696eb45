"""What ranks tell each other about a pass, as few bytes.

A pass goes out as what cannot be derived: token ids, spans, block tables, rows. Its output comes
back as token ids, and logits only where all of them are wanted.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.attention.contract import Batch
from engine.model.model import Output

_Integers = NDArray[np.int32]


def pack(batch: Batch) -> bytes:
    """A batch that lies in host memory."""
    tables = batch.block_tables
    counts = [len(batch.token_ids), *tables.shape, len(batch.logit_rows), batch.whole_rows]
    parts = (
        np.array([*counts, *batch.starts, *batch.lengths, *batch.prompt_lengths], np.int32),
        batch.token_ids.numpy().astype(np.int32),
        tables.numpy().astype(np.int32).ravel(),
        batch.logit_rows.numpy().astype(np.int32),
    )
    return np.concatenate(parts).tobytes()


def unpack(data: bytes, block_size: int, device: torch.device | str = "cpu") -> Batch:
    """The batch that was packed, on `device`."""
    numbers: _Integers = np.frombuffer(data, np.int32)
    tokens, sequences, width, wanted, whole = numbers[:5].tolist()
    sizes = (sequences, sequences, sequences, tokens, sequences * width, wanted)
    starts, lengths, prompts, token_ids, tables, rows = np.split(numbers[5:], np.cumsum(sizes)[:-1])
    tables = tables.reshape(sequences, width)
    positions, slots = _places(starts, lengths, tables, block_size)
    return Batch(
        token_ids=_tensor(token_ids, device),
        positions=_tensor(positions, device),
        slots=_tensor(slots, device),
        starts=tuple(starts.tolist()),
        lengths=tuple(lengths.tolist()),
        block_tables=_tensor(tables, device),
        prompt_lengths=tuple(prompts.tolist()),
        logit_rows=_tensor(rows, device),
        whole_rows=whole,
    )


def _places(
    starts: _Integers, lengths: _Integers, tables: _Integers, block_size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Position and slot of each token."""
    sequence = np.repeat(np.arange(len(starts)), lengths)
    first_row = np.cumsum(lengths) - lengths
    positions = np.arange(len(sequence)) + (starts - first_row)[sequence]
    block, offset = np.divmod(positions, block_size)
    return positions, tables[sequence, block].astype(np.int64) * block_size + offset


def _tensor(values: NDArray[np.integer], device: torch.device | str) -> Tensor:
    return torch.from_numpy(values.astype(np.int64)).to(device)


def pack_output(output: Output) -> bytes:
    """An output."""
    logits = output.logits.contiguous().cpu().view(-1).view(torch.uint8)
    return output.best.cpu().numpy().tobytes() + logits.numpy().tobytes()


def unpack_output(data: bytes, batch: Batch, vocab_size: int, dtype: torch.dtype) -> Output:
    """The output of `batch` that was packed; its logits are in `dtype`."""
    best = 8 * (len(batch.logit_rows) - batch.whole_rows)
    numbers = bytearray(data)  # torch wants memory that it may write to
    return Output(
        _from(numbers, best, dtype).view(batch.whole_rows, vocab_size),
        _from(numbers[:best], 0, torch.int64),
    )


def _from(data: bytearray, offset: int, dtype: torch.dtype) -> Tensor:
    if len(data) == offset:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype, offset=offset)
