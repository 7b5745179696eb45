"""The prefix cache of a worker: KV of tokens that were computed before is not computed again.

A block that is full has a key for all tokens up to its end (baton/prefix.py). Once the pass that
filled it has ended nobody writes to it any more, so sequences that begin with the same tokens share
it, and it is found again after its holders have gone (scheduling/blocks.py). What a GPU computes
ahead of its plan lies behind the last token of a sequence, so never in a block with a key.

Of every sequence the last token is computed, as the next one is sampled after it. Requests that
want logprobs of their prompt have all of it computed: there are no logits for what is found.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import islice

from baton.prefix import salt_of
from scheduling.blocks import BlockAllocator
from scheduling.sequence import Sequence

BlockKeys = Callable[[Items[int], int, bytes], list[bytes]]
"""As `baton.prefix.block_keys`."""


@dataclass(frozen=True, slots=True)
class PrefixCounters:
    """Tokens since the start, of sequences that were looked up when they got their blocks."""

    looked_up: int = 0
    found: int = 0


class PrefixCache:
    """Looks for what is known of a sequence, and keeps what its passes have computed."""

    def __init__(
        self, blocks: BlockAllocator, block_size: int, block_keys: BlockKeys | None
    ) -> None:
        """Without `block_keys` it finds nothing and keeps nothing."""
        self._blocks = blocks
        self._block_size = block_size
        self._block_keys = block_keys
        self.counters = PrefixCounters()

    def find(self, sequence: Sequence) -> list[int]:
        """The blocks of its longest known prefix, to be shared at once if at all. Notes in
        `sequence.cached` how much that is."""
        found: list[int] = []
        if self._looks_up(sequence):
            most = (len(sequence.tokens) - 1) // self._block_size
            found = self._blocks.find(islice(self._keys_of(sequence, most), most))
        sequence.cached = len(found) * self._block_size
        return found

    def count(self, sequence: Sequence) -> None:
        """It has got its blocks, `cached` of its tokens among them."""
        if self._looks_up(sequence):
            self.counters = PrefixCounters(
                self.counters.looked_up + len(sequence.tokens),
                self.counters.found + sequence.cached,
            )

    def keep(self, sequence: Sequence) -> None:
        """Let others find those of its blocks that are full of computed tokens. No pass that runs
        has anything of them."""
        if self._block_keys is None or sequence.request.bypass_cache:
            return
        full = sequence.computed // self._block_size
        keys = self._keys_of(sequence, full)
        for place in range(sequence.kept, full):
            self._blocks.name(sequence.blocks[place], keys[place])
        sequence.kept = full

    def _looks_up(self, sequence: Sequence) -> bool:
        request = sequence.request
        return (
            self._block_keys is not None
            and not request.bypass_cache
            and request.prompt_logprobs is None
        )

    def _keys_of(self, sequence: Sequence, count: int) -> list[bytes]:
        """Those of at least its first `count` blocks, which are full; each is made once."""
        known, size = len(sequence.keys), self._block_size
        if known < count:
            assert self._block_keys is not None
            request = sequence.request
            last = sequence.keys[-1] if known else salt_of(request.tenant, request.cache_salt)
            tokens = sequence.tokens[known * size : count * size]
            sequence.keys += self._block_keys(tokens, size, last)
        return sequence.keys
