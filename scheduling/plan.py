"""The plain data of a step: what to run, what came out, and how much there is to run it on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from baton.types import Logprob
from scheduling.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a worker has. `max_context` is the model's longest prompt plus output, in tokens."""

    blocks: int
    block_size: int
    max_tokens: int  # token budget of one pass
    max_sequences: int  # sequences in one pass
    max_context: int
    host_blocks: int = 0  # KV blocks in host memory, for sequences that are swapped out
    depth: int = 1  # passes at a time, of disjoint sequences: pipeline stages; limits are per pass

    @property
    def longest_sequence(self) -> int:
        """Longest prompt plus output that the blocks have room for, too: the KV of the last token
        is never computed."""
        return min(self.max_context, self.blocks * self.block_size + 1)

    def blocks_for(self, tokens: int) -> int:
        """KV blocks that hold `tokens` tokens."""
        return -(-tokens // self.block_size)


class Chunk(NamedTuple):
    """Tokens [start, start + length) of a sequence in one pass; `sample` if they are its last.

    A tuple, because every pass makes one for each of its sequences.
    """

    sequence: Sequence
    start: int
    length: int
    sample: bool


@dataclass(frozen=True, slots=True)
class Swap:
    """The KV of one sequence moves between device and host: `device[i]` and `host[i]` hold the
    same tokens. Both lists belong to the swap until a `StepResult` names its number, whatever
    happens to the sequence meanwhile."""

    number: int  # counts up in a scheduler
    sequence: Sequence
    device: tuple[int, ...]
    host: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One forward pass. Every chunk's blocks are allocated; generating sequences come first.

    The swaps begin with the pass, those out before those in, and go on beside it and beside later
    ones (proactive). With `swaps_first` the pass computes only when they are complete (reactive):
    then a chunk, or a swap in, may use blocks that a swap out of the same plan frees.
    A plan without chunks asks to wait until at least one unfinished swap is complete.
    """

    chunks: tuple[Chunk, ...]
    swap_out: tuple[Swap, ...] = ()
    swap_in: tuple[Swap, ...] = ()
    swaps_first: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of the pass."""
        return sum(chunk.length for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class Sampled:
    """One sampled token, with its logprob if the request asks for it."""

    token_id: int
    logprob: Logprob | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a pass gave.

    `sampled[i]` belongs to `plan.chunks[i]` (None where the chunk does not sample).
    `prompt_logprobs[i]` holds, for each position of the chunk whose request asks for it and that
    predicts another prompt token, the logprob of that next token; empty otherwise. `seconds` is
    the wall time of the pass. `swapped` names the swaps, of this plan or earlier ones, that have
    completed since the last result; each is named once.
    """

    sampled: tuple[Sampled | None, ...]
    prompt_logprobs: tuple[tuple[Logprob, ...], ...]
    seconds: float
    swapped: tuple[int, ...] = ()
