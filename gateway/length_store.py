"""Keeps what the length predictor has learnt: in a file, and in Redis for all gateways.

Gateways learn side by side. Every few seconds each one takes what the others have learnt and adds
its own (compare and swap on a version). Nothing of it is on the path of a request, and without
Redis a gateway goes on by itself: it adds what it learnt meanwhile when Redis is back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import tempfile
from pathlib import Path

from baton.errors import Overloaded, QueueError
from queueing.lengths import LengthsExchange
from scheduling.length import LengthPredictor
from scheduling.length_state import LengthState, StateError

log = logging.getLogger(__name__)

EXCHANGE_SECONDS = 3.0
SAVE_EVERY = 10  # exchanges
_TRIES = 4  # others may write at the same time


class LengthStore:
    """Owns `predictor.state` between two requests."""

    def __init__(
        self, predictor: LengthPredictor, exchange: LengthsExchange | None, file: Path | None
    ) -> None:
        self._predictor = predictor
        self._exchange = exchange
        self._file = file
        self._base = predictor.state.copy()  # what the shared state and this one have in common
        self._version = 0
        self._saved = 0

    def load(self) -> None:
        """Begin with what the file holds, if it can be used."""
        if self._file is None:
            return
        try:
            self._predictor.state = self._predictor.from_bytes(self._file.read_bytes())
        except FileNotFoundError:
            return  # the first start
        except (OSError, StateError) as error:
            log.warning("%s: not used: %s", self._file, error)
            return
        # An earlier run has shared it: it is what both have in common, if Redis has as much.
        self._base = self._predictor.state.copy()
        self._saved = self._base.seen
        log.info("%s: %d sequences learnt from", self._file, self._base.seen)

    async def run(self) -> None:
        """Exchange and save until cancelled."""
        turn = 0
        while True:
            try:
                await self.exchange()
            except (QueueError, Overloaded) as error:
                log.debug("what was learnt about lengths is not shared: %s", error)
            except Exception:
                log.exception("what was learnt about lengths is not shared")
            turn += 1
            if turn % SAVE_EVERY == 0:
                await self.save()
            await asyncio.sleep(EXCHANGE_SECONDS)

    async def exchange(self) -> None:
        """Take what others have learnt, and give what was learnt here. Raises QueueError and
        Overloaded; then nothing has changed."""
        if self._exchange is None:
            return
        for _ in range(_TRIES):
            held = await self._exchange.read(self._version)
            mine = self._predictor.state.copy()
            known = held.version == self._version
            if known and mine.seen == self._base.seen and held.version:
                return
            shared = self._base if known else await self._decoded(held.data)
            if shared.seen < self._base.seen:  # Redis has lost its data, or never had ours
                shared = self._base
            whole = self._predictor.merged(mine, self._base, shared)
            if whole.seen == shared.seen and shared is not self._base:
                self._adopt(mine, whole, held.version)
                return
            if not whole.seen:
                return
            data = await asyncio.to_thread(self._predictor.to_bytes, whole)
            version = await self._exchange.write(held.version, data)
            if version is not None:
                # What was written is rounded: all go on from the same numbers.
                self._adopt(mine, await self._decoded(data), version)
                return

    async def save(self) -> None:
        """Replace the file, all or nothing. A failure is logged."""
        state = self._predictor.state
        if self._file is None or state.seen == self._saved:
            return
        data = await asyncio.to_thread(self._predictor.to_bytes, state.copy())
        try:
            await asyncio.to_thread(_replace, self._file, data)
        except OSError as error:
            log.warning("%s: what was learnt about lengths is not saved: %s", self._file, error)
        else:
            self._saved = state.seen

    async def close(self) -> None:
        """Share and save the last of it."""
        if self._predictor.state.seen != self._base.seen:
            with contextlib.suppress(QueueError, Overloaded):
                await self.exchange()
        await self.save()
        if self._exchange is not None:
            await self._exchange.close()

    def _adopt(self, mine: LengthState, shared: LengthState, version: int) -> None:
        """Go on from `shared`, and what was learnt since it took in `mine`."""
        self._predictor.state = self._predictor.merged(self._predictor.state, mine, shared)
        self._base, self._version = shared, version

    async def _decoded(self, data: bytes | None) -> LengthState:
        """A state from Redis; an empty one if there is none, or none that can be used."""
        if data is not None:
            try:
                return await asyncio.to_thread(self._predictor.from_bytes, data)
            except StateError as error:
                log.warning("what the pool shares about lengths is not used: %s", error)
        return LengthState.empty(self._predictor.shape)


def _replace(path: Path, data: bytes) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
