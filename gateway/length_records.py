"""Records prompts and their output lengths, to train a classifier on. Only if asked to: this is
the one place where a gateway writes text down."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from pathlib import Path

from gateway.job import Job
from gateway.output import Ending

log = logging.getLogger(__name__)

FLUSH_SECONDS = 1.0
MAX_HELD = 10_000  # lines that wait to be written


class LengthRecords:
    """Appends one JSON object per sequence, in batches, off the event loop."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: list[str] = []
        self._lost = 0

    def add(self, job: Job, text: str, ending: Ending | None, tokens: int) -> None:
        """Note one sequence; `ending` is None if the request broke off."""
        if len(self._lines) >= MAX_HELD:
            self._lost += 1
            return
        record = {
            "text": text,
            "prompt_tokens": len(job.request.prompt_ids),
            "max_tokens": job.request.stopping.max_tokens,
            "output_tokens": tokens,
            "finish": "cancelled" if ending is None else ending.reason.name.lower(),
        }
        self._lines.append(json.dumps(record, ensure_ascii=False) + "\n")

    async def run(self) -> None:
        """Write until cancelled."""
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            await self.flush()

    async def flush(self) -> None:
        """Write what waits. A failure is logged, and what could not be written is lost."""
        lines, self._lines, lost, self._lost = self._lines, [], self._lost, 0
        if lost:
            log.warning("%s: %d records lost: they came too fast", self._path, lost)
        if lines:
            try:
                await asyncio.to_thread(_append, self._path, "".join(lines))
            except (OSError, ValueError) as error:  # ValueError: no text that can be written
                log.warning("%s: %d records lost: %s", self._path, len(lines), error)


def _append(path: Path, text: str) -> None:
    """Only the owner may read a file that is made here."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with os.fdopen(handle, "a", encoding="utf-8") as file:
        file.write(text)
