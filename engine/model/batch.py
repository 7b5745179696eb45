"""From a plan to tensors: which tokens, where they stand, and where their KV goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from engine.attention.contract import Batch
from engine.model.sampler import is_plain_greedy
from scheduling.plan import Chunk, StepPlan
from scheduling.sequence import Sequence

_NO_ROWS = range(0)


class ChunkRows(NamedTuple):
    """Where one chunk finds its part of a pass's output.

    `prompt` are the rows of logits that predict the prompt tokens
    [start + 1, start + 1 + len(prompt)), wanted for prompt logprobs. A chunk that samples has
    either `sample`, the row of logits that predicts the next token, or `best`, its place among
    the tokens with the largest logits.
    """

    prompt: range
    sample: int | None
    best: int | None


class BatchBuilder:
    """Makes the tensors of one pass after another.

    Keeps the block tables of the last pass: a sequence that was in it needs to be looked at only
    where it has a new block. Relies on lists of blocks that only grow; a sequence that loses blocks
    gets a new list.
    """

    def __init__(self, block_size: int, device: torch.device | str = "cpu") -> None:
        self._block_size = block_size
        self._device = device
        self._tables = _Tables()

    def build(self, plan: StepPlan) -> tuple[Batch, tuple[ChunkRows, ...]]:
        """The tensors of one pass, and where each chunk finds its part of the output. They share
        no memory with those of other passes."""
        chunks, device = plan.chunks, self._device
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        for sequence, start, length, _ in chunks:
            if length == 1:
                token_ids.append(sequence.tokens[start])
                positions.append(start)
            else:
                token_ids += sequence.tokens[start : start + length]
                positions += range(start, start + length)
            slots += self._slots(sequence.blocks, start, length)
        whole: list[int] = []  # rows of the flat batch of which all logits are wanted
        best: list[int] = []
        rows = self._rows(chunks, whole, best)
        tables = self.tables(chunks)
        flat = torch.from_numpy(np.array((token_ids, positions, slots), dtype=np.int64)).to(device)
        wanted = torch.from_numpy(np.array(whole + best, dtype=np.int64)).to(device)
        batch = Batch(
            token_ids=flat[0],
            positions=flat[1],
            slots=flat[2],
            starts=tuple([chunk.start for chunk in chunks]),
            lengths=tuple([chunk.length for chunk in chunks]),
            block_tables=torch.from_numpy(tables).to(device),
            prompt_lengths=tuple([chunk.sequence.prompt_length for chunk in chunks]),
            logit_rows=wanted,
            whole_rows=len(whole),
        )
        return batch, rows

    def tables(self, chunks: tuple[Chunk, ...]) -> NDArray[np.int64]:
        """The block tables of a pass, [S, width]: rows end in repeats of their last block."""
        return self._tables.of(chunks, self._block_size)

    def _slots(self, blocks: list[int], start: int, length: int) -> list[int]:
        """Where the KV of each token goes: block * block_size + offset."""
        size = self._block_size
        if length == 1:
            return [blocks[start // size] * size + start % size]
        return [blocks[at // size] * size + at % size for at in range(start, start + length)]

    def _rows(
        self, chunks: tuple[Chunk, ...], whole: list[int], best: list[int]
    ) -> tuple[ChunkRows, ...]:
        """Ask for what each chunk needs, by rows of the flat batch."""
        rows, first = [], 0
        for chunk in chunks:
            rows.append(_rows(chunk, first, whole, best))
            first += chunk.length
        return tuple(rows)


def build_batch(
    plan: StepPlan, block_size: int, device: torch.device | str = "cpu"
) -> tuple[Batch, tuple[ChunkRows, ...]]:
    """One pass by itself."""
    return BatchBuilder(block_size, device).build(plan)


@dataclass(slots=True)
class _Table:
    """What is known of one sequence's row of `_Tables`."""

    row: int
    blocks: list[int]  # the sequence's own list
    used: int  # of its blocks; the row goes on with the last of them


