"""How busy a decode worker is, as others are told."""

from __future__ import annotations

from baton.types import Load
from scheduling.residency import Residency
from scheduling.sequence import Phase


def load_of(kv: Residency) -> Load:
    """Sequences whose KV is on its way in count as running, those that are swapped out as waiting.
    Blocks that nobody holds are free, whether something is known of them or not."""
    returning = sum(sequence.phase is Phase.RETURNING for sequence in kv.moving)
    swapped = len(kv.swapped) + len(kv.moving) - returning
    return Load(
        running=len(kv.running) + len(kv.incoming) + returning,
        waiting=len(kv.waiting) + swapped,
        free_blocks=kv.blocks.free,
        total_blocks=kv.blocks.total,
        swapped=swapped,
        host_blocks=kv.swaps.host.total - kv.swaps.host.free,
    )
