"""What can happen to a request before the queue's reply to its submission is here."""

from __future__ import annotations

import asyncio

import pytest

from baton.config import GatewayConfig
from baton.errors import Overloaded
from baton.types import Claim, FinishReason, Request, Sampling, Stopping
from gateway.job import Job
from gateway.pace import Pace
from gateway.session import State
from gateway.sessions import Sessions
from gateway.tokenizer import Tokenizer
from queueing.contract import Claimed

PACE = Pace(GatewayConfig())


class SlowQueue:
    """Answers a submission when told to; `full` refuses it then."""

    def __init__(self) -> None:
        self.asked, self.answer = asyncio.Event(), asyncio.Event()
        self.full = False

    async def submit(self, submission: object) -> int:
        self.asked.set()
        await self.answer.wait()
        if self.full:
            raise Overloaded("full", subject="queue")
        return 3

    async def finish(self, *_: object) -> bool:
        return True


@pytest.fixture
async def rig(model_directory):
    """A queue, sessions, and a request that is being submitted."""
    queue = SlowQueue()
    tokenizer = Tokenizer.load(model_directory)
    sessions = Sessions(
        queue, tokenizer, "tiny", PACE, on_waiting=lambda: None, on_done=lambda session: None
    )
    job = Job(Request("r", (5, 6), Sampling(), Stopping(max_tokens=9)), "tenant", 30.0)
    opening = asyncio.create_task(sessions.open(job))
    await queue.asked.wait()
    yield queue, sessions, opening
    await sessions.close()


async def test_a_submitted_request_waits_at_its_level(rig):
    queue, sessions, opening = rig
    queue.answer.set()
    session = await opening
    assert (sessions.waiting, session.level) == (1, 3)


async def test_a_request_that_a_worker_has_already_does_not_wait(rig):
    queue, sessions, opening = rig
    session = sessions.get("r")
    sessions.claimed(session, Claimed("r", Claim(1), 2, 0), "worker")
    session.move(State.RESERVING)
    queue.answer.set()
    assert await opening is session
    assert (sessions.waiting, session.level) == (0, 2)


async def test_an_aborted_request_does_not_wait(rig):
    queue, sessions, opening = rig
    assert sessions.abort(["r"]) == ["r"]
    queue.answer.set()
    session = await opening
    assert session.outputs[0].ending.reason is FinishReason.ABORTED
    assert (sessions.waiting, len(sessions)) == (0, 0)


async def test_a_request_that_is_aborted_and_refused_is_gone(rig):
    queue, sessions, opening = rig
    queue.full = True
    sessions.abort(["r"])
    queue.answer.set()
    with pytest.raises(Overloaded):
        await opening
    assert (sessions.waiting, len(sessions)) == (0, 0)
