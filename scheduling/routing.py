"""Which worker gets a request: prefill peers and decode links alike.

Knows what is told of each worker, not how to reach it. The gateway and the simulator call the
same routers.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from baton.errors import ConfigError

# A prompt token beside a generated one: 512 more of the one cost less than 8 of the other
# ("LLM Inference Performance Engineering", Databricks 2023).
PROMPT_TOKEN_WEIGHT = 1 / 64

NONE_CACHED: Mapping[str, int] = {}
"""Tokens of a prompt that workers have, by worker, where nobody has any."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker that may take the request.

    `sequences` run there, wait there or are on their way; `queued_tokens` of their prompts are
    not computed yet. `outstanding_tokens` are expected to be generated there still: 0 on a prefill
    worker, None where nobody knows. `slots` is the sequences of one batch; None: no limit is known.
    `cached_tokens` of the request's own prompt need not be computed there.
    """

    id: str
    sequences: int = 0
    queued_tokens: int = 0
    free_blocks: int = 0
    total_blocks: int = 0
    outstanding_tokens: int | None = None
    slots: int | None = None
    cached_tokens: int = 0

    @property
    def beyond_batch(self) -> int:
        """Sequences, with one more, that would have to wait for a place in the batch."""
        return 0 if self.slots is None else max(0, self.sequences + 1 - self.slots)


class Router(Protocol):
    """Ranks workers. One instance per set of workers: it may remember whom it named."""

    def rank(self, candidates: Sequence[Candidate], blocks: int) -> list[Candidate]:
        """Best first, all of them. `blocks` of KV are expected to be needed."""
        ...


class RoundRobin:
    """Each in turn, by id, whatever it does already (the balancer of DeepSpeed-MII)."""

    def __init__(self) -> None:
        """The first turn is the smallest id's."""
        self._last: str | None = None

    def rank(self, candidates: Sequence[Candidate], blocks: int) -> list[Candidate]:
        """The first is the one after the first of the last call."""
        ring = sorted(candidates, key=lambda c: c.id)
        if self._last is not None:
            last = self._last
            ring = [c for c in ring if c.id > last] + [c for c in ring if c.id <= last]
        if ring:
            self._last = ring[0].id
        return ring


class LeastOutstanding:
    """Fewest sequences first; among equals fewest prompt tokens that wait, then by id."""

    def rank(self, candidates: Sequence[Candidate], blocks: int) -> list[Candidate]:
        """Does not look at KV."""
        return sorted(candidates, key=lambda c: (*self.place(c), c.id))

    @staticmethod
    def place(one: Candidate) -> tuple[float, ...]:
        """Lowest first; among equals by id."""
        return (one.sequences, one.queued_tokens)


class KvAware:
    """Workers with room for the request's predicted KV first, then those with a place in the batch
    (or the fewest that wait for one); among those least predicted work.

    Work is what is expected to be generated and the prompts that wait, where both are known of
    every candidate, and the number of sequences where not.
    """

    def rank(self, candidates: Sequence[Candidate], blocks: int) -> list[Candidate]:
        """Among equals the one with most free blocks, then by id."""
        known = all(c.outstanding_tokens is not None for c in candidates)

        def burden(one: Candidate) -> tuple[float | str, ...]:
            no_room = one.free_blocks < max(1, blocks)
            return (no_room, *self.place(one, known=known), one.id)

        return sorted(candidates, key=burden)

    @staticmethod
    def place(one: Candidate, *, known: bool = True) -> tuple[float, ...]:
        """Lowest first among those that have room, and among those that have none; among equals by
        id. `known`: what is expected of every candidate is."""
        work = _work(one) if known else float(one.sequences)
        return (one.beyond_batch, work, one.sequences, -one.free_blocks)


class PrefixAware(KvAware):
    """A worker that has the beginning of the prompt goes before others until it has more to do than
    they by what that saves. Where nobody has any of it, as KvAware.

    Both are counted in tokens, a token of a prompt like a generated one: in a pass that runs
    anyway each costs the same (scheduling/cost.py). Who waits for a place in the batch counts
    twice, for what must be generated before. Room for the predicted KV goes before everything.
    """

    def rank(self, candidates: Sequence[Candidate], blocks: int) -> list[Candidate]:
        """Among equals the one with most free blocks, then by id."""
        known = all(c.outstanding_tokens is not None for c in candidates)
        if not known or not any(c.cached_tokens for c in candidates):
            return super().rank(candidates, blocks)

        def burden(one: Candidate) -> tuple[float | str, ...]:
            no_room = one.free_blocks < max(1, blocks)
            return (no_room, _tokens_before(one) - one.cached_tokens, -one.free_blocks, one.id)

        return sorted(candidates, key=burden)


def cached_that_count(
    cached: Mapping[str, int], least: int, helpers: Container[str], has_place: Callable[[str], bool]
) -> Mapping[str, int]:
    """Of the tokens of a prompt that each worker has, those of the workers that would use them.

    Beside `helpers`, which prefill, decode workers count only if they would compute the rest by
    themselves: those that have a place in the batch, and `least` tokens, with which a helper would
    be a detour. The first token of all others is a helper's to give, as soon as it can.
    """
    return {
        id: tokens
        for id, tokens in cached.items()
        if id in helpers or (tokens >= least and has_place(id))
    }


def _tokens_before(one: Candidate) -> float:
    """What the worker has to do already."""
    generated = one.outstanding_tokens or 0
    waiting = one.beyond_batch / max(1, one.sequences)
    return generated * (1 + waiting) + one.queued_tokens


def _work(one: Candidate) -> float:
    """Predicted work in generated tokens."""
    return (one.outstanding_tokens or 0) + one.queued_tokens * PROMPT_TOKEN_WEIGHT


ROUTERS: dict[str, type[Router]] = {
    "round-robin": RoundRobin,
    "least-outstanding": LeastOutstanding,
    "kv-aware": KvAware,
    "prefix-aware": PrefixAware,
}


def make_router(name: str) -> Router:
    """A router by name. Raises ConfigError."""
    if (kind := ROUTERS.get(name)) is None:
        raise ConfigError(f"unknown routing {name!r}: one of {', '.join(ROUTERS)}")
    return kind()
