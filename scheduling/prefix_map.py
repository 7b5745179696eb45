"""What the prefix caches of workers are likely to hold, as somebody tells who sends them work.

A cache forgets what it has not used for longest, ends of prompts before their beginnings; so does
the map, at the same size. It is a guess all the same. A wrong one costs time and no more, because
workers look for themselves.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence

from baton.prefix import block_keys, salt_of
from baton.types import Request

MAX_KEYS = 1 << 18  # of all workers together: 70 MB
MAX_BLOCKS = 2048  # of one prompt, from its beginning
RENEW_SECONDS = 60.0  # a key in use is told anew after so long, or others would forget it


class PromptKeys:
    """Keys of a prompt's blocks (baton/prefix.py), each size hashed when it is first asked for."""

    def __init__(self, prompt_ids: Sequence[int], tenant: str, cache_salt: str = "") -> None:
        """Of a request of that tenant."""
        self._prompt_ids = prompt_ids
        self._owner = tenant, cache_salt
        self._keys: dict[int, list[bytes]] = {}

    @classmethod
    def of_request(cls, request: Request) -> PromptKeys | None:
        """None for one that has nothing to do with caches."""
        if request.bypass_cache:
            return None
        return cls(request.prompt_ids, request.tenant, request.cache_salt)

    def of(self, block_size: int) -> list[bytes]:
        """Of its full blocks, in order."""
        if (keys := self._keys.get(block_size)) is None:
            most = MAX_BLOCKS * block_size
            keys = block_keys(self._prompt_ids[:most], block_size, salt_of(*self._owner))
            self._keys[block_size] = keys
        return keys

    def with_output(self, block_size: int, output: Sequence[int]) -> list[bytes]:
        """Of the full blocks of the prompt and what was generated. The last token of that has no
        KV: no pass has taken it in."""
        keys = self.of(block_size)
        rest = (*self._prompt_ids[len(keys) * block_size :], *output[:-1])
        room = (MAX_BLOCKS - len(keys)) * block_size
        last = keys[-1] if keys else salt_of(*self._owner)
        return keys + block_keys(rest[:room], block_size, last)

    def usable(self, blocks: int, block_size: int) -> int:
        """Tokens that need not be computed, if so many blocks are there: the last token of a prompt
        always is, for what follows it."""
        return min(blocks, (len(self._prompt_ids) - 1) // block_size) * block_size


class PrefixMap:
    """Keys by worker, each worker with its own bound."""

    def __init__(self, max_keys: int = MAX_KEYS) -> None:
        """`max_keys` of all workers together."""
        self._max_keys = max_keys
        self._epochs: dict[str, int] = {}
        self._rooms: dict[str, int] = {}
        # By worker, least recently used first, with the time at which each was last told.
        self._held: dict[str, OrderedDict[bytes, float]] = {}
        self._holders: dict[bytes, tuple[str, ...]] = {}

    def __len__(self) -> int:
        """Keys of all workers together."""
        return sum(map(len, self._held.values()))

    def workers(self, workers: Mapping[str, tuple[int, int]]) -> None:
        """Those that there are, with the epoch of each, and how many blocks it has room for. What
        others held is forgotten, and what these held in another epoch."""
        for worker in list(self._held):
            if worker not in workers or workers[worker][0] != self._epochs[worker]:
                self._forget(worker, len(self._held[worker]))
                del self._held[worker], self._epochs[worker], self._rooms[worker]
        share = self._max_keys // max(1, len(workers))
        for worker, (epoch, blocks) in workers.items():
            self._held.setdefault(worker, OrderedDict())
            self._epochs[worker], self._rooms[worker] = epoch, min(blocks, share)
            self._trim(worker)

    def note(self, worker: str, epoch: int, keys: Sequence[bytes], now: float) -> list[bytes]:
        """The worker has, or is about to have, these blocks of one prompt, from its beginning.
        Returns the keys that others do not know of, or have not heard of lately. Nothing of a
        worker, or an epoch, that there is not."""
        if self._epochs.get(worker) != epoch:
            return []
        held = self._held[worker]
        news = []
        for key in reversed(keys):  # so that beginnings are forgotten after ends
            told = held.pop(key, None)
            if told is None:
                self._holders[key] = (*self._holders.get(key, ()), worker)
            if told is None or now - told >= RENEW_SECONDS:
                told = now
                news.append(key)
            held[key] = told
        self._trim(worker)
        news.reverse()
        return news

    def hear(self, worker: str, epoch: int, keys: Iterable[bytes], now: float) -> None:
        """Somebody else has noted these keys, least recently used first."""
        if self._epochs.get(worker) != epoch:
            return
        held = self._held[worker]
        for key in keys:
            if held.pop(key, None) is None:
                self._holders[key] = (*self._holders.get(key, ()), worker)
            held[key] = now
        self._trim(worker)

    def cached(self, keys: Sequence[bytes]) -> dict[str, int]:
        """How many blocks of this prompt, from its beginning, each worker has; those that have any.
        A key stands for all that come before it."""
        found: dict[str, int] = {}
        for place in range(len(keys), 0, -1):
            for worker in self._holders.get(keys[place - 1], ()):
                found.setdefault(worker, place)
            if len(found) == len(self._held):
                break
        return found

    def check_integrity(self) -> None:
        """Raise RuntimeError if the two indexes differ, or a bound does not hold."""
        pairs = {(key, worker) for worker, held in self._held.items() for key in held}
        listed = [(key, worker) for key, some in self._holders.items() for worker in some]
        if len(listed) != len(pairs) or set(listed) != pairs:
            raise RuntimeError("keys by worker and workers by key differ")
        if any(len(held) > self._rooms[worker] for worker, held in self._held.items()):
            raise RuntimeError("a worker has more keys than room")

    def _trim(self, worker: str) -> None:
        self._forget(worker, len(self._held[worker]) - self._rooms[worker])

    def _forget(self, worker: str, count: int) -> None:
        """The keys that were not used for longest."""
        held = self._held[worker]
        for _ in range(count):
            key, _ = held.popitem(last=False)
            rest = tuple(w for w in self._holders[key] if w != worker)
            if rest:
                self._holders[key] = rest
            else:
                del self._holders[key]
