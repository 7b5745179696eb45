"""How much waiting counts beside work when the shortest is to go first.

A request ranks by `work - aging * age`. Age grows alike for all that wait, so the order never
changes: it is that of `arrived_at + work / aging`, and `work / aging` is how long a longer request
can be overtaken by shorter ones. Nobody starves, by construction.

With the same aging, a long queue is first come first served: ages grow beyond all differences of
work. So aging counts less the more requests wait for a slot.
"""

from __future__ import annotations

MIN_AGING = 0.001
"""What no aging means: a request is overtaken for at most a thousand times its work."""


def loaded_aging(aging: float, waiting: int, slots: int) -> float:
    """`aging` as it counts when `waiting` requests wait for `slots` places in a batch."""
    slots = max(1, slots)
    return aging * slots / (slots + waiting)


def handicap(work: float, aging: float) -> float:
    """Seconds by which a request may be overtaken that will take `work` seconds."""
    return work / max(aging, MIN_AGING)
