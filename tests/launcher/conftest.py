"""A gateway's API that plays a script."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from baton import rpc
from baton.v1 import generation_pb2_grpc, model_pb2_grpc


@pytest.fixture
async def address(script: Any) -> AsyncIterator[str]:
    """Where `script` answers, a servicer of generation and models that the test's module makes."""
    server = rpc.Server("127.0.0.1:0")
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(script, server.grpc)
    model_pb2_grpc.add_ModelServiceServicer_to_server(script, server.grpc)
    await server.start([])
    yield server.address
    await server.stop(0)
