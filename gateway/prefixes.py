"""What this gateway knows of the prefix caches of workers: what it has sent where, and what other
gateways have.

Knows keys only (baton/prefix.py), and that a worker of an earlier epoch is gone.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from gateway.session import Session
from queueing.contract import WorkerRecord
from scheduling.prefix_map import PrefixMap


class Prefixes:
    """Told of workers, of requests that are sent to them and that end there; asked before."""

    def __init__(self) -> None:
        self._map = PrefixMap()
        self._workers: dict[str, WorkerRecord] = {}

    def workers(self, records: Iterable[WorkerRecord]) -> None:
        """What the registry knows now. Those without a cache do not count."""
        self._workers = {one.id: one for one in records if one.prefix_block_size}
        self._map.workers({w.id: (w.epoch, w.capacity_blocks) for w in self._workers.values()})

    def cached(self, session: Session) -> dict[str, int]:
        """Tokens of its prompt that need not be computed, by worker, where there are any."""
        keys, request = session.prefix, session.job.request
        if keys is None or request.prompt_logprobs is not None or not len(self._map):
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
        if session.prefix is not None and worker.prefix_block_size:
            self._note(worker, session.prefix.of(worker.prefix_block_size))

    def ended(self, session: Session) -> None:
        """The worker that had it last has its outputs, too."""
        worker = self._workers.get(session.worker_id or "")
        if session.prefix is None or worker is None:
            return
        for output in session.outputs:
            if output.token_ids:
                keys = session.prefix.with_output(worker.prefix_block_size, output.token_ids)
                self._note(worker, keys)

    def _note(self, worker: WorkerRecord, keys: list[bytes]) -> None:
        self._map.note(worker.id, worker.epoch, keys, time.monotonic())
