"""What preemptive policies share: the starved and the urgent come first.

Within a priority class:

    STARVED    has waited for longer than the patience without running. It comes first until it has
               had a quantum, the longest wait before others, and is ordinary again.
    URGENT     has a deadline that it would miss if it waited much longer, and can still make it,
               as far as its length is predicted well. The earliest deadline first.
    ORDINARY   in the policy's own order.

The patience is `promote_after` seconds; or, where a policy asks for that, so many times the mean
age of those that are here (but the oldest) if that is more, and at most 60 times `promote_after`.
Under overload everybody waits for long, and to lift everybody in turn is to serve all at once, with
the KV of all in memory.

So starvation is bounded for any traffic: of N sequences of a class, with no higher class wanting
service, one that can be given memory is in a batch of B at the latest

    patience + SCAN_PAUSE + (N / B + 1) * (quantum + one pass)

seconds (of the largest patience meanwhile) after it was there last: only those that have waited
longer go before it, and each of them gives way when it has had its quantum. Where A tenants share
the worker and A <= B, N counts the sequences of its own tenant only, and B is B // A, or more: each
tenant's starved and urgent come before the others of that tenant (scheduling/shares.py).
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Collection, Iterable

from scheduling.remaining import RemainingWork
from scheduling.sequence import Rank, Sequence, Standing

SCAN_PAUSE = 0.1
"""Seconds between two looks at all sequences for the starved and the urgent."""

MOST_PATIENCE = 60.0
"""Times `promote_after`: the longest patience."""

_RETUNES = 16  # per mean service time
_TIGHT = 0.5  # urgent: with less slack than this share of the remaining time

_STARVED, _ORDINARY = Standing.STARVED, Standing.ORDINARY  # as in Phase: kept for loops


class PreemptivePolicy:
    """A Policy (scheduling/order.py) whose order changes with service; subclasses say how.

    Ranks are kept in the sequences and worked out again only where something has changed.
    """

    preempts = True

    def __init__(
        self,
        work: RemainingWork,
        *,
        promote_after: float,
        quantum: float,
        patience_in_ages: float = 0.0,
    ) -> None:
        """`promote_after` infinite: nobody counts as starved. Both in seconds. `patience_in_ages`:
        mean ages that the patience is at least; 0 leaves it at `promote_after`, as in FastServe."""
        self._work = work
        self._promote_after = promote_after
        self._patience_in_ages = patience_in_ages
        self.patience = promote_after
        """Seconds without service after which a sequence counts as starved, at this load."""
        self._age: float | None = None  # running mean, over time, of the mean age
        self._others_age = 0.0  # the same, without the oldest
        self._aged_at = -math.inf
        self._quantum = quantum
        self._starves_at = math.inf  # nobody does before
        self._turns_at = math.inf  # nobody turns urgent, or too late, before
        self._retune_at = -math.inf

    # -- For subclasses --------------------------------------------------------------------

    def _measure(self, sequence: Sequence) -> float:
        """Its place among the ordinary ones of its class, lowest first."""
        raise NotImplementedError

    def _served(self, sequence: Sequence, seconds: float) -> None:
        """It was in passes of `seconds`; forget its rank if its measure has changed."""
        raise NotImplementedError

    def _retune(self, sequences: Collection[Sequence], now: float) -> bool:
        """Follow what is measured; returns whether all measures have changed with it."""
        service = self._work.mean_seconds
        if sequences and service > 0:
            self._follow_ages(sequences, service, now)
        return self._work.measure(sequences)

    def _follow_ages(self, sequences: Collection[Sequence], service: float, now: float) -> None:
        """Mean ages are smoothed over a service time."""
        ages = [now - s.arrived_at for s in sequences]
        total = sum(ages)
        weight = 1.0 if self._age is None else -math.expm1((self._aged_at - now) / service)
        others = (total - max(ages)) / max(1, len(ages) - 1)
        self._others_age += weight * (others - self._others_age)
        self._age = (self._age or 0.0) + weight * (total / len(ages) - (self._age or 0.0))
        self._aged_at = now
        most = MOST_PATIENCE * self._promote_after
        patience = min(max(self._promote_after, self._patience_in_ages * self._others_age), most)
        if patience < self.patience:
            self._starves_at -= self.patience - patience
        self.patience = patience

    def _until_behind(self, sequence: Sequence, other: Sequence, pass_seconds: float) -> float:
        """Seconds of service until this ordinary sequence may fall behind `other`, an ordinary one
        of its class that comes after it and gets none."""
        raise NotImplementedError

    # -- The policy ------------------------------------------------------------------------

    def join(self, sequence: Sequence, tokens: int, now: float) -> None:
        """It waits from now on."""
        sequence.waiting_since = now
        sequence.rank = None
        self._work.join(sequence)
        self._starves_at = min(self._starves_at, now + self.patience)
        if sequence.request.deadline is not None:
            turns = self._turns_urgent(sequence, sequence.request.deadline)
            self._turns_at = min(self._turns_at, turns)

    def rank(self, sequence: Sequence) -> Rank:
        """By standing, then by the policy's measure."""
        known = sequence.rank
        if known is None:
            request, standing = sequence.request, sequence.standing
            known = sequence.rank = (
                -request.priority,
                standing,
                self._measure(sequence) if standing is _ORDINARY else _first(sequence),
                sequence.arrived_at,
                request.id,
                sequence.index,
            )
        return known

    def charge(self, sequence: Sequence, seconds: float, now: float, passes: int = 1) -> None:
        """Service that a starved sequence is given as such counts for nothing else."""
        sequence.waiting_since = now
        self._work.ran(now, passes)
        if sequence.standing is _STARVED:
            sequence.credit -= seconds
            if sequence.credit > 0:
                return
            seconds, sequence.credit = -sequence.credit, 0.0
            self._stand(sequence, Standing.ORDINARY)
        self._served(sequence, seconds)

    def promote(self, sequences: Collection[Sequence], now: float) -> None:
        """Look for the starved and the urgent, if there can be any; now and then, at the load."""
        if now >= self._retune_at:
            if self._retune(sequences, now):
                for sequence in sequences:
                    if sequence.standing is _ORDINARY:
                        sequence.rank = None
            self._retune_at = now + self._work.mean_seconds / _RETUNES
        if now >= self._starves_at:
            self._starves_at = max(self._find_starved(sequences, now), now + SCAN_PAUSE)
        if now >= self._turns_at:
            self._turns_at = max(self._heed_deadlines(sequences, now), now + SCAN_PAUSE)

    def lifted_in(self, sequence: Sequence, now: float) -> float:
        """Seconds until it counts as starved, if it does not run before."""
        return max(0.0, sequence.waiting_since + self.patience - now)

    def steady(
        self,
        chosen: Iterable[Sequence],
        others: Iterable[Sequence],
        now: float,
        pass_seconds: float,
    ) -> float:
        """If others wait: until a standing may change, the load is looked at again, or one of the
        chosen may fall behind the best of those that come after it. Service given to the starved
        and the urgent moves them only by ending that."""
        left = [*others]
        if not left:
            return max(0.0, self._look_again_at() - now)
        seconds = min(self._starves_at, self._turns_at, self._look_again_at()) - now
        first = self.rank(left[0])
        for sequence in chosen:
            rank = self.rank(sequence)
            place = 0 if rank < first else bisect(left, rank, key=self.rank)
            if sequence.standing is _STARVED:
                seconds = min(seconds, sequence.credit)
            elif place < len(left) and sequence.standing is _ORDINARY:
                other = left[place]
                if other.request.priority == sequence.request.priority:
                    behind = self._until_behind(sequence, other, pass_seconds)
                    seconds = behind if behind < seconds else seconds
        return max(0.0, seconds)

    def _look_again_at(self) -> float:
        """When measures, or the patience, may change without any service."""
        return self._retune_at if self._promote_after < math.inf else math.inf

    # -- Standings -------------------------------------------------------------------------

    def _find_starved(self, sequences: Iterable[Sequence], now: float) -> float:
        """Returns when the next one starves that does not run."""
        latest = now - self.patience
        longest = math.inf
        for sequence in sequences:
            if sequence.standing is _STARVED:
                continue
            if sequence.waiting_since <= latest:
                sequence.credit = self._quantum
                self._stand(sequence, Standing.STARVED)
            elif sequence.waiting_since < longest:
                longest = sequence.waiting_since
        return longest + self.patience

    def _heed_deadlines(self, sequences: Iterable[Sequence], now: float) -> float:
        """Returns when to look again: predictions change, so not too late."""
        due = math.inf
        for sequence in sequences:
            deadline = sequence.request.deadline
            if deadline is not None and sequence.standing is not Standing.STARVED:
                due = min(due, self._heed(sequence, deadline, now))
        return min(due, now + self._work.mean_seconds)

    def _heed(self, sequence: Sequence, deadline: float, now: float) -> float:
        """Set whether it is urgent; returns when that may change. Once urgent it remains so until
        it is too late: as it runs, its slack stays and the time it needs shrinks."""
        too_late = deadline - self._work.seconds(sequence)
        if now > too_late:
            self._stand(sequence, Standing.ORDINARY)
            return math.inf
        if sequence.standing is Standing.ORDINARY:
            turns = self._turns_urgent(sequence, deadline)
            if now < turns:
                return turns
        self._stand(sequence, Standing.URGENT)
        return too_late

    def _turns_urgent(self, sequence: Sequence, deadline: float) -> float:
        return deadline - (1 + _TIGHT) * self._work.seconds(sequence)

    def _stand(self, sequence: Sequence, standing: Standing) -> None:
        if sequence.standing is not standing:
            sequence.standing = standing
            sequence.rank = None


def _first(sequence: Sequence) -> float:
    """Its place among the starved, or among the urgent."""
    if sequence.standing is Standing.STARVED:
        return sequence.waiting_since
    deadline = sequence.request.deadline
    return math.inf if deadline is None else deadline
