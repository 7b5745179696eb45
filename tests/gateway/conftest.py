"""A model directory without weights, and clusters of a gateway and scripted workers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from tokenizers import Tokenizer

from baton.client import Client
from baton.config import GatewayConfig
from gateway.main import GatewayServer
from gateway.metrics import GatewayMetrics
from gateway.tokenizer import Tokenizer as ModelTokenizer
from tests.gateway.tokenizers import KINDS, byte_level
from tests.gateway.workers import FakeDecode, FakePrefill, FakeWorker, scripted_token

CHAT_TEMPLATE = """\
{{ bos_token }}{% for message in messages %}
{% if message.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}
<|{{ message.role }}|>{{ message.content }}{% endfor %}
{% if add_generation_prompt %}<|assistant|>{% endif %}"""


@pytest.fixture(scope="session")
def backends() -> dict[str, Tokenizer]:
    """One tokenizer of each kind."""
    return {kind: make() for kind, make in KINDS.items()}


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a gateway reads of a model: no weights."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    directory.mkdir()
    byte_level().save(str(directory / "tokenizer.json"))
    files = {
        "config.json": {
            "model_type": "llama",
            "vocab_size": 400,
            "max_position_embeddings": 256,
            "eos_token_id": 1,
            "weight_dtype": "float32",
            "kv_dtype": "float32",
        },
        "generation_config.json": {"eos_token_id": [1], "repetition_penalty": 1.1},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "chat_template": CHAT_TEMPLATE,
        },
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content))
    return directory


class Cluster:
    """A gateway and scripted workers on one Redis."""

    def __init__(self, redis_url: str, pool: str, model: Path) -> None:
        self.redis_url, self.pool, self.model = redis_url, pool, model
        self.workers: list[FakeWorker] = []
        self.server: GatewayServer | None = None
        self.registry = CollectorRegistry()
        self._more: list[tuple[GatewayServer, Client]] = []

    async def start(self, **options) -> GatewayServer:
        self.server = await self._gateway(self.registry, options)
        self.client = Client(self.server.address)
        return self.server

    async def one_more(self, **options) -> tuple[GatewayServer, Client]:
        """Another gateway of the pool, and a client of it."""
        server = await self._gateway(CollectorRegistry(), options)
        self._more.append((server, Client(server.address)))
        return self._more[-1]

    async def _gateway(self, registry: CollectorRegistry, options) -> GatewayServer:
        config = GatewayConfig(
            **{
                "redis_url": self.redis_url,
                "pool": self.pool,
                "address": "127.0.0.1:0",
                "model_name": "tiny",
                "model": self.model,
                **options,
            }
        )
        server = GatewayServer(config, self.model, GatewayMetrics(registry))
        await server.start()
        return server

    async def prefill(self, name: str = "prefill-0", **settings) -> FakePrefill:
        return await self._add(FakePrefill(name, self.redis_url, self.pool), settings)

    async def decode(self, name: str = "decode-0", **settings) -> FakeDecode:
        return await self._add(FakeDecode(name, self.redis_url, self.pool), settings)

    async def _add(self, worker, settings):
        for name, value in settings.items():
            setattr(worker, name, value)
        self.workers.append(await worker.start())
        return worker

    async def ready(self) -> None:
        """Wait until the gateways know every worker."""
        servers = [self.server, *(server for server, _ in self._more)]
        fleets = [server.gateway.fleet for server in servers]
        names = {worker.id for worker in self.workers}

        def known() -> bool:
            for fleet in fleets:
                links = {id for id, link in fleet.decode.items() if link.connected}
                if not names <= links | set(fleet.prefill):
                    return False
            return True

        await eventually(known)

    async def stop(self) -> None:
        for server, client in self._more:
            await client.close()
            await server.stop(0)
        if self.server is not None:
            await self.client.close()
            await self.server.stop(0)
        for worker in self.workers:
            await worker.kill()


async def eventually(condition: Callable[[], bool], timeout: float = 5.0) -> None:
    """Wait until `condition` holds."""
    async with asyncio.timeout(timeout):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.fixture(name="eventually")
def eventually_fixture():
    return eventually


@pytest.fixture
async def cluster(redis_url: str, pool: str, model_directory: Path):
    """An empty cluster; tests add workers and start the gateway."""
    cluster = Cluster(redis_url, pool, model_directory)
    yield cluster
    await cluster.stop()


@pytest.fixture
async def pair(cluster: Cluster):
    """The usual cluster: a prefill worker, a decode worker, and a gateway that finds them."""
    cluster.p, cluster.d = await cluster.prefill(), await cluster.decode()
    await cluster.start()
    await cluster.ready()
    return cluster


@pytest.fixture(scope="session")
def expected(model_directory: Path) -> Callable[[int], str]:
    """The text of a scripted output of so many tokens."""
    tokenizer = ModelTokenizer.load(model_directory)
    return lambda count: tokenizer.decode([scripted_token(i) for i in range(count)])
