"""What ranks tell each other, as few bytes.

A pass goes out as what cannot be derived: token ids, spans, block tables, rows. Its output comes
back as token ids, and logits only where all of them are wanted. The first word of what rank 0 says
is its Kind.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.attention.contract import Batch
from engine.model.model import Output

_Integers = NDArray[np.int32]
_WORD = 4


class Kind(IntEnum):
    """What a rank is told to do."""

    PASS = 0  # run its share of a batch
    OPEN = 1  # begin with a new pool; a Room and the memory's descriptor follow
    TRIAL = 2  # what the device's memory is used for from now on is measured
    MEASURE = 3  # give the pool up, and answer what was taken
    SAVE = 4  # moves: of blocks, to or from host memory (engine/parallel/store.py)
    LOAD = 5
    SWAP_OUT = 6
    SWAP_IN = 7
    ROWS = 8  # launch a generation pass (engine/parallel/lockstep.py)
    RECORD = 9  # record the graphs of generation passes


@dataclass(frozen=True, slots=True)
class Move:
    """Blocks that every rank copies, each its share of them."""

    kind: Kind
    number: int  # that a rank says when it is done
    blocks: tuple[int, ...]  # of the device
    host: tuple[int, ...] = ()  # of the rank's own host memory, for swaps


def say(kind: Kind, *numbers: int) -> bytes:
    """A message of a few numbers."""
    return np.array([kind, *numbers], np.int32).tobytes()


def kind_of(message: bytes) -> Kind:
    """What a message is about."""
    return Kind(int.from_bytes(message[:_WORD], byteorder=sys.byteorder))


def pack_move(move: Move) -> bytes:
    """A move."""
    return say(move.kind, move.number, len(move.blocks), *move.blocks, *move.host)


def unpack_move(data: bytes) -> Move:
    """The move that was packed."""
    kind, number, count, *blocks = np.frombuffer(data, np.int32).tolist()
    return Move(Kind(kind), number, tuple(blocks[:count]), tuple(blocks[count:]))


def pack(batch: Batch) -> bytes:
    """A batch that lies in host memory."""
    tables = batch.block_tables
    counts = [
        Kind.PASS,
        len(batch.token_ids),
        *tables.shape,
        len(batch.logit_rows),
        batch.whole_rows,
    ]
    parts = (
        np.array([*counts, *batch.starts, *batch.lengths, *batch.prompt_lengths], np.int32),
        batch.token_ids.numpy().astype(np.int32),
        tables.numpy().astype(np.int32).ravel(),
        batch.logit_rows.numpy().astype(np.int32),
    )
    return np.concatenate(parts).tobytes()


def unpack(data: bytes, block_size: int) -> Batch:
    """The batch that was packed."""
    numbers: _Integers = np.frombuffer(data, np.int32)
    tokens, sequences, width, wanted, whole = numbers[1:6].tolist()
    sizes = (sequences, sequences, sequences, tokens, sequences * width, wanted)
    starts, lengths, prompts, token_ids, tables, rows = np.split(numbers[6:], np.cumsum(sizes)[:-1])
    tables = tables.reshape(sequences, width)
    positions, slots = _places(starts, lengths, tables, block_size)
    return Batch(
        token_ids=_tensor(token_ids),
        positions=_tensor(positions),
        slots=_tensor(slots),
        starts=tuple(starts.tolist()),
        lengths=tuple(lengths.tolist()),
        block_tables=_tensor(tables),
        prompt_lengths=tuple(prompts.tolist()),
        logit_rows=_tensor(rows),
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


def _tensor(values: NDArray[np.integer]) -> Tensor:
    return torch.from_numpy(values.astype(np.int64))


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
