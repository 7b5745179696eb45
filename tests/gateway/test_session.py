from __future__ import annotations

import asyncio

import pytest

from baton.errors import Unavailable
from baton.types import Claim, Finish, FinishReason, Output, Request, Sampling, Stopping
from baton.v1.generation_pb2 import TokenLogprob
from gateway.job import Job, ResponseFormat
from gateway.session import Session, State
from gateway.tokenizer import Tokenizer


@pytest.fixture
def ended() -> list[Session]:
    return []


@pytest.fixture
def make(model_directory, ended):
    tokenizer = Tokenizer.load(model_directory)

    def make(n: int = 1, prompt_logprobs: int | None = None, interval: int = 1) -> Session:
        request = Request(
            "r", (5, 6), Sampling(n=n), Stopping(max_tokens=9), prompt_logprobs=prompt_logprobs
        )
        job = Job(request, "tenant", 1.0, response=ResponseFormat(stream_interval=interval))
        return Session(job, "tiny", tokenizer, clock=lambda: 1.0, on_done=ended.append)

    return make


def tokens(*ids: int, index: int = 0, finish: Finish | None = None) -> Output:
    return Output("r", index, ids, finish=finish)


LAST = Finish(FinishReason.LENGTH)


async def drain(session: Session) -> list[str]:
    return [response.WhichOneof("event") async for response in session.responses()]


async def test_what_waits_for_a_slow_reader_comes_in_one_message_per_sequence(make):
    session = make(n=2)
    for token in (70, 71, 72):
        session.accept(tokens(token, index=0))
        session.accept(tokens(token, index=1))
    session.accept(tokens(73, index=0, finish=LAST))
    session.accept(tokens(73, index=1, finish=LAST))
    events = await drain(session)
    assert events == ["accepted", "delta", "finished", "delta", "finished", "usage"]


async def test_what_was_generated_before_an_error_is_delivered_first(make, ended):
    session = make()
    session.accept(tokens(70))
    session.fail(Unavailable("gone"))
    events = []
    with pytest.raises(Unavailable):
        async for response in session.responses():
            events.append(response.WhichOneof("event"))
    assert events == ["accepted", "delta"]
    assert ended == [session]


async def test_an_error_holds_no_token_back(make):
    session = make(interval=10)
    stream = session.responses()
    session.accept(tokens(70))
    assert [(await anext(stream)).WhichOneof("event") for _ in range(2)] == ["accepted", "delta"]
    session.accept(tokens(71, 72))
    session.fail(Unavailable("gone"))
    assert (await anext(stream)).delta.token_count == 2
    with pytest.raises(Unavailable):
        await anext(stream)


async def test_nothing_changes_after_the_end(make, ended):
    session = make()
    session.accept(tokens(70, finish=LAST))
    session.accept(tokens(71))
    session.end(FinishReason.ABORTED)
    session.fail(Unavailable("late"))
    assert session.error is None
    assert session.generated == 1
    assert session.outputs[0].ending.reason is FinishReason.LENGTH
    assert ended == [session]


async def test_accepted_waits_for_prompt_logprobs(make):
    session = make(prompt_logprobs=0)
    events = asyncio.create_task(drain(session))
    session.accept(tokens(70))
    await asyncio.sleep(0.01)
    assert not events.done()
    session.accept_prompt_logprobs([TokenLogprob(token_id=5), TokenLogprob(token_id=6)])
    session.accept(tokens(71, finish=LAST))
    assert (await events)[:2] == ["accepted", "delta"]


async def test_the_next_attempt_is_told_what_the_client_already_has(make):
    session = make(n=2, prompt_logprobs=3)
    assert session.engine_request().prior_outputs == ()
    session.accept_prompt_logprobs([])
    session.accept(tokens(70, 71, index=0, finish=LAST))
    session.accept(tokens(80, index=1))
    request = session.engine_request()
    assert [prior.token_ids for prior in request.prior_outputs] == [(70, 71), (80,)]
    assert [prior.finished for prior in request.prior_outputs] == [True, False]
    assert request.prompt_logprobs is None


async def test_illegal_moves_are_bugs(make):
    session = make()
    session.claim = Claim(1)
    with pytest.raises(RuntimeError, match="QUEUED -> DECODING"):
        session.move(State.DECODING)
