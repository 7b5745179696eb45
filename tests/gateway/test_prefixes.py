"""What a gateway knows of prefix caches, and what it tells others and when."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest

from baton.config import GatewayConfig
from baton.errors import QueueError
from baton.types import Request, Sampling, Stopping
from gateway import prefixes
from gateway.job import Job
from gateway.prefixes import Prefixes, open_prefixes
from gateway.session import Session
from queueing.contract import Role, WorkerRecord
from queueing.prefixes import WorkerKeys
from scheduling.prefix_map import RENEW_SECONDS

EPOCH = 7


def worker(name: str = "w", block_size: int = 1) -> WorkerRecord:
    record = WorkerRecord(name, EPOCH, Role.DECODE, "h:1", "l", "m", 1, 99, 1, draining=False)
    return replace(record, prefix_block_size=block_size)


def session(*tokens: int) -> Session:
    request = Request("r", tokens, Sampling(), Stopping(max_tokens=9), tenant="t")
    job = Job(request, "tenant", 30.0)
    tokenizer = SimpleNamespace(detokenizer=lambda *_, **__: None)
    return Session(job, "tiny", tokenizer, clock=lambda: 0.0, on_done=lambda session: None)


class Board:
    """An exchange of one process. Fails as often as it is told to."""

    def __init__(self) -> None:
        self.told: list[dict[tuple[str, int], list[bytes]]] = []
        self.heard: list[WorkerKeys] = []
        self.failures = 0

    async def exchange(self, news):
        if self.failures:
            self.failures -= 1
            raise QueueError("away")
        self.told.append(dict(news))
        return self.heard

    async def close(self) -> None:
        pass


@pytest.fixture
def board() -> Board:
    return Board()


@pytest.fixture
def known(board: Board) -> Prefixes:
    """Of one worker with a cache of blocks of one token, and one without a cache."""
    known = Prefixes(board)  # type: ignore[arg-type]
    known.workers([worker(), worker("none", 0)])
    return known


async def test_others_are_told_of_each_block_once_and_of_beginnings_first(known, board):
    one = session(1, 2, 3)
    for _ in range(2):
        known.sent(one, worker())
        known.sent(one, worker("none", 0))
        await known.exchange(board)
    assert board.told == [{("w", EPOCH): one.prefix.of(1)}, {}]
    known.sent(session(1, 2, 3, 4), worker())
    await known.exchange(board)
    assert board.told[-1] == {("w", EPOCH): session(1, 2, 3, 4).prefix.of(1)[3:]}


async def test_a_block_in_use_is_told_anew_after_a_while(known, board, monkeypatch):
    one = session(1, 2)
    known.sent(one, worker())
    await known.exchange(board)
    later = prefixes.time.monotonic() + RENEW_SECONDS
    monkeypatch.setattr(prefixes.time, "monotonic", lambda: later)
    known.sent(one, worker())
    await known.exchange(board)
    assert board.told == [{("w", EPOCH): one.prefix.of(1)}] * 2


async def test_what_others_tell_is_known_here(known, board):
    one = session(1, 2, 3)
    assert known.cached(one) == {}
    board.heard = [WorkerKeys("w", EPOCH, tuple(reversed(one.prefix.of(1)[:2])))]
    await known.exchange(board)
    assert known.cached(one) == {"w": 2}
    assert known.cached(session(1, 2)) == {"w": 1}  # the last token is computed
    known.workers([])
    assert known.cached(one) == {}
    assert len(known) == 0


async def test_workers_with_blocks_of_other_sizes_are_known_by_their_own(known):
    known.workers([worker(), worker("v", 2)])
    for name, size in (("w", 1), ("v", 2)):
        known.sent(session(1, 2, 3), worker(name, size))
    assert known.cached(session(1, 2, 3, 4)) == {"w": 3, "v": 2}


async def test_while_nobody_can_be_told_what_was_sent_from_here_is_known(known, board, monkeypatch):
    monkeypatch.setattr(prefixes, "EXCHANGE_SECONDS", 0.001)
    board.failures = 2
    known.sent(session(1, 2, 3), worker())
    running = asyncio.create_task(known.run())
    async with asyncio.timeout(5):
        while not board.told:
            await asyncio.sleep(0.001)
    assert known.cached(session(1, 2, 3)) == {"w": 2}
    known.sent(session(9), worker())
    async with asyncio.timeout(5):
        while not any(board.told):
            await asyncio.sleep(0.001)
    running.cancel()
    assert [*filter(None, board.told)] == [{("w", EPOCH): session(9).prefix.of(1)}]


async def test_what_waits_to_be_told_is_bounded(known, board, monkeypatch):
    monkeypatch.setattr(prefixes, "MAX_UNTOLD", 5)
    tokens = itertools.count()
    for _ in range(4):
        known.sent(session(next(tokens), next(tokens)), worker())
    await known.exchange(board)
    assert [len(keys) for keys in board.told[0].values()] == [5]
    assert len(known) == 8


@pytest.mark.parametrize("routing", ["kv-aware", "least-outstanding", "round-robin"])
async def test_other_routers_need_to_know_nothing(routing):
    nothing = open_prefixes(GatewayConfig(routing=routing))
    nothing.workers([worker()])
    nothing.sent(session(1, 2), worker())
    assert nothing.cached(session(1, 2)) == {}
    await nothing.run()
