"""Child processes are real here; what they run stands in for a gateway or a worker."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from baton import tether
from launcher.supervisor import Backoff, ChildFailed, Command, Supervisor

FOREVER = "import time; print('up'); time.sleep(60)"
DEAF = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up'); time.sleep(60)"


class Log:
    """Keeps every line, and lets a test wait for one."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._changed = asyncio.Event()

    def __call__(self, name: str, line: str) -> None:
        self.lines.append(f"{name}: {line}")
        self._changed.set()

    async def until(self, text: str, times: int = 1) -> None:
        async with asyncio.timeout(20):
            while sum(text in line for line in self.lines) < times:
                self._changed.clear()
                await self._changed.wait()


def command(name: str, code: str) -> Command:
    return Command(name, (sys.executable, "-c", code))


@pytest.fixture
async def log() -> Log:
    return Log()


@pytest.fixture
async def supervisor(log: Log) -> AsyncIterator[Supervisor]:
    made = Supervisor(log, Backoff(first=0.05, most=0.2))
    yield made
    await made.stop([])


async def test_each_line_of_a_child_is_logged_under_its_name(supervisor: Supervisor, log: Log):
    code = "import sys; print('out'); print('err', file=sys.stderr); print('x' * 200000); input()"
    await supervisor.start([command("worker", code)])
    await log.until("x" * 200_000)
    assert {"worker: out", "worker: err"} <= set(log.lines)


async def test_a_child_that_ends_at_start_fails_it_with_its_last_lines(supervisor: Supervisor):
    code = "print('line 1'); raise SystemExit('no such model')"
    await supervisor.start([command("good", FOREVER), command("bad", code)])
    async with asyncio.timeout(20):
        failure = await supervisor.failed()
    assert isinstance(failure, ChildFailed)
    assert str(failure).splitlines() == [
        "bad ended at start (exit code 1)",
        "  line 1",
        "  no such model",
    ]


async def test_a_child_that_dies_later_is_restarted_with_growing_delays(
    supervisor: Supervisor, log: Log
):
    await supervisor.start([command("worker", FOREVER)])
    await log.until("worker: up")
    supervisor.settle()
    first = supervisor.pids["worker"]
    os.kill(first, signal.SIGKILL)
    await log.until("worker: up", times=2)
    second = supervisor.pids["worker"]
    assert second != first
    os.kill(second, signal.SIGKILL)
    await log.until("worker: up", times=3)
    assert [line for line in log.lines if line.startswith("baton")] == [
        "baton: worker ended (SIGKILL): restart in 0.05 s",
        "baton: worker ended (SIGKILL): restart in 0.1 s",
    ]


async def test_stages_stop_one_after_the_other(supervisor: Supervisor, log: Log):
    polite = textwrap.dedent("""
        import signal, sys, time
        def stop(*_):
            time.sleep(0.3)
            print("bye", flush=True)
            sys.exit(0)
        signal.signal(signal.SIGTERM, stop)
        print("up")
        time.sleep(60)
    """)
    await supervisor.start([command("worker", polite), command("gateway", polite)])
    await log.until(": up", times=2)
    await supervisor.stop([(["gateway"], 10), (["worker"], 10)])
    assert [line for line in log.lines if line.endswith("bye")] == ["gateway: bye", "worker: bye"]
    assert supervisor.pids == {}


@pytest.mark.parametrize("how", ["ignores SIGTERM", "is frozen"])
async def test_a_child_that_does_not_stop_is_killed_in_bounded_time(
    supervisor: Supervisor, log: Log, how: str
):
    await supervisor.start([command("worker", DEAF)])
    await log.until("worker: up")
    pid = supervisor.pids["worker"]
    if how == "is frozen":
        os.kill(pid, signal.SIGSTOP)
    started = time.monotonic()
    await supervisor.stop([(["worker"], 0.3)])
    assert 0.2 < time.monotonic() - started < 5
    assert not psutil.pid_exists(pid)
    assert "baton: worker did not stop in 0.3 s: killing it" in log.lines


async def test_what_a_child_started_is_killed_with_it(supervisor: Supervisor, log: Log):
    nested = f"""
        import signal, subprocess, sys, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", {DEAF!r}])
        print("grandchild", child.pid)
        time.sleep(60)
    """
    await supervisor.start([command("worker", textwrap.dedent(nested))])
    await log.until("grandchild")
    await log.until("worker: up")
    line = next(line for line in log.lines if "grandchild" in line)
    await supervisor.stop([(["worker"], 0.2)])
    assert gone(int(line.split()[-1]))


async def test_a_second_interrupt_kills_at_once(supervisor: Supervisor, log: Log):
    await supervisor.start([command("worker", DEAF)])
    await log.until("worker: up")
    pid = supervisor.pids["worker"]
    stopping = asyncio.create_task(supervisor.stop([(["worker"], 60)]))
    await asyncio.sleep(0.1)
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    assert not psutil.pid_exists(pid)


async def test_a_crash_while_stopping_is_not_followed_by_a_restart(
    supervisor: Supervisor, log: Log
):
    await supervisor.start([command("worker", FOREVER)])
    await log.until("worker: up")
    supervisor.settle()
    await supervisor.stop([(["worker"], 5)])
    await asyncio.sleep(0.3)
    assert supervisor.pids == {}
    assert not [line for line in log.lines if "restart" in line]


def test_children_die_with_a_supervisor_that_is_killed():
    program = textwrap.dedent(f"""
        import asyncio, sys, uvloop
        from launcher.supervisor import Command, Supervisor

        async def main():
            supervisor = Supervisor(lambda name, line: None)
            await supervisor.start(
                [Command(str(n), (sys.executable, "-c", {DEAF!r})) for n in range(2)]
            )
            print(*supervisor.pids.values(), flush=True)
            await asyncio.sleep(60)

        uvloop.run(main())
    """)
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        try:
            assert len(pids) == 2
            assert all(psutil.pid_exists(pid) for pid in pids)
            parent.kill()
            parent.wait(10)
            assert gone(*pids)
        finally:
            parent.kill()
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def test_a_tether_whose_parent_is_gone_runs_nothing(tmp_path: Path):

    mark = tmp_path / "mark"
    ended = subprocess.run([sys.executable, "-IS", tether.__file__, "1", "touch", mark])
    assert ended.returncode == 1
    assert not mark.exists()


def gone(*pids: int) -> bool:
    """Whether none of these processes runs, in a moment."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        if not any(running(pid) for pid in pids):
            return True
        time.sleep(0.02)
    return False


def running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