class _Tables:
    """The block tables of the sequences in the last pass."""

    def __init__(self) -> None:
        self._known: dict[Sequence, _Table] = {}
        self._free: list[int] = []
        self._array = np.zeros((0, 1), dtype=np.int64)

    def of(self, chunks: tuple[Chunk, ...], block_size: int) -> NDArray[np.int64]:
        """The blocks that hold each chunk's context, padded to one width with the last of them:
        [S, width], a copy."""
        before, places, width = self._known, [], 0
        known: dict[Sequence, _Table] = {}
        for sequence, start, length, _ in chunks:
            used = -(-(start + length) // block_size)
            table = before.pop(sequence, None) or known.get(sequence)
            if table is None:
                table = _Table(self._row(), sequence.blocks, 0)
            if table.used != used or table.blocks is not sequence.blocks:
                self._write(table, sequence.blocks, used)
            known[sequence] = table
            places.append(table.row)
            width = max(width, used)
        self._free += [table.row for table in before.values()]
        self._known = known
        return self._array[places, :width]

    def _write(self, table: _Table, blocks: list[int], used: int) -> None:
        if used > self._array.shape[1]:
            self._widen(used)
        kept = table.used if table.blocks is blocks and table.used < used else 0
        row = self._array[table.row]
        row[kept:used] = blocks[kept:used]
        row[used:] = blocks[used - 1]
        table.blocks, table.used = blocks, used

    def _row(self) -> int:
        """One that is free."""
        if not self._free:
            rows, width = self._array.shape
            self._array = np.concatenate((self._array, np.zeros((rows + 8, width), np.int64)))
            self._free = list(range(rows, len(self._array)))
        return self._free.pop()

    def _widen(self, width: int) -> None:
        repeats = np.repeat(self._array[:, -1:], width, axis=1)
        self._array = np.concatenate((self._array, repeats), axis=1)


def _rows(chunk: Chunk, first: int, whole: list[int], best: list[int]) -> ChunkRows:
    """Ask for what the chunk, whose tokens begin at row `first` of the flat batch, needs."""
    wanted = _NO_ROWS
    if chunk.sequence.request.prompt_logprobs is not None:
        begin, prompt = len(whole), _prompt_rows(chunk)
        whole += range(first, first + prompt)
        wanted = range(begin, begin + prompt)
    if not chunk.sample:
        return ChunkRows(wanted, None, None)
    last = first + chunk.length - 1
    if is_plain_greedy(chunk.sequence):
        best.append(last)
        return ChunkRows(wanted, None, len(best) - 1)
    whole.append(last)
    return ChunkRows(wanted, len(whole) - 1, None)


def begun_blocks(plan: StepPlan, block_size: int) -> list[int]:
    """Blocks that the pass begins to fill and does not fill to the end."""
    return [
        chunk.sequence.blocks[place]
        for chunk in plan.chunks
        if (place := _begun(chunk.start, chunk.length, block_size)) is not None
    ]


def begun_in(batch: Batch, block_size: int) -> list[int]:
    """`begun_blocks` of the plan that a batch, which lies in host memory, was made of."""
    tables = batch.block_tables.numpy()
    return [
        int(tables[row, place])
        for row, span in enumerate(zip(batch.starts, batch.lengths, strict=True))
        if (place := _begun(*span, block_size)) is not None
    ]


def _begun(start: int, length: int, block_size: int) -> int | None:
    """The place in the block table of the block that a chunk begins to fill and does not fill to
    the end; None if there is none."""
    end = start + length
    last = (end - 1) // block_size
    return last if end % block_size and start <= last * block_size else None


def _prompt_rows(chunk: Chunk) -> int:
    """How many of the chunk's rows predict a prompt token."""
    end = min(chunk.start + chunk.length, chunk.sequence.prompt_length - 1)
    return max(0, end - chunk.start)
