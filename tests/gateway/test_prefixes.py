"""What a gateway knows of prefix caches, and what it tells others and when."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest

import baton.prefix
from baton.config import GatewayConfig
from baton.errors import QueueError
from baton.types import Claim, FinishReason, Request, Sampling, Stopping
from gateway import prefixes
from gateway.job import Job
from gateway.output import Ending
from gateway.prefixes import Prefixes, open_prefixes
from gateway.session import Session
from queueing.contract import Role, WorkerRecord
from queueing.prefixes import WorkerKeys
from scheduling.prefix_map import RENEW_SECONDS

EPOCH = 7


def worker(name: str = "w", block_size: int = 1) -> WorkerRecord:
    record = WorkerRecord(name, EPOCH, Role.DECODE, "h:1", "l", "m", 1, 99, 1, draining=False)
    return replace(record, prefix_block_size=block_size)


def session(*tokens: int, n: int = 1, **options) -> Session:
    request = Request("r", tokens, Sampling(n=n), Stopping(max_tokens=9), tenant="t", **options)
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


async def test_each_of_several_outputs_is_where_its_request_ended(known):
    one = session(1, 2, n=2)
    known.sent(one, worker())
    one.claimed(Claim(1), 0, "w")
    for output, tokens in zip(one.outputs, ((3, 4), (5, 6, 7)), strict=True):
        output.token_ids += tokens
    known.ended(one)
    found = [known.cached(session(1, 2, *more, 9)) for more in ((3, 4), (5, 6, 7), (8,))]
    assert found == [{"w": 3}, {"w": 4}, {"w": 2}]  # the last token of an output has no KV


async def test_of_a_request_that_came_back_its_last_worker_has_what_that_went_on_with(known):
    known.workers([worker(), worker("v")])
    one = session(1, 2, n=2)
    known.sent(one, worker())
    one.claimed(Claim(1), 0, "w")
    one.outputs[0].token_ids += (3, 4)
    one.outputs[1].token_ids += (5, 6)
    one.outputs[1].ending = Ending(FinishReason.STOP)
    assert known.cached(one) == {"w": 1}  # of its prompt alone
    known.sent(one, worker("v"))
    one.claimed(Claim(2), 0, "v")
    one.outputs[0].token_ids.append(7)
    known.ended(one)
    assert known.cached(session(1, 2, 3, 4, 7, 9)) == {"w": 2, "v": 4}
    assert known.cached(session(1, 2, 5, 6, 9)) == {"w": 2, "v": 2}


async def test_a_prompt_whose_logprobs_are_to_come_counts_as_computed_until_they_have(known):
    one = session(1, 2, prompt_logprobs=0)
    known.sent(one, worker())
    assert known.cached(one) == {}
    one.accept_prompt_logprobs([])
    assert known.cached(one) == {"w": 1}


def no_hash(*_: object) -> bytes:
    raise AssertionError("hashed for nothing")


@pytest.fixture
def no_hashing(monkeypatch) -> None:
    monkeypatch.setattr(baton.prefix, "blake2b", no_hash)


def ask_and_tell(known: Prefixes, block_size: int) -> None:
    """All that happens to a request."""
    one = session(1, 2, 3)
    assert known.cached(one) == {}
    known.sent(one, worker("w", block_size))
    one.claimed(Claim(1), 0, "w")
    one.outputs[0].token_ids += (4, 5)
    known.ended(one)
    assert known.cached(one) == {}


@pytest.mark.parametrize("routing", ["kv-aware", "least-outstanding", "round-robin"])
async def test_other_routers_need_to_know_nothing(routing, no_hashing):
    nothing = open_prefixes(GatewayConfig(routing=routing))
    nothing.workers([worker()])
    ask_and_tell(nothing, 1)
    await nothing.run()


async def test_without_caches_nothing_is_hashed_and_nobody_is_told(board, no_hashing, monkeypatch):
    monkeypatch.setattr(prefixes, "EXCHANGE_SECONDS", 0.001)
    known = Prefixes(board)  # type: ignore[arg-type]
    known.workers([worker("w", 0)])
    ask_and_tell(known, 0)
    running = asyncio.create_task(known.run())
    await asyncio.sleep(0.05)
    running.cancel()
    assert not board.told
