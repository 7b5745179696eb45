"""What the queue believes of a gateway's requests is put right."""

from __future__ import annotations

import asyncio

import pytest

from baton.config import GatewayConfig
from baton.types import Request, Sampling, Stopping
from gateway.dispatch import Dispatcher
from gateway.housekeeping import Housekeeping
from gateway.job import Job
from gateway.pace import Pace
from gateway.placing import Placing
from gateway.prefixes import Prefixes
from gateway.sessions import Sessions
from gateway.tokenizer import Tokenizer
from queueing.contract import Live, Outcome, Reaped

PACE = Pace(GatewayConfig())


class ForgetfulQueue:
    """Knows no gateway, and says of every sweep what the test wants."""

    def __init__(self) -> None:
        self.reaped = Reaped((), (), (), ())
        self.told: list[str] = []
        self.finished: dict[str, Outcome] = {}
        self.reconciling, self.go_on = asyncio.Event(), asyncio.Event()

    async def submit(self, submission: object) -> int:
        return 0

    async def finish(self, request_id: str, outcome: Outcome, generated: int) -> bool:
        self.finished[request_id] = outcome
        return True

    async def heartbeat(self) -> bool:
        return False

    async def reconcile(self, live: list[Live]) -> int:
        self.reconciling.set()
        await self.go_on.wait()
        self.told = [one.submission.request_id for one in live]
        return len(live)

    async def reap(self) -> Reaped:
        return self.reaped


@pytest.fixture
async def rig(model_directory):
    queue = ForgetfulQueue()
    dispatcher = Dispatcher(queue, 4, Placing(PACE, Prefixes(), "kv-aware", 0))
    tokenizer = Tokenizer.load(model_directory)
    sessions = Sessions(
        queue, tokenizer, "tiny", PACE, on_waiting=dispatcher.wake, on_done=dispatcher.stop
    )
    dispatcher.bind(sessions, None)
    yield queue, sessions, Housekeeping(queue, sessions, dispatcher)
    queue.go_on.set()
    await sessions.close()


def job(name: str) -> Job:
    return Job(Request(name, (5, 6), Sampling(), Stopping(max_tokens=9)), "tenant", 30.0)


@pytest.mark.parametrize("news", [Reaped(("r",), (), (), ()), Reaped((), (), ("r",), ())])
async def test_a_request_that_only_the_queue_remembers_is_ended_there(rig, eventually, news):
    queue, _, housekeeping = rig
    queue.reaped = news
    await housekeeping.sweep()
    await eventually(lambda: queue.finished == {"r": Outcome.CANCELLED})


async def test_what_ends_while_the_queue_is_told_again_is_ended_there_too(rig, eventually):
    queue, sessions, housekeeping = rig
    await sessions.open(job("stays"))
    ended = await sessions.open(job("ends"))
    telling = asyncio.create_task(housekeeping.heartbeat())
    await queue.reconciling.wait()
    sessions.cancel(ended)
    await eventually(lambda: queue.finished.pop("ends", None) is not None)
    queue.go_on.set()
    await telling
    assert queue.told == ["stays", "ends"]
    await eventually(lambda: queue.finished == {"ends": Outcome.CANCELLED})
