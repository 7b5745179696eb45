"""A cluster of separate processes on loopback that tests kill, freeze and stop one by one."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc.aio
import pytest

import demo_model
from baton import errors, rpc, tether
from baton.client import Client, Ended, Text
from baton.v1 import model_pb2, model_pb2_grpc
from queueing.embedded import find_servers

SECONDS = 60.0  # for anything that must happen, on a machine with other things to do
WORKER_TTL = 1.5
WORKERS = ("prefill-0", "decode-0", "decode-1")
PARTS = ("gateway-0", "gateway-1", *WORKERS)
LONG_PROMPT = tuple(range(5, 805))
PROMPTS: tuple[str | tuple[int, ...], ...] = (
    "What does len do?",
    "Explain os.path.join in detail.",
    LONG_PROMPT,
    "What is itertools.chain?",
)
OUTPUT_TOKENS = 200

Outcome = tuple[int, ...] | errors.BatonError


class Part:
    """One process, which can be started again with the same command."""

    def __init__(self, argv: list[str], env: dict[str, str], log: Path) -> None:
        # The kernel ends it with us, whatever happens to the test run.
        self._argv = [sys.executable, "-IS", tether.__file__, str(os.getpid()), *argv]
        self._env, self._log = os.environ | env, log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._argv, env=self._env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def freeze(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    async def terminate(self) -> int:
        """SIGTERM; returns the exit code."""
        assert self._process is not None
        self._process.terminate()
        return await asyncio.to_thread(self._process.wait, SECONDS)

    def log(self) -> str:
        return self._log.read_text(errors="replace")


class Parts:
    """Redis, two gateways, a prefill worker and two decode workers, by name."""

    def __init__(self, directory: Path) -> None:
        self._addresses: dict[str, str] = {}
        self._metrics: dict[str, str] = {}
        self._parts: dict[str, Part] = {}
        sock = directory / "redis.sock"
        self._parts["redis"] = Part(
            [
                *(str(find_servers()[0]), "--port", "0", "--unixsocket", str(sock)),
                *("--save", "", "--appendonly", "no", "--dir", str(directory)),
            ],
            {},
            directory / "redis.log",
        )
        for name in PARTS:
            address, metrics = free_address(), free_address()
            self._addresses[name], self._metrics[name] = address, metrics
            kind = name.partition("-")[0]
            argv = [sys.executable, "-m", "launcher", kind]
            argv += [f"--address={address}", f"--metrics-address={metrics}"]
            argv += [f"--model={demo_model.path()}", "--model-name=demo"]
            if kind == "gateway":
                # A worker may take long to start when nobody else is there.
                argv += [f"--gateway-id={name}", f"--queue-timeout={SECONDS}"]
            else:
                argv += [f"--worker-id={name}", f"--worker-ttl={WORKER_TTL}", "--threads=1"]
                # float32, so that recomputed KV gives the same tokens
                argv += ["--dtype=float32", "--kv-memory=67108864", "--drain-seconds=30"]
            if kind == "prefill":
                argv += ["--kv-address=127.0.0.1:0", "--max-batch-tokens=32"]  # many chunks
            env = {"BATON_REDIS_URL": f"unix://{sock}", "GRPC_VERBOSITY": "ERROR"}
            self._parts[name] = Part(argv, env, directory / f"{name}.log")

    def __getitem__(self, name: str) -> Part:
        return self._parts[name]

    def client(self, gateway: str = "gateway-0") -> Client:
        return Client(self._addresses[gateway])

    def kill_all(self) -> None:
        for part in self._parts.values():
            part.kill()

    async def whole(self) -> None:
        """Start what does not run; return when both gateways see every worker and answer."""
        for part in self._parts.values():
            if not part.running:
                part.start()
        for gateway in ("gateway-0", "gateway-1"):
            await eventually(lambda gateway=gateway: self._sees(gateway, {*WORKERS}))
            async with self.client(gateway) as client:
                assert len(await tokens(client, "Hello", 3)) == 3

    async def forgotten(self, worker: str) -> None:
        """Return when the registry of workers is without one, as gateway-0 sees it."""
        await eventually(lambda: self._sees("gateway-0", {*WORKERS} - {worker}))

    async def _sees(self, gateway: str, workers: set[str]) -> bool:
        async with rpc.channel(self._addresses[gateway]) as channel:
            admin = model_pb2_grpc.AdminServiceStub(channel)
            try:
                answer = await admin.GetStatus(model_pb2.GetStatusRequest(), timeout=2)
            except grpc.aio.AioRpcError:
                return False
        return {worker.id for worker in answer.status.workers} == workers

    async def quiet(self, seconds: float = SECONDS) -> None:
        """Return when no worker that runs holds a block or a sequence."""
        await eventually(lambda: asyncio.to_thread(self._is_quiet), seconds)

    def _is_quiet(self) -> bool:
        return all(self._held(name) == 0 for name in WORKERS if self[name].running)

    def _held(self, name: str) -> float:
        kind = name.partition("-")[0]
        with urllib.request.urlopen(f"http://{self._metrics[name]}/metrics", timeout=10) as page:
            text = page.read().decode()
        names = ("kv_blocks_used", "sequences_running", "sequences_waiting")
        values = [re.search(rf"^baton_{kind}_{name} (\S+)$", text, re.M) for name in names]
        return sum(float(value[1]) for value in values if value is not None)


def free_address() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{one.getsockname()[1]}"


async def eventually(condition: Callable[[], object], seconds: float = SECONDS) -> None:
    """Wait until `condition` (plain or async) holds."""
    end = time.monotonic() + seconds
    while True:
        holds = condition()
        if await holds if asyncio.iscoroutine(holds) else holds:
            return
        assert time.monotonic() < end, f"not within {seconds:g} s"
        await asyncio.sleep(0.05)


async def tokens(
    client: Client, prompt: str | tuple[int, ...], size: int, heard: list[int] | None = None
) -> tuple[int, ...]:
    """A greedy stream's token ids; `heard` grows while they come."""
    ids = [] if heard is None else heard
    options = {"temperature": 0.0, "ignore_eos": True, "token_ids": True}
    async with asyncio.timeout(SECONDS):
        async for event in client.generate(prompt, max_tokens=size, **options):
            match event:
                case Text():
                    ids.extend(event.message.token_ids)
                case Ended():
                    assert (event.reason, event.completion_tokens) == ("length", len(ids))
    return tuple(ids)


