"""Sequences of one request (n > 1) share the full blocks of their prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from scheduling.sequence import Phase, Sequence

Siblings = Callable[[Sequence], Iterable[Sequence]]
"""The unfinished sequences of the same request, the sequence itself included."""


class SharedPrompts:
    """Finds the prompt that a sequence can share, or should wait for."""

    def __init__(self, block_size: int, siblings: Siblings) -> None:
        self._block_size = block_size
        self.of = siblings

    def blocks(self, sequence: Sequence) -> list[int]:
        """The full blocks of its prompt, if a sibling has computed them; they are the sibling's."""
        if sequence.request.sampling.n == 1:
            return []
        count = self._shareable(sequence)
        for sibling in self.of(sequence):
            done = sibling.computed >= count * self._block_size
            if sibling.phase is Phase.RUNNING and done:
                return sibling.blocks[:count]
        return []

    def is_coming(self, sequence: Sequence) -> bool:
        """True while a sibling is on its way to a prompt that can be shared."""
        if sequence.request.sampling.n == 1:
            return False
        tokens = self._shareable(sequence) * self._block_size
        return any(
            s.phase is Phase.INCOMING or (s.phase is Phase.RUNNING and s.computed < tokens)
            for s in self.of(sequence)
        )

    def _shareable(self, sequence: Sequence) -> int:
        """How many blocks hold nothing but prompt, its last token excepted: each sequence
        computes at least that one itself, as its first token is sampled there."""
        return (sequence.prompt_length - 1) // self._block_size
