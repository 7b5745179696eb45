"""Whole answers, to compare with what should have come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import grpc
import pytest

import demo_model
from baton.client import Client, Ended, Event, Started, Text, Totals
from baton.v1 import generation_pb2

PROMPT = list(range(20, 50))
CONTEXT = 4096
DEMO = demo_model.path()


@dataclass
class Answer:
    """A whole stream: texts, token ids and endings by sequence."""

    events: list[Event]
    texts: list[str]
    ids: list[list[int]]
    ended: list[generation_pb2.Finished]

    @property
    def accepted(self) -> generation_pb2.Accepted:
        started = self.events[0]
        assert isinstance(started, Started)
        return started.message

    @property
    def usage(self) -> generation_pb2.Usage:
        totals = self.events[-1]
        assert isinstance(totals, Totals)
        return totals.message

    def logprobs(self, index: int) -> list[generation_pb2.TokenLogprob]:
        return [entry for delta in self.deltas(index) for entry in delta.logprobs]

    def deltas(self, index: int) -> list[generation_pb2.Delta]:
        return [e.message for e in self.events if isinstance(e, Text) and e.index == index]


async def ask(client: Client, prompt: Any = PROMPT, n: int = 1, **options: Any) -> Answer:
    """A stream to its end, with token ids and past end-of-sequence unless told otherwise."""
    options = {"token_ids": True, "ignore_eos": True, "max_tokens": 20} | options
    answer = Answer([e async for e in client.generate(prompt, n=n, **options)], [], [], [])
    for index in range(n):
        answer.texts.append("".join(delta.text for delta in answer.deltas(index)))
        answer.ids.append([t for delta in answer.deltas(index) for t in delta.token_ids])
    ended = {e.index: e.message for e in answer.events if isinstance(e, Ended)}
    answer.ended = [ended[index] for index in range(n)]
    return answer


async def status_of(call: Any) -> tuple[grpc.StatusCode, str]:
    """Code and text of a call's refusal."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    return caught.value.code(), caught.value.details() or ""
