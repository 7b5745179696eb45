"""A gateway's place at a decode worker, for benchmarks: asks for sequences, takes their tokens.

python benchmarks/decode_client.py ADDRESS SEQUENCES PROMPT_TOKENS OUTPUT_TOKENS TEMPERATURE
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator

from baton import rpc, wire
from baton.internal.v1 import worker_pb2, worker_pb2_grpc
from baton.types import Claim, Request, Sampling, Stopping


async def take(address: str, batch: int, prompt: int, tokens: int, temperature: float) -> None:
    """Ask for `batch` sequences at once, with local prefill, and return when all have ended."""
    left, done = set(range(batch)), asyncio.Event()

    async def commands() -> AsyncIterator[worker_pb2.DecodeRequest]:
        yield worker_pb2.DecodeRequest(hello=worker_pb2.Hello(gateway_id="benchmark"))
        for slot in range(batch):
            request = Request(
                f"request-{slot}",
                tuple(3 + (slot * 7 + place) % 900 for place in range(prompt)),
                Sampling(temperature=temperature, seed=slot),
                Stopping(max_tokens=tokens),
            )
            start = worker_pb2.StartRequest(
                slot=slot,
                request=wire.request_to_proto(request, now=0.0),
                claim=wire.claim_to_proto(Claim(slot)),
                local_prefill=True,
            )
            yield worker_pb2.DecodeRequest(start=start)
        await done.wait()

    async with rpc.channel(address) as channel:
        stream = worker_pb2_grpc.DecodeServiceStub(channel).Decode(commands())
        async for message in stream:
            for event in message.events:
                if event.HasField("failed"):
                    raise RuntimeError(f"sequence {event.slot}: {event.failed.message}")
            left -= {output.slot for output in message.outputs if output.finish_reason}
            if not left:
                done.set()


if __name__ == "__main__":
    where, sequences, length, output, heat = sys.argv[1:]
    asyncio.run(take(where, int(sequences), int(length), int(output), float(heat)))
