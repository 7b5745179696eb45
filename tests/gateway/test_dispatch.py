"""What the queue says of a request may be old when it is heard."""

from __future__ import annotations

import asyncio

import pytest

from baton.config import GatewayConfig
from baton.errors import Overloaded
from baton.types import Claim, Request, Sampling, Stopping
from gateway.dispatch import Dispatcher
from gateway.job import Job
from gateway.pace import Pace
from gateway.placing import Placing
from gateway.prefixes import Prefixes
from gateway.session import State
from gateway.sessions import Sessions
from gateway.tokenizer import Tokenizer
from queueing.contract import Claimed

PACE = Pace(GatewayConfig())


class SlowQueue:
    """Takes its time to answer `give_back`; its answer is that the claim is stale."""

    def __init__(self) -> None:
        self.asked, self.answer = asyncio.Event(), asyncio.Event()

    async def submit(self, submission: object) -> int:
        return 0

    async def finish(self, *_: object) -> bool:
        return True

    async def give_back(self, *_: object, fault: bool) -> bool:
        self.asked.set()
        await self.answer.wait()
        return False


@pytest.fixture
async def rig(model_directory):
    """A queue, a dispatcher that is not running, and a request that a worker has."""
    queue = SlowQueue()
    dispatcher = Dispatcher(queue, 4, Placing(PACE, Prefixes(), "kv-aware", 0))
    sessions = Sessions(
        queue,
        Tokenizer.load(model_directory),
        "tiny",
        PACE,
        on_waiting=dispatcher.wake,
        on_done=dispatcher.stop,
    )
    dispatcher.bind(sessions, None)
    session = await sessions.open(
        Job(Request("r", (5, 6), Sampling(), Stopping(max_tokens=9)), "tenant", 30.0)
    )
    give(sessions, session, 1)
    yield queue, dispatcher, sessions, session
    await sessions.close()


def give(sessions: Sessions, session, fence: int) -> None:
    """As the dispatcher does: a claim, and an attempt that begins."""
    sessions.claimed(session, Claimed("r", Claim(fence), 0, 0), f"worker-{fence}")
    session.move(State.RESERVING)


async def test_a_request_that_waits_again_has_no_claim(rig):
    queue, dispatcher, sessions, session = rig
    queue.answer.set()
    await dispatcher.take_back(session)
    assert (session.state, session.claim, sessions.waiting) == (State.QUEUED, None, 1)


async def test_a_request_whose_worker_died_waits_as_long_as_a_new_one(rig):
    queue, dispatcher, sessions, session = rig
    queue.answer.set()
    session.move(State.PREFILLING)
    session.move(State.DECODING)
    session.waiting_since -= 100.0  # it has been served for longer than it may wait
    await dispatcher.take_back(session)
    assert (session.state, session.error, sessions.waiting) == (State.QUEUED, None, 1)


async def test_a_busy_worker_does_not_prolong_the_wait(rig):
    _, _, sessions, session = rig
    session.waiting_since -= 100.0
    sessions.requeued(session, waits_anew=False)
    assert isinstance(session.error, Overloaded)


async def test_a_late_answer_does_not_take_a_request_from_its_next_worker(rig):
    queue, dispatcher, sessions, session = rig
    taking = asyncio.create_task(dispatcher.take_back(session))
    await queue.asked.wait()
    give(sessions, session, 2)
    queue.answer.set()
    await taking
    assert (session.state, session.claim, sessions.waiting) == (State.RESERVING, Claim(2), 0)
