"""The whole path in one process: real gRPC, real Redis, real models, real shared memory.

Separate processes are tested by tests/launcher; here many models and settings get their turn.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from tokenizers import Tokenizer, models, pre_tokenizers

from baton import config
from baton.client import Client
from decode_worker.main import DecodeServer
from gateway.main import GatewayServer
from gateway.metrics import GatewayMetrics
from prefill_worker.main import PrefillServer
from tests.e2e.answers import CONTEXT
from tests.engine.conftest import CONFIGS, VOCAB, TinyModel, save_model


@dataclass
class Stack:
    """A running cluster."""

    address: str
    gateway: GatewayServer
    prefill: list[PrefillServer]
    decode: list[DecodeServer]
    metrics: CollectorRegistry  # the gateway's
    decode_metrics: list[CollectorRegistry]

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        """A client of its gateway."""
        async with Client(self.address) as client:
            yield client

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


@pytest.fixture
def run_stack(redis_url: str) -> Run:
    """`async with run_stack(model_path, prefill=1, decode=1, **worker_settings) as stack`."""

    @asynccontextmanager
    async def run(
        model: Path,
        *,
        prefill: int = 1,
        decode: int = 1,
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
        async with AsyncExitStack() as exits:

            async def start(server: Any, *stop: float) -> Any:
                await server.start()
                exits.push_async_callback(server.stop, *stop)
                return server

            registries = [CollectorRegistry() for _ in range(decode)]
            # Stopped in reverse: the gateway first, while its workers are still there.
            decoders = [
                await start(
                    DecodeServer(
                        config.load(config.DecodeConfig, worker | (decode_settings or {})),
                        registry,
                    ),
                    0.0,
                )
                for registry in registries
            ]
            prefillers = [
                await start(
                    PrefillServer(config.load(config.PrefillConfig, worker), CollectorRegistry()),
                    0.0,
                )
                for _ in range(prefill)
            ]
            settings = config.load(config.GatewayConfig, shared | (gateway_settings or {}))
            registry = CollectorRegistry()
            gateway = await start(GatewayServer(settings, model, GatewayMetrics(registry)), 0.0)
            stack = Stack(gateway.address, gateway, prefillers, decoders, registry, registries)
            async with stack.client() as client:
                await _until_it_answers(client)
            yield stack

    return run


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


# For the tests of the public API; others have models of their own.


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """A tiny Llama whose token 17 is written "17"."""
    path = tmp_path_factory.mktemp("llama")
    config = CONFIGS["llama"]()
    config.max_position_embeddings = CONTEXT
    made = save_model(config, path)
    name_every_token(path)
    return made


@pytest.fixture
async def stack(run_stack: Run, model: TinyModel) -> AsyncIterator[Stack]:
    async with run_stack(model.path, dtype="float32", max_batch_tokens=64) as running:
        yield running
        await running.quiet()
        assert not running.gateway.gateway.sessions.waiting


@pytest.fixture
async def client(stack: Stack) -> AsyncIterator[Client]:
    async with stack.client() as connected:
        yield connected
