"""The gateway without its API: sessions, dispatcher, fleet and housekeeping, wired together."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time

from baton.config import GatewayConfig
from baton.errors import QueueError
from baton.process import Background
from baton.rate import Rate
from gateway.dispatch import Dispatcher
from gateway.fleet import Fleet
from gateway.housekeeping import Housekeeping
from gateway.lengths import Lengths
from gateway.metrics import GatewayMetrics
from gateway.model_files import ModelFacts
from gateway.pace import Pace
from gateway.placing import Placing
from gateway.prefixes import Prefixes
from gateway.session import Session
from gateway.sessions import Sessions
from gateway.tokenizer import Tokenizer
from queueing.contract import GatewayQueue

log = logging.getLogger(__name__)

POLL_SECONDS = 0.25


class Gateway:
    """Everything between the API and the workers."""

    def __init__(
        self,
        config: GatewayConfig,
        gateway_id: str,
        queue: GatewayQueue,
        facts: ModelFacts,
        tokenizer: Tokenizer,
        metrics: GatewayMetrics,
        prefixes: Prefixes,
        lengths: Lengths | None = None,
    ) -> None:
        """`lengths` predicts output lengths; nothing does if it is None."""
        self.config = config
        self.queue = queue
        self.facts = facts
        self.tokenizer = tokenizer
        self.metrics = metrics
        self.lengths = lengths
        self._pace = Pace(config)
        self.prefixes = prefixes
        placing = Placing(self._pace, self.prefixes, config.routing, config.local_prefill_tokens)
        self._dispatcher = Dispatcher(queue, config.max_attempts, placing)
        self.fleet = Fleet(
            queue, gateway_id, self._dispatcher.wake, _ahead(config), prefixes.workers
        )
        self.sessions = Sessions(
            queue,
            tokenizer,
            facts.name,
            self._pace,
            on_waiting=self._dispatcher.wake,
            on_done=self._session_done,
            cached=lambda session: max(placing.cached(session, self.fleet).values(), default=0),
        )
        self._dispatcher.bind(self.sessions, self.fleet)
        self._housekeeping = Housekeeping(queue, self.sessions, self._dispatcher)
        self._background = Background()
        self._ended_tokens = 0
        self._output = Rate()

    def max_context(self) -> int:
        """Longest prompt plus output that the model and every live worker take."""
        return self.fleet.max_context(self.facts.max_context)

    def generated_tokens(self) -> int:
        """Output tokens of all requests since the start."""
        return self._ended_tokens + sum(session.generated for session in self.sessions)

    def output_rate(self) -> float:
        """Output tokens per second over the last few seconds."""
        return self._output.update(self.generated_tokens(), time.monotonic())

    async def start(self) -> None:
        """Announce this gateway and begin to dispatch. Raises QueueError when Redis is away."""
        await self.queue.heartbeat()
        await self.fleet.refresh()
        self._background.start(self.fleet.run(POLL_SECONDS), "fleet")
        self._background.start(self._dispatcher.run(), "dispatch")
        self._background.start(self._housekeeping.run(), "housekeeping")
        self._background.start(self._watch_depth(), "queue depth")
        self._background.start(self.prefixes.run(), "prefixes")
        if self.lengths is not None:
            self._background.start(self.lengths.run(), "lengths")

    async def drain(self, seconds: float) -> None:
        """Take no new requests; let those that run finish, abort them when the time is up."""
        self.sessions.accepting = False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.sessions.wait_idle()
        if len(self.sessions):
            log.warning("%d requests are aborted", len(self.sessions))
        await self.sessions.close()

    async def close(self) -> None:
        """Stop everything."""
        await self.sessions.close()
        await self._background.stop()
        if self.lengths is not None:
            await self.lengths.close()
        await self.prefixes.close()
        await self._dispatcher.close()
        await self.fleet.close()

    def _session_done(self, session: Session) -> None:
        self._dispatcher.stop(session)
        self.prefixes.ended(session)
        self._ended_tokens += session.generated
        if session.error is None:
            for output in session.outputs:
                self._pace.ended(len(output.token_ids))
        now = time.monotonic()
        self.metrics.session_done(session, now)
        if self.lengths is not None:
            self.lengths.ended(session)
        log.info(
            "request %s: %s after %.3f s, %d prompt tokens, %d output tokens, labels %s",
            session.id,
            "served" if session.error is None else type(session.error).__name__,
            now - session.job.request.arrived_at,
            len(session.job.request.prompt_ids),
            session.generated,
            json.dumps(dict(session.job.labels)),
        )

    async def _watch_depth(self) -> None:
        while True:
            self.output_rate()  # looked at now, so that it is known when somebody asks
            if self.lengths is not None and (report := self.lengths.report()) is not None:
                self.metrics.lengths(report)
            now = time.monotonic()
            ages = [now - session.job.request.arrived_at for session in self.sessions]
            self._pace.ages(ages, now)
            if self._pace.workers(self.fleet.records):
                self.queue.measured(self._pace.prefill_base, self._pace.prefill_per_token)
            try:
                self.metrics.depth(await self.queue.depth())
            except QueueError as error:
                log.debug("the queue's depth is not known: %s", error)
            await asyncio.sleep(1.0)


def _ahead(config: GatewayConfig) -> float:
    """Sequences that wait on a decode worker, as a share of its batch. Under fcfs they only hide
    the time that a hand-off takes. A policy that preempts chooses among what the worker holds:
    more is better for the order there, and worse for the one between workers."""
    if config.decode_ahead is not None:
        return config.decode_ahead
    return 0.25 if config.policy == "fcfs" else 1.0
