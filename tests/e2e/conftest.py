"""The whole path in one process: real gRPC, real Redis, real models, real shared memory.

Separate processes are tested by tests/launcher; here many models and settings get their turn.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from prometheus_client import CollectorRegistry
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig

from baton import config
from baton.client import Client
from decode_worker.main import DecodeServer
from gateway.main import GatewayServer
from gateway.metrics import GatewayMetrics
from prefill_worker.main import PrefillServer
from tests.e2e.answers import CONTEXT
from tests.engine.conftest import CONFIGS, VOCAB, TinyModel, save_model
from tests.engine.test_hf import LIMIT, SERVED


@dataclass
class Stack:
    """A running cluster."""

    address: str
    gateway: GatewayServer
    prefill: list[PrefillServer]
    decode: list[DecodeServer]
    metrics: CollectorRegistry  # the gateway's
    decode_metrics: list[CollectorRegistry]
    more_gateways: list[GatewayServer]

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        """A client of its gateway."""
        async with Client(self.address) as client:
            yield client

    def decoded(self, metric: str, **labels: str) -> float:
        """What the first decode worker tells Prometheus as `baton_decode_{metric}`."""
        value = self.decode_metrics[0].get_sample_value(f"baton_decode_{metric}", labels)
        assert value is not None, metric
        return value

    async def quiet(self) -> None:
        """Wait until no worker holds a block, a slot or a lease."""
        async with asyncio.timeout(10):
            while not self._is_quiet():
                await asyncio.sleep(0.01)

    def _is_quiet(self) -> bool:
        workers = [server.worker for server in (*self.prefill, *self.decode)]
        loads = [worker.load() for worker in workers]
        return all(w.idle for w in workers) and all(
            load.free_blocks == load.total_blocks for load in loads
        )


Run = Callable[..., Any]


@pytest.fixture(scope="session")
def run_stack(redis_url: str) -> Run:
    """`async with run_stack(model_path, prefill=1, decode=1, **worker_settings) as stack`."""

    def run(model: Path, **settings: Any) -> AbstractAsyncContextManager[Stack]:
        return _run(redis_url, model, **settings)

    return run


@asynccontextmanager
async def _run(
    redis_url: str,
    model: Path,
    *,
    prefill: int = 1,
    decode: int = 1,
    gateways: int = 1,
    gateway_settings: dict[str, Any] | None = None,
    decode_settings: dict[str, Any] | None = None,
    **worker: Any,
) -> AsyncIterator[Stack]:
    shared = {
        "model": model,
        "redis_url": redis_url,
        "pool": f"e2e-{uuid.uuid4().hex[:8]}",
        "address": "127.0.0.1:0",
    }
    worker = {"threads": 1, "kv_memory": 2**22, **shared, **worker}
    decode_config = config.load(config.DecodeConfig, worker | (decode_settings or {}))
    prefill_config = config.load(config.PrefillConfig, worker)
    gateway_config = config.load(config.GatewayConfig, shared | (gateway_settings or {}))
    async with AsyncExitStack() as exits:

        async def start(server: Any) -> Any:
            await server.start()
            exits.push_async_callback(server.stop, 0.0)
            return server

        registries = [CollectorRegistry() for _ in range(decode)]
        # Stopped in reverse: the gateway first, while its workers are still there.
        decoders = [await start(DecodeServer(decode_config, each)) for each in registries]
        prefillers = [
            await start(PrefillServer(prefill_config, CollectorRegistry())) for _ in range(prefill)
        ]
        registry = CollectorRegistry()
        gateway = await start(GatewayServer(gateway_config, model, GatewayMetrics(registry)))
        more = [
            await start(GatewayServer(gateway_config, model, GatewayMetrics(CollectorRegistry())))
            for _ in range(gateways - 1)
        ]
        stack = Stack(gateway.address, gateway, prefillers, decoders, registry, registries, more)
        for server in (gateway, *more):
            async with Client(server.address) as client:
                await _until_it_answers(client)
        yield stack


async def _until_it_answers(client: Client) -> None:
    async with asyncio.timeout(20):
        await client.generate_unary([5], max_tokens=2)


def name_every_token(path: Path) -> Path:
    """Give a tiny random model a tokenizer in which token 17 is written "17"."""
    vocabulary = {str(token): token for token in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path / "tokenizer.json"))
    return path


Named = Callable[[str], tuple[TinyModel, int]]


@pytest.fixture(scope="session")
def named(tmp_path_factory: pytest.TempPathFactory) -> Named:
    """The tiny random model of a name, and its context limit; made once."""
    made: dict[str, tuple[TinyModel, int]] = {}

    def make(name: str) -> tuple[TinyModel, int]:
        if name not in made:
            config = (
                CONFIGS[name]() if name in CONFIGS else AutoConfig.for_model(name, **SERVED[name])
            )
            model = save_model(config, tmp_path_factory.mktemp(name))
            name_every_token(model.path)
            made[name] = model, LIMIT if name in SERVED else 128
        return made[name]

    return make


# For the tests of the public API; others have models of their own. Tests of one module share a
# cluster, and the event loop that it runs on.


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """A tiny Llama whose token 17 is written "17"."""
    path = tmp_path_factory.mktemp("llama")
    config = CONFIGS["llama"]()
    config.max_position_embeddings = CONTEXT
    made = save_model(config, path)
    name_every_token(path)
    return made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(run_stack: Run, model: TinyModel) -> AsyncIterator[Stack]:
    # KV for a few outputs of thousands of tokens at once, however a backend pads it
    settings = {"dtype": "float32", "max_batch_tokens": 64, "kv_memory": 2**23}
    async with run_stack(model.path, **settings) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def stack(running: Stack) -> AsyncIterator[Stack]:
    """The cluster of the module, which no test may break, and each leaves as it found it."""
    yield running
    await running.quiet()
    assert not running.gateway.gateway.sessions.waiting


@pytest_asyncio.fixture(loop_scope="module")
async def client(stack: Stack) -> AsyncIterator[Client]:
    async with stack.client() as connected:
        yield connected