class Load:
    """Greedy streams of several prompts that begin together; `end` gives what came of each."""

    def __init__(self, client: Client, times: int = 1, size: int = OUTPUT_TOKENS) -> None:
        self.prompts = [*PROMPTS] * times
        self.heard: list[list[int]] = [[] for _ in self.prompts]
        self._tasks = [
            asyncio.create_task(tokens(client, prompt, size, heard))
            for prompt, heard in zip(self.prompts, self.heard, strict=True)
        ]

    async def begun(self) -> None:
        """Return when some stream has tokens; others may still be in prefill."""
        await eventually(lambda: any(len(heard) > 5 for heard in self.heard))

    async def flowing(self) -> None:
        """Return when every stream has tokens."""
        await eventually(lambda: all(len(heard) > 5 for heard in self.heard))

    async def end(self) -> list[Outcome]:
        results = await asyncio.gather(*self._tasks, return_exceptions=True)
        for result in results:
            if not isinstance(result, (tuple, errors.BatonError)):
                raise result
        return results  # type: ignore[return-value] # as just checked


@pytest.fixture(scope="module")
def shared_parts() -> Iterator[Parts]:
    """Started once; tests leave it in pieces, `parts` mends it."""
    directory = Path(tempfile.mkdtemp(prefix="baton-chaos-", dir="/tmp"))  # a short socket path
    parts = Parts(directory)
    parts["redis"].start()
    try:
        yield parts
    finally:
        parts.kill_all()
        shutil.rmtree(directory)


@pytest.fixture
async def parts(shared_parts: Parts) -> Parts:
    """All of them up, and idle."""
    await shared_parts.whole()
    await shared_parts.quiet()
    return shared_parts


@pytest.fixture
async def expected(parts: Parts, answers: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """What each of PROMPTS gives when nothing disturbs it."""
    if not answers:
        async with parts.client() as client:
            answers += [await tokens(client, prompt, OUTPUT_TOKENS) for prompt in PROMPTS]
    return answers


@pytest.fixture(scope="module")
def answers() -> list[tuple[int, ...]]:
    return []
