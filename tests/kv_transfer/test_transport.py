"""What the transports share: tokens, runs, and waiting for work that cannot be interrupted."""

from __future__ import annotations

import asyncio
import threading
import time

import numpy as np
import pytest

from baton.errors import KvTransferError
from kv_transfer.digest import block_digest
from kv_transfer.transport import PeerLost, Run, Tokens, in_time, quiet


def test_a_token_works_once_and_only_while_it_lives():
    tokens = Tokens(seconds=10.0)
    token, late = tokens.issue(0.0), tokens.issue(0.0)
    assert tokens.redeem(token, 9.0)
    assert not tokens.redeem(token, 9.0)
    assert not tokens.redeem(late, 10.0)
    assert not tokens.redeem(b"\0" * 32, 0.0)


def test_tokens_that_nobody_redeems_do_not_pile_up():
    tokens = Tokens(seconds=10.0, limit=3)
    issued = [tokens.issue(0.0) for _ in range(5)]
    assert [tokens.redeem(token, 1.0) for token in issued] == [False, False, True, True, True]


def test_a_block_lands_only_as_published_and_in_its_place():
    block = np.arange(256, dtype=np.uint8)
    run = Run(b"", 5, [0, 1], [block, block], [block_digest(block.data, p) for p in (5, 5)])
    run.land(0)
    with pytest.raises(KvTransferError, match="block 6"):
        run.land(1)
    assert run.landed == 1
    block[255] ^= 1
    with pytest.raises(KvTransferError, match="block 5"):
        run.land(0)


def test_a_stopped_run_lands_nothing():
    block = np.zeros(8, np.uint8)
    run = Run(b"", 0, [0], [block], [block_digest(block.data, 0)])
    run.stop()
    with pytest.raises(KvTransferError, match="given up"):
        run.land(0)


async def test_cancellation_waits_for_the_thread():
    stop, ended = threading.Event(), threading.Event()

    def work() -> None:
        stop.wait(5.0)
        time.sleep(0.1)  # what it was in the middle of
        ended.set()

    future = asyncio.get_running_loop().run_in_executor(None, work)
    task = asyncio.create_task(quiet(future, stop.set))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()


async def test_work_that_fails_while_it_is_stopped_still_reports_the_cancellation():
    stop = threading.Event()

    def work() -> None:
        stop.wait(5.0)
        raise OSError("stopped")

    future = asyncio.get_running_loop().run_in_executor(None, work)
    task = asyncio.create_task(quiet(future, stop.set))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_deadline_names_what_was_too_slow():
    with pytest.raises(PeerLost, match=r"connecting took more than 0\.01 s"):
        await in_time(asyncio.sleep(1), 0.01, "connecting")
