"""What the gateways of a simulated cluster know of prefix caches: all of them the same, at once."""

from __future__ import annotations

from collections.abc import Mapping

from scheduling.prefix_map import PrefixMap, PromptKeys
from scheduling.routing import NONE_CACHED
from scheduling.simulator.traffic import EOS, PLAIN, Job
from scheduling.simulator.worker import WorkerSpec


class KnownPrefixes:
    """As gateway/prefixes.py. Jobs without prompt ids have no prefixes."""

    def __init__(self, workers: Mapping[str, WorkerSpec], *, enabled: bool) -> None:
        """Unless `enabled`, nothing is known."""
        self._sizes = {
            name: spec.capacity.block_size
            for name, spec in workers.items()
            if enabled and spec.prefix_cache
        }
        self._map = PrefixMap()
        self._map.workers({name: (0, workers[name].capacity.blocks) for name in self._sizes})
        self._keys: dict[str, PromptKeys] = {}  # of live jobs

    def came(self, job: Job) -> None:
        """It is asked about until it has ended."""
        if self._sizes and job.prompt_ids:
            keys = PromptKeys.of_request(job.request())
            if keys is not None:
                self._keys[job.id] = keys

    def cached(self, job: Job) -> Mapping[str, int]:
        """Tokens of its prompt that need not be computed, by worker, where there are any."""
        if (keys := self._keys.get(job.id)) is None:
            return NONE_CACHED
        return {
            worker: tokens
            for size in set(self._sizes.values())
            for worker, blocks in self._map.cached(keys.of(size)).items()
            if (tokens := keys.usable(blocks, size))
        }

    def sent(self, job: Job, worker: str) -> None:
        """The worker is about to have its prompt."""
        if (keys := self._keys.get(job.id)) is not None:
            self._map.note(worker, 0, keys.of(self._sizes[worker]), 0.0)

    def ended(self, job: Job, worker: str) -> None:
        """The worker has its output, too."""
        if (keys := self._keys.pop(job.id, None)) is not None:
            output = (PLAIN,) * (job.output_tokens - 1) + (EOS,)
            self._map.note(worker, 0, keys.with_output(self._sizes[worker], output), 0.0)

    def rejected(self, job: Job) -> None:
        """No worker has had it."""
        self._keys.pop(job.id, None)
