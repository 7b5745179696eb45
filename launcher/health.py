"""Whether a process of the cluster serves, by the standard gRPC health service."""

from __future__ import annotations

import asyncio
import sys

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton import rpc

RETRY_SECONDS = 0.1


async def until_serving(address: str, service: str = "") -> None:
    """Wait until the process at `address` says SERVING, be it not there yet."""
    async with rpc.channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=service)
        while True:
            watch = stub.Watch(request, wait_for_ready=True)
            try:
                # Not `async for`: leaving that keeps the connection until the garbage is collected.
                # (EOF, which the stubs do not know, has no status SERVING either.)
                while (answer := await watch.read()) != grpc.aio.EOF:  # type: ignore[attr-defined]
                    if answer.status == health_pb2.HealthCheckResponse.SERVING:
                        return
            except grpc.aio.AioRpcError:
                await asyncio.sleep(RETRY_SECONDS)
            finally:
                watch.cancel()


async def run(address: str, service: str, timeout: float) -> int:
    """`baton health`; returns the exit code."""
    try:
        async with asyncio.timeout(timeout):
            await until_serving(address, service)
    except TimeoutError:
        print(f"baton: {address} does not serve", file=sys.stderr)
        return 1
    print("SERVING")
    return 0
