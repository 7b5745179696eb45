"""A system as the driver sees it: a process that speaks the protocol of systems/serving.py."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from benchmarks.peers.workloads import Ask

_STOP_SECONDS = 30.0


class PeerError(Exception):
    """A system could not be installed, loaded or run; says why."""


@dataclass(frozen=True, slots=True)
class Output:
    """What a system made of one request; seconds since all requests came."""

    tokens: tuple[int, ...]
    first: float
    last: float


class Peer:
    """One system in one process group. Leaving the context ends it.

    With `freeze` it is stopped by a signal whenever it is not asked anything, so that it cannot
    take the processors from the others.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        log: Path,
        *,
        environment: dict[str, str] | None = None,
        freeze: bool = True,
        timeout: float = 1800.0,
    ) -> None:
        """`log` gets what it prints to stderr; `timeout` bounds the wait for every answer."""
        self._log = log
        self._freeze = freeze
        self._timeout = timeout
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=os.environ | (environment or {}),
                start_new_session=True,
            )

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def load(self, **setup: Any) -> dict[str, str]:
        """Load a model; returns what the system says about itself. Raises PeerError."""
        about: dict[str, str] = self._ask({"op": "load", **setup})["about"]
        return about

    def run(self, asks: Sequence[Ask]) -> list[Output]:
        """Serve these requests; the outputs are in their order. Raises PeerError, also if an
        output has not exactly the length that was asked for."""
        requests = [{"prompt": ask.prompt, "output": ask.output} for ask in asks]
        answer = self._ask({"op": "run", "requests": requests})
        outputs = [
            Output(tuple(each["tokens"]), each["first"], each["last"]) for each in answer["outputs"]
        ]
        for number, (ask, output) in enumerate(zip(asks, outputs, strict=True)):
            if len(output.tokens) != ask.output:
                raise PeerError(
                    f"request {number} got {len(output.tokens)} tokens, not {ask.output}"
                )
        return outputs

    def processor_seconds(self) -> float:
        """Processor time of it and its descendants so far."""
        spent = 0.0
        for process in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                spent += times.user + times.system
        return spent

    def stop(self) -> None:
        """End it and everything in its group."""
        self._signal(signal.SIGCONT)
        if self._process.poll() is None:
            try:
                self._send({"op": "stop"})
                self._process.wait(_STOP_SECONDS)
            except (BrokenPipeError, subprocess.TimeoutExpired):
                pass
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def kill(self) -> None:
        """End it and everything in its group at once, whatever it is doing."""
        for process in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._signal(signal.SIGKILL)
        self._process.wait()

    # -- The wire --------------------------------------------------------------------------

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        self._signal(signal.SIGCONT)
        try:
            self._send(message)
            answer: dict[str, Any] = json.loads(self._receive())
        except (BrokenPipeError, EOFError) as error:
            raise PeerError(f"its process has ended: {self._last_words()}") from error
        finally:
            if self._freeze:
                self._signal(signal.SIGSTOP)
        if not answer["ok"]:
            raise PeerError(answer["error"])
        return answer

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message).encode() + b"\n")
        self._process.stdin.flush()

    def _receive(self) -> bytes:
        """One line. The pipe is read without a buffer, so that waiting for it can time out."""
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        deadline, line = time.monotonic() + self._timeout, b""
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise PeerError(f"no answer within {self._timeout:g} s")
                part = os.read(pipe, 1 << 16)
                if not part:
                    raise EOFError
                line += part
        return line

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines()
        return lines[-1] if lines else "it said nothing"

    # -- The process group -----------------------------------------------------------------

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.killpg(self._process.pid, number)

    def _processes(self) -> list[psutil.Process]:
        try:
            process = psutil.Process(self._process.pid)
            return [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []
