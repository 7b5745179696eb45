"""What a forward pass is filled with: Dynamic SplitFuse (DeepSpeed-FastGen), or prompts first.

The time of a pass depends on its tokens, not on its sequences, and throughput is concave in
tokens: passes of equal size are best. So long prompts are split and short ones fused until the
budget is met exactly, and generating sequences, one token each, never wait for a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Literal

from scheduling.plan import Chunk
from scheduling.sequence import Sequence

Batching = Callable[[Iterable[Sequence], Iterable[Sequence], int], tuple[Chunk, ...]]
"""(generating, prompts, token budget) -> the chunks of a pass, generation first."""


def splitfuse(
    generating: Iterable[Sequence], prompts: Iterable[Sequence], max_tokens: int
) -> tuple[Chunk, ...]:
    """Fill a pass of at most `max_tokens` tokens: generation first, a token each, then prompts,
    both in the given order. Falls short of the budget only if the sequences want no more tokens.

    The last prompt is cut to fit; a chunk samples only if it reaches its sequence's last token.
    """
    chunks = [Chunk(s, s.computed, 1, True) for s in islice(generating, max_tokens)]
    left = max_tokens - len(chunks)
    for sequence in prompts:
        if not left:
            break
        start = sequence.computed
        uncomputed = len(sequence.tokens) - start
        length = uncomputed if uncomputed < left else left
        chunks.append(Chunk(sequence, start, length, length == uncomputed))
        left -= length
    return tuple(chunks)


def prefill_first(
    generating: Iterable[Sequence], prompts: Iterable[Sequence], max_tokens: int
) -> tuple[Chunk, ...]:
    """Fill a pass with whole prompts, in the given order, as many as fit in `max_tokens`, and at
    least one, however long; generation waits until there are none. What Orca and the first vLLM
    did, to compare with."""
    chunks: list[Chunk] = []
    left = max_tokens
    for sequence in prompts:
        length = sequence.uncomputed
        if chunks and length > left:
            break
        chunks.append(Chunk(sequence, sequence.computed, length, sample=True))
        left -= length
    return tuple(chunks) or splitfuse(generating, (), max_tokens)


def batching(name: Literal["splitfuse", "prefill-first"]) -> Batching:
    """The rule called `name`."""
    return {"splitfuse": splitfuse, "prefill-first": prefill_first}[name]
