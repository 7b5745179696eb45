"""How tenants share a worker: max-min fairness over the places of a batch and the tokens of a pass.

With A tenants that have live sequences each is entitled to 1/A of them; what one leaves unused is
shared in the same way by those that want more. What is within the entitlement of its tenant goes
before all that is not, and within each of the two the policy's own order holds, standings (starved,
urgent) included: they are told from waits and deadlines, which a flood has as many of as it likes,
so a tenant passes nobody but itself by them. Priority classes stay outermost, as in the queue:
a class is shared out when those above it have what they want.

One tenant alone changes nothing and costs nothing. Knows nothing of who a tenant is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from collections.abc import Sequence as Items
from itertools import groupby

from scheduling.sequence import Sequence


class Tenants:
    """The tenants that have live requests."""

    def __init__(self) -> None:
        self._live: dict[str, int] = {}
        self.several = False
        """Whether there is anything to share."""

    def came(self, tenant: str) -> None:
        """A request of this tenant is here."""
        self._live[tenant] = self._live.get(tenant, 0) + 1
        self.several = len(self._live) > 1

    def went(self, tenant: str) -> None:
        """A request of this tenant has ended."""
        left = self._live[tenant] - 1
        if left:
            self._live[tenant] = left
        else:
            del self._live[tenant]
        self.several = len(self._live) > 1


def level(wanted: Iterable[int], total: int) -> int:
    """The largest whole number such that `total` suffices if everybody gets what they want up to
    it. At least 0; at most the largest of `wanted`, if all of it fits."""
    reached, left, rest = 0, total, sorted(wanted)
    for place, most in enumerate(rest):
        sharing = len(rest) - place
        if (most - reached) * sharing > left:
            return reached + left // sharing
        left -= (most - reached) * sharing
        reached = most
    return reached


def in_turn(
    ranked: Items[Sequence], places: int, holders: Collection[Sequence] = ()
) -> list[Sequence]:
    """`ranked`, in rank order, with those beyond the entitlement of their tenant to `places` behind
    the others of their priority class. Of the places that do not divide evenly no tenant gets
    a second one before all that want one have their first. `holders` keep the places that they
    have: they count for their tenant, and come first in their class."""
    if ranked and ranked[0].request.priority == ranked[-1].request.priority:
        return _class_in_turn(ranked, places, holders)
    ordered: list[Sequence] = []
    for members in _classes(ranked):
        ordered += _class_in_turn(members, max(1, places - len(ordered)), holders)
    return ordered


def token_shares(ranked: Items[Sequence], tokens: int) -> dict[tuple[int, str], int]:
    """How many of the `tokens` of a pass each (priority, tenant) may have for its prompts: together
    all of them, or what is wanted if that is less."""
    shares: dict[tuple[int, str], int] = {}
    for members in _classes(ranked):
        wanted: Counter[str] = Counter()
        for sequence in members:
            wanted[sequence.request.tenant] += sequence.to_compute
        given = _divide(wanted, tokens)
        tokens -= sum(given.values())
        shares |= {(members[0].request.priority, name): count for name, count in given.items()}
    return shares


def _divide(wanted: Mapping[str, int], total: int) -> dict[str, int]:
    """What does not divide evenly goes to the first that want more."""
    most = level(wanted.values(), total)
    given = {name: min(count, most) for name, count in wanted.items()}
    left = total - sum(given.values())
    for name, count in wanted.items():
        if left and count > most:
            given[name] += 1
            left -= 1
    return given


def _classes(ranked: Iterable[Sequence]) -> Iterator[list[Sequence]]:
    for _, members in groupby(ranked, key=lambda sequence: sequence.request.priority):
        yield [*members]


def _class_in_turn(
    members: Items[Sequence], places: int, holders: Collection[Sequence]
) -> list[Sequence]:
    wanted = Counter([sequence.request.tenant for sequence in members])
    if len(wanted) == 1:
        return [*members]
    within = level(wanted.values(), places)
    first, then, last = list[Sequence](), list[Sequence](), list[Sequence]()
    count = dict.fromkeys(wanted, 0)  # looked at so far, by tenant
    if holders:
        first = [sequence for sequence in members if sequence in holders]
        members = [sequence for sequence in members if sequence not in holders]
        for sequence in first:
            count[sequence.request.tenant] += 1
    due = sum(max(0, min(most, within + 1) - count[name]) for name, most in wanted.items())
    for number, sequence in enumerate(members):
        if not due:  # everybody has what they are entitled to: the rest is in order
            last += members[number:]
            break
        tenant = sequence.request.tenant
        place = count[tenant]
        count[tenant] = place + 1
        if place > within:
            last.append(sequence)
            continue
        due -= 1
        (first if place < within else then).append(sequence)
    return first + then + last
