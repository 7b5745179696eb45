"""The gateway as a process."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton import rpc
from baton.config import GatewayConfig
from baton.errors import ConfigError, ModelError
from gateway.main import GatewayServer, run

MAIN = """
import asyncio, json, sys
from baton.config import GatewayConfig
from gateway.main import run
asyncio.run(run(GatewayConfig(**json.loads(sys.argv[1]))))
"""


def test_the_process_loads_no_torch_and_no_transformers():
    code = "import sys, gateway.main; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.cluster
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_signals_end_the_process_in_order(redis_url, pool, model_directory, tmp_path, number):
    socket = f"unix:{tmp_path}/gateway.sock"
    config = {
        "redis_url": redis_url,
        "pool": pool,
        "model": str(model_directory),
        "address": socket,
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", MAIN, json.dumps(config), stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(30), rpc.channel(socket) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            request = health_pb2.HealthCheckRequest()
            async for answer in stub.Watch(request, wait_for_ready=True):
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    break
        process.send_signal(number)
        _, errors = await asyncio.wait_for(process.communicate(), 15)
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == 0
    assert b"Traceback" not in errors


async def test_a_gateway_that_cannot_work_says_why(model_directory, tmp_path):
    with pytest.raises(ConfigError, match="insecure-network"):
        GatewayServer(GatewayConfig(address="0.0.0.0:0"), model_directory)
    with pytest.raises(ModelError, match=r"config\.json"):
        GatewayServer(GatewayConfig(address="127.0.0.1:0"), tmp_path)
    with pytest.raises(ConfigError, match="--model"):
        await run(GatewayConfig())
