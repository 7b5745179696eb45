"""Which workers a request goes to: the configured router, with what is known of each worker's load
and of what it has of the prompt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from gateway.attempt import Workers
from gateway.decode_link import DecodeLink
from gateway.fleet import Fleet, PrefillPeer
from gateway.pace import Pace
from gateway.prefixes import Prefixes
from gateway.session import Session
from queueing.contract import WorkerRecord
from scheduling.routing import NONE_CACHED, cached_that_count, make_router


def can_pair(prefill: WorkerRecord, decode: WorkerRecord) -> bool:
    """KV of one can be read by the other."""
    return (prefill.layout_digest, prefill.model) == (decode.layout_digest, decode.model)


class Placing:
    """Ranks workers. `cached` is always what the method of that name gave for the request."""

    def __init__(self, pace: Pace, prefixes: Prefixes, routing: str, local_tokens: int) -> None:
        """`local_tokens`: as GatewayConfig.local_prefill_tokens. Raises ConfigError for an unknown
        `routing`."""
        self._prefixes = prefixes
        self._pace = pace
        self._to_prefill, self._to_decode = make_router(routing), make_router(routing)
        self._local_tokens = local_tokens

    def cached(self, session: Session, fleet: Fleet) -> Mapping[str, int]:
        """Tokens of its prompt that would not be computed again, by worker."""
        cached = self._prefixes.cached(session)
        if not cached or not fleet.prefill:
            return cached

        def has_place(id: str) -> bool:
            link = fleet.decode.get(id)
            return link is not None and link.has_place

        least = len(session.job.request.prompt_ids) - self._local_tokens
        return cached_that_count(cached, least, fleet.prefill, has_place)

    def peers(
        self, peers: Iterable[PrefillPeer], cached: Mapping[str, int] = NONE_CACHED
    ) -> list[PrefillPeer]:
        """Best first."""
        by_id = {peer.record.id: peer for peer in peers}
        candidates = [
            replace(peer.candidate(), cached_tokens=cached.get(id, 0)) for id, peer in by_id.items()
        ]
        return [by_id[one.id] for one in self._to_prefill.rank(candidates, 1)]

    def links(
        self,
        links: Sequence[DecodeLink],
        session: Session | None = None,
        cached: Mapping[str, int] = NONE_CACHED,
    ) -> list[DecodeLink]:
        """Best first; without a session for whatever comes."""
        tokens = 0 if session is None else self._pace.kv_tokens(session.job.request)
        blocks = max((link.blocks_for(tokens) for link in links), default=0)
        mean = self._pace.mean_tokens
        by_id = {link.record.id: link for link in links}
        candidates = [
            replace(link.candidate(mean), cached_tokens=cached.get(id, 0))
            for id, link in by_id.items()
        ]
        return [by_id[one.id] for one in self._to_decode.rank(candidates, max(1, blocks))]

    def is_worth_waiting(self, session: Session, tokens: int, now: float) -> bool:
        """Whether it should wait for a worker that has so many tokens of its prompt more than one
        that is free now: for as long as they would take to compute. So it never waits for nothing
        longer than it would have been busy for nothing."""
        waited = max(0.0, now - session.waiting_since)  # it may have come after `now`
        return waited < tokens * self._pace.prefill_per_token

    def sent(self, session: Session, link: DecodeLink, helper: PrefillPeer | None) -> Workers:
        """It goes there now."""
        worker = link.record if helper is None else helper.record
        cached = self._prefixes.cached(session).get(worker.id, 0)
        for record in {worker.id: worker, link.record.id: link.record}.values():
            self._prefixes.sent(session, record)
        return Workers(link, helper, len(session.job.request.prompt_ids) - cached)
