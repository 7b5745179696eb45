"""From a plan to tensors: which tokens, where they stand, and where their KV goes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.attention.contract import Batch
from scheduling.plan import Chunk, StepPlan


@dataclass(frozen=True, slots=True)
class ChunkLogits:
    """Rows of a pass's logits that belong to one chunk.

    `prompt` are the rows that predict the prompt tokens [start + 1, start + 1 + len(prompt)),
    wanted for prompt logprobs; `sample` is the row that predicts the next token.
    """

    prompt: range
    sample: int | None


def build_batch(
    plan: StepPlan, block_size: int, device: torch.device | str = "cpu"
) -> tuple[Batch, tuple[ChunkLogits, ...]]:
    """The tensors of one pass, and where each chunk finds its logits."""
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    logit_rows: list[int] = []
    logits: list[ChunkLogits] = []
    for chunk in plan.chunks:
        first, end = len(token_ids), chunk.start + chunk.length
        token_ids += chunk.sequence.tokens[chunk.start : end]
        positions += range(chunk.start, end)
        slots += _slots(chunk, block_size)
        prompt = _prompt_rows(chunk)
        wanted = list(range(first, first + prompt))
        last = first + chunk.length - 1
        if chunk.sample and last not in wanted[-1:]:
            wanted.append(last)
        begin = len(logit_rows)
        logit_rows += wanted
        sample = len(logit_rows) - 1 if chunk.sample else None
        logits.append(ChunkLogits(range(begin, begin + prompt), sample))
    flat = torch.tensor([token_ids, positions, slots], dtype=torch.int64).to(device)
    batch = Batch(
        token_ids=flat[0],
        positions=flat[1],
        slots=flat[2],
        starts=tuple(chunk.start for chunk in plan.chunks),
        lengths=tuple(chunk.length for chunk in plan.chunks),
        block_tables=torch.tensor(_block_tables(plan, block_size), dtype=torch.int64).to(device),
        prompt_lengths=tuple(chunk.sequence.prompt_length for chunk in plan.chunks),
        logit_rows=torch.tensor(logit_rows, dtype=torch.int64).to(device),
    )
    return batch, tuple(logits)


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
