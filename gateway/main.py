"""The gateway process."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from baton import telemetry
from baton.addresses import require_loopback
from baton.config import GatewayConfig
from baton.errors import ConfigError, QueueError
from baton.process import unique_id, until_stopped
from baton.rpc import Server
from baton.v1 import generation_pb2, model_pb2, model_pb2_grpc
from baton.v1.generation_pb2_grpc import add_GenerationServiceServicer_to_server
from gateway.admin_service import AdminService
from gateway.core import Gateway
from gateway.generation_service import GenerationService
from gateway.lengths import open_lengths
from gateway.metrics import GatewayMetrics
from gateway.model_files import load_facts
from gateway.model_service import ModelService
from gateway.prefixes import open_prefixes
from gateway.prompt import PromptEncoder
from gateway.tokenizer import Tokenizer
from gateway.validation import Validator
from queueing.redis_queue import RedisGatewayQueue
from queueing.settings import QueueSettings

log = logging.getLogger(__name__)

MESSAGE_SLACK_BYTES = 2**20  # everything in a request that is not its prompt
START_PAUSE = 0.5
STOP_GRACE = 1.0

SERVICES = (
    generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name,
    model_pb2.DESCRIPTOR.services_by_name["ModelService"].full_name,
    model_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name,
)


class GatewayServer:
    """A gateway behind its gRPC API. `start`, then `stop`."""

    def __init__(
        self, config: GatewayConfig, model: Path, metrics: GatewayMetrics | None = None
    ) -> None:
        """Load the tokenizer and bind the address; port 0 takes a free one (see `address`).

        Raises ConfigError and ModelError.
        """
        require_loopback(config.address, insecure_network=config.insecure_network)
        self._config = config
        metrics = metrics or GatewayMetrics()
        facts = load_facts(model, config.model_name)
        tokenizer = Tokenizer.load(model)
        gateway_id = config.gateway_id or unique_id("gateway")
        self._queue = RedisGatewayQueue(
            config.redis_url.get_secret_value(), config.pool, gateway_id, _settings(config)
        )
        self.gateway = Gateway(
            config,
            gateway_id,
            self._queue,
            facts,
            tokenizer,
            metrics,
            open_prefixes(config),
            open_lengths(config, facts, tokenizer.decode, metrics),
        )
        prompts = PromptEncoder(tokenizer, config.max_prompt_bytes)
        validator = Validator(facts, prompts, config, self.gateway.max_context)
        limit = config.max_prompt_bytes + MESSAGE_SLACK_BYTES
        self._server = Server(config.address, max_message_bytes=limit)
        self.address = self._server.address
        add_GenerationServiceServicer_to_server(
            GenerationService(self.gateway, validator), self._server.grpc
        )
        model_pb2_grpc.add_ModelServiceServicer_to_server(
            ModelService(self.gateway, validator, prompts), self._server.grpc
        )
        model_pb2_grpc.add_AdminServiceServicer_to_server(
            AdminService(self.gateway), self._server.grpc
        )

    async def start(self) -> None:
        """Serve; SERVING once Redis has answered."""
        await self._server.start(SERVICES)
        while True:
            try:
                await self.gateway.start()
                break
            except QueueError as error:
                log.warning("waiting for the queue: %s", error)
                await asyncio.sleep(START_PAUSE)
        await self._server.serving()
        log.info("serving %s on %s", self.gateway.facts.name, self.address)

    async def stop(self, drain_seconds: float) -> None:
        """Take no new requests, let those that run finish for `drain_seconds`, then end them."""
        await self._server.not_serving()
        await self.gateway.drain(drain_seconds)
        await self._server.stop(STOP_GRACE)
        await self.gateway.close()
        await self._queue.close()


async def run(config: GatewayConfig) -> None:
    """Serve until SIGINT or SIGTERM, then drain. Raises ConfigError and ModelError at start."""
    telemetry.start("gateway", config)
    if config.model is None:
        raise ConfigError("--model: must be set")
    metrics = telemetry.MetricsServer(config.metrics_address)
    try:
        server = GatewayServer(config, config.model)
        stopped = asyncio.create_task(until_stopped())
        started = asyncio.create_task(server.start())
        await asyncio.wait({started, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if started.done():
            await started
            await stopped
        started.cancel()
        await asyncio.gather(started, return_exceptions=True)
        log.info("draining")
        await server.stop(config.drain_seconds)
    finally:
        metrics.stop()


def _settings(config: GatewayConfig) -> QueueSettings:
    return QueueSettings(
        policy=config.policy,
        levels=1 if config.policy == "fcfs" else config.mlfq_levels,
        quantum=config.mlfq_quantum,
        ratio=config.mlfq_ratio,
        promote_after=config.mlfq_promote_after,
        fairness_slack=config.fairness_slack,
        urgent_before=config.urgent_before,
        prefill_seconds_per_token=config.prefill_seconds_per_token,
        prefill_seconds_base=config.prefill_seconds_base,
        max_queued_requests=config.max_queued_requests,
        max_queued_tokens=config.max_queued_tokens,
        max_requests_per_tenant=config.max_requests_per_tenant,
        max_attempts=config.max_attempts,
    )
