"""What this gateway knows of the prefix caches of workers: what it has sent where, and what other
gateways have.

They tell each other through Redis, a few times a second and on a timer of its own: no request waits
for that. Without Redis each knows what it has sent itself.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable

from baton.config import GatewayConfig
from baton.errors import Overloaded, QueueError
from gateway.session import Session
from queueing.contract import WorkerRecord
from queueing.prefixes import PrefixExchange
from scheduling.prefix_map import PrefixMap

log = logging.getLogger(__name__)

EXCHANGE_SECONDS = 0.25
MAX_UNTOLD = 1 << 13  # keys for the next exchange; more are not told


class Prefixes:
    """Told of workers, of requests that are sent to them and that end there; asked before."""

    def __init__(self, exchange: PrefixExchange | None = None, *, enabled: bool = True) -> None:
        """Without an exchange nobody else is told. Unless `enabled`, nothing is known of any
        worker."""
        self._exchange = exchange
        self._enabled = enabled
        self._map = PrefixMap()
        self._workers: dict[str, WorkerRecord] = {}
        self._untold: dict[tuple[str, int], dict[bytes, None]] = {}  # oldest first

    def __len__(self) -> int:
        """Blocks that are known of, of all workers together."""
        return len(self._map)

    def workers(self, records: Iterable[WorkerRecord]) -> None:
        """What the registry knows now. Those without a cache do not count."""
        known = records if self._enabled else ()
        self._workers = {one.id: one for one in known if one.prefix_block_size}
        self._map.workers({w.id: (w.epoch, w.capacity_blocks) for w in self._workers.values()})

    def cached(self, session: Session) -> dict[str, int]:
        """Tokens of its prompt that need not be computed, by worker, where there are any. What it
        has generated on an earlier worker is not looked for: that worker is hardly still there."""
        keys = session.prefix
        if keys is None or session.owes_prompt_logprobs or not len(self._map):
            return {}
        sizes = {one.prefix_block_size for one in self._workers.values()}
        found = {}
        for size in sizes:
            for worker, blocks in self._map.cached(keys.of(size)).items():
                if tokens := keys.usable(blocks, size):
                    found[worker] = tokens
        return found

    def sent(self, session: Session, worker: WorkerRecord) -> None:
        """The worker is about to have its prompt."""
        if session.prefix is not None and worker.id in self._workers:
            self._note(worker, session.prefix.of(worker.prefix_block_size))

    def ended(self, session: Session) -> None:
        """The worker that had it last has its outputs, too: those that it generated, and those that
        it went on with."""
        worker = self._workers.get(session.worker_id or "")
        if session.prefix is None or worker is None:
            return
        for output in session.resumed:
            if output.token_ids:
                keys = session.prefix.with_output(worker.prefix_block_size, output.token_ids)
                self._note(worker, keys)

    async def run(self) -> None:
        """Exchange until cancelled, while there are workers with caches. While Redis is away or
        full, others hear nothing from here."""
        while self._exchange is not None and self._enabled:
            try:
                if self._workers:
                    await self.exchange(self._exchange)
            except (QueueError, Overloaded) as error:
                log.debug("prefixes are not shared: %s", error)
            except Exception:
                log.exception("prefixes are not shared")
            await asyncio.sleep(EXCHANGE_SECONDS)

    async def exchange(self, exchange: PrefixExchange) -> None:
        """Tell what is new here, and take what others have told. Raises QueueError and
        Overloaded; then what was to be told is lost."""
        untold, self._untold = self._untold, {}
        news = {worker: list(reversed(keys)) for worker, keys in untold.items()}
        for heard in await exchange.exchange(news):
            self._map.hear(heard.worker, heard.epoch, heard.keys, time.monotonic())

    async def close(self) -> None:
        """Close the connections."""
        if self._exchange is not None:
            await self._exchange.close()

    def _note(self, worker: WorkerRecord, keys: list[bytes]) -> None:
        news = self._map.note(worker.id, worker.epoch, keys, time.monotonic())
        if self._exchange is None or not news:
            return
        untold = self._untold.setdefault((worker.id, worker.epoch), {})
        room = max(0, MAX_UNTOLD - sum(map(len, self._untold.values())))
        untold.update(dict.fromkeys(reversed(news[:room])))


def open_prefixes(config: GatewayConfig) -> Prefixes:
    """What the configuration asks for. Raises ConfigError for a Redis URL that cannot work."""
    if config.routing != "prefix-aware":
        return Prefixes(enabled=False)
    return Prefixes(PrefixExchange(config.redis_url.get_secret_value(), config.pool))
