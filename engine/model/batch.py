"""From a plan to tensors: which tokens, where they stand, and where their KV goes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.attention.contract import Batch
from engine.model.sampler import is_plain_greedy
from scheduling.plan import Chunk, StepPlan


@dataclass(frozen=True, slots=True)
class ChunkRows:
    """Where one chunk finds its part of a pass's output.

    `prompt` are the rows of logits that predict the prompt tokens
    [start + 1, start + 1 + len(prompt)), wanted for prompt logprobs. A chunk that samples has
    either `sample`, the row of logits that predicts the next token, or `best`, its place among
    the tokens with the largest logits.
    """

    prompt: range
    sample: int | None
    best: int | None


def build_batch(
    plan: StepPlan, block_size: int, device: torch.device | str = "cpu"
) -> tuple[Batch, tuple[ChunkRows, ...]]:
    """The tensors of one pass, and where each chunk finds its part of the output."""
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    whole: list[int] = []  # rows of the flat batch of which all logits are wanted
    best: list[int] = []
    rows: list[ChunkRows] = []
    for chunk in plan.chunks:
        first, end = len(token_ids), chunk.start + chunk.length
        token_ids += chunk.sequence.tokens[chunk.start : end]
        positions += range(chunk.start, end)
        slots += _slots(chunk, block_size)
        rows.append(_rows(chunk, first, whole, best))
    flat = _integers([token_ids, positions, slots]).to(device)
    batch = Batch(
        token_ids=flat[0],
        positions=flat[1],
        slots=flat[2],
        starts=tuple(chunk.start for chunk in plan.chunks),
        lengths=tuple(chunk.length for chunk in plan.chunks),
        block_tables=_integers(_block_tables(plan, block_size)).to(device),
        prompt_lengths=tuple(chunk.sequence.prompt_length for chunk in plan.chunks),
        logit_rows=_integers(whole + best).to(device),
        whole_rows=len(whole),
    )
    return batch, tuple(rows)


def _integers(values: list[int] | list[list[int]]) -> Tensor:
    """An int64 tensor; numpy reads nested lists five times as fast as torch does."""
    return torch.from_numpy(np.array(values, dtype=np.int64))


def _rows(chunk: Chunk, first: int, whole: list[int], best: list[int]) -> ChunkRows:
    """Ask for what the chunk, whose tokens begin at row `first` of the flat batch, needs."""
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
        chunk.sequence.blocks[(end - 1) // block_size]
        for chunk in plan.chunks
        if (end := chunk.start + chunk.length) % block_size
        and chunk.start <= (end - 1) // block_size * block_size
    ]


def _slots(chunk: Chunk, block_size: int) -> list[int]:
    """Where the KV of each token goes: block * block_size + offset."""
    blocks = chunk.sequence.blocks
    return [
        blocks[position // block_size] * block_size + position % block_size
        for position in range(chunk.start, chunk.start + chunk.length)
    ]


def _prompt_rows(chunk: Chunk) -> int:
    """How many of the chunk's rows predict a prompt token whose logprob is wanted."""
    sequence = chunk.sequence
    if sequence.request.prompt_logprobs is None:
        return 0
    return max(0, min(chunk.start + chunk.length, sequence.prompt_length - 1) - chunk.start)


def _block_tables(plan: StepPlan, block_size: int) -> list[list[int]]:
    """The blocks that hold each chunk's context, padded to one width with the last of them."""
    used = [
        chunk.sequence.blocks[: -(-(chunk.start + chunk.length) // block_size)]
        for chunk in plan.chunks
    ]
    width = max(map(len, used))
    return [blocks + blocks[-1:] * (width - len(blocks)) for blocks in used]
