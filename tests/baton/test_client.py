from __future__ import annotations

from contextlib import aclosing

import pytest

from baton.client import Client, Ended, event_of, reason_name, request
from baton.errors import InvalidRequest, NotFound
from baton.v1.generation_pb2 import GenerateResponse
from tests.cluster import Served


def test_options_find_their_place_by_name():
    message = request(
        "text",
        n=2,
        temperature=0.0,
        max_tokens=5,
        stop=["x"],
        logprobs=3,
        priority=4,
        token_ids=True,
        seed=None,
    )
    assert message.prompt == "text"
    assert (message.sampling.n, message.sampling.temperature) == (2, 0.0)
    assert message.sampling.HasField("temperature")
    assert not message.sampling.HasField("seed")
    assert (message.stopping.max_tokens, list(message.stopping.stop)) == (5, ["x"])
    assert (message.response.logprobs, message.response.token_ids) == (3, True)
    assert message.priority == 4


def test_every_kind_of_prompt_is_an_input():
    assert list(request([1, 2]).token_ids.ids) == [1, 2]
    chat = request([{"role": "user", "content": "hi"}])
    assert chat.chat.messages[0].content == "hi"
    assert request([]).WhichOneof("input") == "token_ids"  # which the server refuses


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match="temprature"):
        request("text", temprature=1.0)


def test_unknown_events_and_reasons_are_tolerated():
    assert event_of(GenerateResponse()) is None
    assert reason_name(1) == "stop"
    assert reason_name(99) == "unknown"
    ended = event_of(GenerateResponse(finished={"index": 1, "reason": 2}))
    assert isinstance(ended, Ended)
    assert ended.reason == "length"


@pytest.mark.cluster
async def test_the_cluster_tells_of_its_models_tokens_and_state(cluster: Served):
    async with Client(cluster.address) as client:
        (model,) = await client.list_models(timeout=10)
        assert model.name == cluster.model
        text = await client.tokenize("What is it?", model=model.name)
        chat = await client.tokenize([{"role": "user", "content": "What is it?"}])
        assert len(chat) > len(text) > 0  # the template adds to it
        assert max(chat) < model.vocab_size
        with pytest.raises(NotFound, match="other"):
            await client.tokenize("text", model="other")
        now = await client.status(timeout=10)
        async with aclosing(client.watch_status(0.1)) as snapshots:
            seen = [await anext(snapshots) for _ in range(2)]
        assert [{worker.id for worker in status.workers} for status in [now, *seen]] == [
            {worker.id for worker in now.workers}
        ] * 3
        assert len(now.workers) == 2
        with pytest.raises(InvalidRequest, match="interval"):
            await anext(client.watch_status(0.01))
