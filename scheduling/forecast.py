"""How much KV sequences that grow side by side will hold at most, before the first ones have ended.

S3 reserves the KV of each sequence's predicted end, and adds those up. But they do not end at the
same time: while one is still short, others have gone already. In a batch in which everyone gets
one token per pass, the most that is ever held at once follows from what each holds now and how
many tokens each still wants, and is far less than the sum. Admitting by it fills the pool as a
paged cache does, without the preemptions that come when all of them grow.
"""

from __future__ import annotations

from collections.abc import Sequence as Items

import numpy as np


def peak_kv(held: Items[int], remaining: Items[int]) -> int:
    """Most tokens of KV held at once, if sequence i holds `held[i]` now, gets one more in each
    pass, `remaining[i]` times, and then holds none. Nobody joins. 0 without sequences.

    The peak comes just before one of them ends: then it, and all that end no earlier, have grown
    by what it had left.
    """
    if len(held) != len(remaining):
        raise ValueError("one remaining length for each sequence")
    if not held:
        return 0
    left = np.asarray(remaining, np.int64)
    longest_first = np.argsort(-left, kind="stable")
    left = left[longest_first]
    now = np.cumsum(np.asarray(held, np.int64)[longest_first])
    alive = np.arange(1, len(left) + 1)
    return int((now + alive * left).max())
