"""Child processes: started together, kept up, stopped in order.

    STARTING --settle()--> RUNNING --stop()--> STOPPED
       a child that ends:
       fails the start        is restarted      is expected

Knows nothing of what the processes do.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from baton import tether
from baton.errors import BatonError

LogSink = Callable[[str, str], None]
"""Takes the name of a process and one line of its log."""


class ChildFailed(BatonError):
    """A child process ended before the whole was up."""


@dataclass(frozen=True, slots=True)
class Command:
    """A process to run: its unique name, its arguments, and what it sees in its environment."""

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))


@dataclass(frozen=True, slots=True)
class Backoff:
    """Seconds before a restart: doubled each time up to `most`, back to `first` after a run of
    `healthy` seconds."""

    first: float = 0.5
    most: float = 30.0
    healthy: float = 60.0


class Child:
    """One run of a command. Its output goes to the log line by line; the last lines are kept."""

    TAIL = 15

    def __init__(self, command: Command, log: LogSink) -> None:
        self.command = command
        self.tail: deque[str] = deque(maxlen=self.TAIL)
        self._log = log
        self._process: asyncio.subprocess.Process
        self._reader: asyncio.Task[None]

    async def start(self) -> None:
        """Start it, in a process group of its own: Ctrl-C in a terminal is for the supervisor."""
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-IS", tether.__file__, str(os.getpid()), *self.command.argv),
            env=dict(self.command.env) | {"PYTHONUNBUFFERED": "1"},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
        self._reader = asyncio.create_task(self._read())

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process.returncode is None

    async def wait(self) -> int:
        """Wait for its end and the end of its log; returns the exit code, -N for signal N."""
        code = await self._process.wait()
        # A grandchild may hold the pipe open; nobody waits for that.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await asyncio.shield(self._reader)
        self._reader.cancel()
        return code

    def signal(self, number: int) -> None:
        """Send a signal to its whole process group, if it lives."""
        if self.running:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, number)

    async def _read(self) -> None:
        stream = self._process.stdout
        assert stream is not None
        rest = b""
        while block := await stream.read(65536):  # readline() fails on lines over its limit
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                self._emit(line)
        if rest:
            self._emit(rest)

    def _emit(self, line: bytes) -> None:
        text = line.decode(errors="replace").rstrip()
        self.tail.append(text)
        self._log(self.command.name, text)


class Supervisor:
    """Keeps a set of commands running."""

    def __init__(self, log: LogSink, backoff: Backoff | None = None) -> None:
        self._log = log
        self._backoff = backoff or Backoff()
        self._children: dict[str, Child] = {}
        self._watchers: dict[str, asyncio.Task[None]] = {}
        self._failure: asyncio.Future[ChildFailed] = asyncio.get_running_loop().create_future()
        self._settled = False

    @property
    def pids(self) -> dict[str, int]:
        """The process ids of those that run, by name."""
        return {name: child.pid for name, child in self._children.items() if child.running}

    async def start(self, commands: Iterable[Command]) -> None:
        """Start them all, at once."""
        for command in commands:
            child = self._children[command.name] = Child(command, self._log)
            await child.start()
            self._watchers[command.name] = asyncio.create_task(self._watch(command))

    async def failed(self) -> ChildFailed:
        """Wait until a child ends while starting, and say so with the end of its log."""
        return await asyncio.shield(self._failure)

    def settle(self) -> None:
        """All are up: from now on, one that ends is restarted."""
        self._settled = True

    async def stop(self, stages: Sequence[tuple[Sequence[str], float]]) -> None:
        """Stop stage by stage: SIGTERM to the children named, SIGKILL to what is left after that
        many seconds. Cancelling kills everything left at once."""
        for watcher in self._watchers.values():
            watcher.cancel()
        await asyncio.gather(*self._watchers.values(), return_exceptions=True)
        try:
            for names, seconds in stages:
                started = [self._children[name] for name in names if name in self._children]
                await self._stop_stage(started, seconds)
        finally:
            await self._kill(self._children.values())

    async def _stop_stage(self, children: Sequence[Child], seconds: float) -> None:
        for child in children:
            child.signal(signal.SIGTERM)
        ends = [asyncio.create_task(child.wait()) for child in children]
        if not ends:
            return
        _, late = await asyncio.wait(ends, timeout=seconds)
        for task in late:
            task.cancel()
        for child in children:
            if child.running:
                self._log(
                    "baton", f"{child.command.name} did not stop in {seconds:g} s: killing it"
                )
        await self._kill(children)

    async def _kill(self, children: Iterable[Child]) -> None:
        alive = [child for child in children if child.running]
        for child in alive:
            child.signal(signal.SIGKILL)
        await asyncio.gather(*(child.wait() for child in alive))

    async def _watch(self, command: Command) -> None:
        """Wait for the end of a child; fail the start, or start it again, as long as wanted."""
        delay = self._backoff.first
        clock = asyncio.get_running_loop().time
        while True:
            child, started = self._children[command.name], clock()
            code = await child.wait()
            if not self._settled:
                if not self._failure.done():
                    self._failure.set_result(_failure(child, code))
                return
            if clock() - started >= self._backoff.healthy:
                delay = self._backoff.first
            self._log("baton", f"{command.name} ended ({_how(code)}): restart in {delay:g} s")
            await asyncio.sleep(delay)
            delay = min(delay * 2, self._backoff.most)
            child = Child(command, self._log)
            await child.start()
            self._children[command.name] = child


def _how(code: int) -> str:
    """`exit code 2` or `SIGKILL`."""
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name


def _failure(child: Child, code: int) -> ChildFailed:
    lines = "\n".join(f"  {line}" for line in child.tail)
    return ChildFailed(f"{child.command.name} ended at start ({_how(code)})\n{lines}".rstrip())
