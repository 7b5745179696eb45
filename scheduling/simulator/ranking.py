"""Workers as a router ranks them, kept so that a look costs little however many there are."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Generic, Protocol, TypeVar

from scheduling.routing import NONE_CACHED, Candidate, KvAware, LeastOutstanding, Router


class Routable(Protocol):
    """A simulated worker."""

    def candidate(self, name: str) -> Candidate:
        """What a router sees of it."""
        ...


W = TypeVar("W", bound=Routable)


class Ranking(Generic[W]):
    """The workers that are open, best first. `touch` names those that have changed since the last
    look; only they are ranked anew. A router without a place for each worker is asked itself."""

    def __init__(
        self, router: Router, workers: Mapping[str, W], is_open: Callable[[W], bool]
    ) -> None:
        """`is_open`: whether a worker takes anything at all now."""
        self._router = router
        self._workers = workers
        self._is_open = is_open
        self._names = {id(worker): name for name, worker in workers.items()}
        self._versions = dict.fromkeys(workers, 0)
        self._changed = dict.fromkeys(workers)
        self._heap: list[tuple[tuple[float, ...], str, int, Candidate]] = []

    def touch(self, worker: W) -> None:
        """It has changed."""
        self._changed[self._names[id(worker)]] = None

    def best_first(self, blocks: int, cached: Mapping[str, int] = NONE_CACHED) -> Iterator[W]:
        """Open workers for a request that is expected to need so many blocks, and has `cached`
        tokens of its prompt there. They may be changed only when the iteration is over."""
        if cached or not isinstance(self._router, KvAware | LeastOutstanding):
            open_ones = [
                replace(worker.candidate(name), cached_tokens=cached.get(name, 0))
                for name, worker in self._workers.items()
                if self._is_open(worker)
            ]
            yield from (self._workers[c.id] for c in self._router.rank(open_ones, blocks))
            return
        self._refresh()
        looks_at_room = isinstance(self._router, KvAware)
        seen, later = [], []
        try:
            while self._heap:
                entry = heapq.heappop(self._heap)
                _, name, version, candidate = entry
                if version != self._versions[name]:
                    continue  # it has changed since
                seen.append(entry)
                if looks_at_room and candidate.free_blocks < max(1, blocks):
                    later.append(name)
                else:
                    yield self._workers[name]
            yield from (self._workers[name] for name in later)
        finally:
            for entry in seen:
                heapq.heappush(self._heap, entry)

    def _refresh(self) -> None:
        router = self._router
        assert isinstance(router, KvAware | LeastOutstanding)
        for name in self._changed:
            worker = self._workers[name]
            self._versions[name] += 1
            if self._is_open(worker):
                candidate = worker.candidate(name)
                entry = (router.place(candidate), name, self._versions[name], candidate)
                heapq.heappush(self._heap, entry)
        self._changed.clear()
