"""A transformers classifier of output lengths in a process of its own, watched over.

Nobody waits for it longer than they say: while it starts, is behind, hangs or is dead there is no
answer, and the caller has another.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence
from pathlib import Path

from baton import tether
from baton.length_classifier import Message, clipped, frame, read_edges, unframe

log = logging.getLogger(__name__)

START_SECONDS = 120.0
STUCK_SECONDS = 20.0  # without an answer to anything: it is started anew
MAX_WAITING = 32  # texts that it has not answered; beyond them it is behind
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # before it is started again
_READ = 1 << 16


class LengthProcess:
    """Asks `python -m engine.length_classifier`. `run` keeps it alive."""

    def __init__(self, directory: Path, command: Sequence[str] = ()) -> None:
        """`command` replaces the real one in tests. Raises ModelError for a directory that is no
        length classifier."""
        self.edges = read_edges(directory)
        module = (sys.executable, "-m", "engine.length_classifier", str(directory))
        self._command = tuple(command) or module
        self._process: Process | None = None  # that has said hello
        self._waiting: dict[int, asyncio.Future[list[float]]] = {}
        self._last_id = 0
        self.starts = 0

    @property
    def ready(self) -> bool:
        """It could answer now."""
        return self._process is not None and len(self._waiting) < MAX_WAITING

    async def probabilities(self, text: str, seconds: float) -> list[float] | None:
        """One number per bucket; None if it does not answer within `seconds`."""
        if not self.ready:
            return None
        assert self._process is not None
        assert self._process.stdin is not None
        if self._process.stdin.is_closing():
            return None
        self._last_id += 1
        answer = asyncio.get_running_loop().create_future()
        self._waiting[self._last_id] = answer  # stays until it is answered: that is the backlog
        self._process.stdin.write(frame({"id": self._last_id, "text": clipped(text)}))
        await asyncio.wait((answer,), timeout=seconds)
        return answer.result() if answer.done() and not answer.cancelled() else None

    async def run(self) -> None:
        """Start the process, and again whenever it has ended. Ends when cancelled, and so does
        the process."""
        pause = FIRST_PAUSE
        while True:
            started = time.monotonic()
            try:
                await self._serve()
                log.warning("the length classifier has ended")
            except Exception as error:  # whatever it says: it is only asked for advice
                reason = str(error) or type(error).__name__
                log.warning("the length classifier does not work: %s", reason)
            lived = time.monotonic() - started
            pause = FIRST_PAUSE if lived > LONGEST_PAUSE else min(2 * pause, LONGEST_PAUSE)
            await asyncio.sleep(pause)

    async def _serve(self) -> None:
        """One life of the process."""
        self.starts += 1
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-IS", tether.__file__, str(os.getpid()), *self._command),
            stdin=PIPE,
            stdout=PIPE,
        )
        try:
            buffer = bytearray()
            async with asyncio.timeout(START_SECONDS):
                hello = await self._read(process, buffer)
            if not hello or tuple(hello[0]["edges"]) != self.edges:
                raise ValueError("it did not say that it has these buckets")
            self._process = process
            log.info("the length classifier is ready")
            await self._answers(process, buffer)
        finally:
            self._process = None
            for answer in self._waiting.values():
                answer.cancel()
            self._waiting.clear()
            await _end(process)

    async def _answers(self, process: Process, buffer: bytearray) -> None:
        """Give answers to whoever still waits for them, until the process ends."""
        while True:
            waited = bool(self._waiting)
            try:
                async with asyncio.timeout(STUCK_SECONDS):
                    messages = await self._read(process, buffer)
            except TimeoutError:
                if waited:
                    raise
                continue
            if not messages:
                return
            for message in messages:
                answer = self._waiting.pop(message["id"])  # KeyError: it answers nobody
                if not answer.done():
                    answer.set_result([float(p) for p in message["probabilities"]])

    async def _read(self, process: Process, buffer: bytearray) -> list[Message]:
        """The next messages; none when the process has ended."""
        assert process.stdout is not None
        while True:
            data = await process.stdout.read(_READ)
            if not data:
                return []
            buffer += data
            if messages := unframe(buffer):
                return messages


async def _end(process: Process) -> None:
    if process.stdin is not None:
        process.stdin.close()
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    waiting = asyncio.ensure_future(process.wait())
    try:
        await asyncio.shield(waiting)
    except asyncio.CancelledError:
        await waiting
        raise
