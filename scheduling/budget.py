"""Dynamic SplitFuse: what a forward pass is filled with (DeepSpeed-FastGen).

The time of a pass depends on its tokens, not on its sequences, and throughput is concave in
tokens: passes of equal size are best. So long prompts are split and short ones fused until the
budget is met exactly, and generating sequences, one token each, never wait for a prompt.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

from scheduling.plan import Chunk
from scheduling.sequence import Sequence


def splitfuse(
    generating: Iterable[Sequence], prompts: Iterable[Sequence], max_tokens: int
) -> tuple[Chunk, ...]:
    """Fill a pass of at most `max_tokens` tokens: generation first, then prompts, each in the
    given order. Falls short of the budget only if the sequences want no more tokens.

    The last prompt is cut to fit; a chunk samples only if it reaches its sequence's last token.
    """
    chunks = []
    left = max_tokens
    for sequence in chain(generating, prompts):
        if not left:
            break
        length = min(sequence.uncomputed, left)
        chunks.append(
            Chunk(sequence, sequence.computed, length, sample=length == sequence.uncomputed)
        )
        left -= length
    return tuple(chunks)
