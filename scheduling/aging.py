"""How much waiting counts beside work when the shortest is to go first.

A request ranks by `work - aging * age`. Age grows alike for all that wait, so the order never
changes: it is that of `arrived_at + work / aging`, and `work / aging` is how long a longer request
can be overtaken by shorter ones. Nobody starves, by construction.

How much age should count depends on the load: near saturation ages are many times the work of a
request, and a fixed factor turns the order into first come, first served. So the factor is
`(service / age) ** 2`, of the mean work of a request and the mean age of those that are here,
times the one knob (docs/decisions/004-predicted-srpt.md).
"""

from __future__ import annotations

AGING = 1.8
"""What the knob at 1 stands for."""

MOST_AGING = 8.0
"""Close enough to first come, first served."""

MIN_AGING = 0.001
"""What no aging means to `handicap`: to be overtaken for at most a thousand times one's work."""


def aging_factor(knob: float, service: float, age: float) -> float:
    """What a second of age counts beside a second of work."""
    if age <= 0:
        return MOST_AGING if knob else 0.0
    return min(AGING * knob * (service / age) ** 2, MOST_AGING)


def handicap(work: float, aging: float) -> float:
    """Seconds by which a request may be overtaken that will take `work` seconds."""
    return work / max(aging, MIN_AGING)
