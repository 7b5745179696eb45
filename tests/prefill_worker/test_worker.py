"""Prompts in, leases and first tokens out; nothing stays behind, whatever happens."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry

from baton.errors import EngineFailed, InvalidRequest, Overloaded, Unavailable
from baton.prefix import block_keys
from baton.types import Claim, FinishReason, KvRef, Request, Sampling, Stopping
from engine.metrics import EngineMetrics
from engine.simulated import CostModelExecutor, checksum_token, expected_tokens
from kv_transfer.contract import KvLayout
from kv_transfer.producer import LeaseProducer
from prefill_worker.worker import PrefillWorker
from queueing.contract import Verdict
from scheduling.cost import LinearCost
from scheduling.events import Prefilled
from scheduling.order import make_policy
from scheduling.plan import Capacity, StepPlan, StepResult
from scheduling.prefill import PrefillScheduler

CAPACITY = Capacity(blocks=32, block_size=4, max_tokens=16, max_sequences=8, max_context=128)
LAYOUT = KvLayout("model", 1, 1, 1, "int32", CAPACITY.block_size, 2)
TOKEN_OF = checksum_token(100)
POISON = 666


class Executor(CostModelExecutor):
    """Breaks on a pass with the poisonous token in it."""

    def execute(self, plan: StepPlan) -> StepResult:
        if any(POISON in chunk.sequence.tokens for chunk in plan.chunks):
            raise RuntimeError("boom")
        return super().execute(plan)


class Rig:
    """A worker with its producer."""

    def __init__(self, leasable: int | None = None, policy: str = "fcfs") -> None:
        self.executor = Executor(CAPACITY, LinearCost(0.001, 0, 0), TOKEN_OF)
        self.scheduler = PrefillScheduler(
            CAPACITY, make_policy(policy), max_waiting=4, block_keys=block_keys
        )
        self.producer = LeaseProducer(
            self.executor.store,
            LAYOUT,
            control_address="here",
            on_freed=lambda lease: self.worker.on_freed(lease),
            max_leased_blocks=leasable,
        )
        self.registry = CollectorRegistry()
        metrics = EngineMetrics("prefill", self.registry)
        self.worker = PrefillWorker(self.executor, self.scheduler, self.producer, metrics)
        self.calls: list[AsyncGenerator[KvRef | Prefilled, None]] = []

    async def __aenter__(self) -> Rig:
        await self.producer.start()
        self.worker.engine.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        for call in self.calls:
            await call.aclose()
        await self.worker.stop()
        await self.producer.close()
        await self.all_free()
        self.scheduler.check_integrity()

    async def all_free(self) -> None:
        async with asyncio.timeout(5):
            while self.worker.load().free_blocks < CAPACITY.blocks:
                await asyncio.sleep(0.005)

    async def run(self, one: Request) -> tuple[KvRef, Prefilled]:
        """Until the first token is there. The call goes on with the lease."""
        call = self.worker.prefill(one, Claim(1))
        self.calls.append(call)
        ref, done = await anext(call), await anext(call)
        assert isinstance(ref, KvRef)
        assert isinstance(done, Prefilled)
        return ref, done


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with Rig() as running:
        yield running


def request(prompt: int, new: int = 5) -> Request:
    return Request("r", tuple(range(prompt)), Sampling(), Stopping(max_tokens=new))


async def test_a_prefill_gives_a_lease_and_the_first_token(rig: Rig) -> None:
    one = request(21)
    ref, done = await rig.run(one)
    assert (ref.tokens, ref.blocks) == (21, 6)
    assert list(done.output.token_ids) == expected_tokens(one, 0, TOKEN_OF)[:1]
    assert rig.producer.leased_blocks == 6
    assert rig.producer.release(ref.lease_id, committed=True)
    await rig.all_free()
    assert await anext(rig.calls[0], None) is None  # the call ends with the lease


async def test_closing_the_call_after_the_first_token_takes_the_kv_back(rig: Rig) -> None:
    ref, _ = await rig.run(request(21))
    assert rig.worker.progress() == []  # under no claim of this worker any more
    assert not rig.worker.idle
    await rig.calls[0].aclose()
    await rig.all_free()
    assert not rig.producer.release(ref.lease_id, committed=True)
    assert rig.worker.idle


async def test_a_token_that_ends_the_request_leaves_no_lease(rig: Rig) -> None:
    _, done = await rig.run(request(21, new=1))
    assert done.output.finish is not None
    assert done.output.finish.reason is FinishReason.LENGTH
    await rig.all_free()


async def test_closing_the_call_stops_the_work(rig: Rig) -> None:
    async with aclosing(rig.worker.prefill(request(100), Claim(1))) as news:
        assert isinstance(await anext(news), KvRef)
    assert rig.worker.progress() == []
    await rig.all_free()


async def test_what_cannot_fit_is_refused_at_the_door(rig: Rig) -> None:
    with pytest.raises(InvalidRequest, match="context"):
        await rig.run(request(126))
    assert rig.worker.idle


async def test_a_broken_pass_ends_its_requests_and_no_others(rig: Rig) -> None:
    bad = replace(request(3), prompt_ids=(POISON, 1))
    with pytest.raises(EngineFailed):
        await rig.run(bad)
    ref, _ = await rig.run(request(3))
    rig.producer.revoke(ref.lease_id)


async def test_too_many_leased_blocks_is_overload_not_failure() -> None:
    async with Rig(leasable=6) as rig:
        ref, _ = await rig.run(request(21))
        with pytest.raises(Overloaded):
            await rig.run(request(9))
        rig.producer.revoke(ref.lease_id)
        await rig.all_free()
        ref, _ = await rig.run(request(9))
        rig.producer.revoke(ref.lease_id)


@pytest.mark.parametrize("ends", [True, False])
async def test_blocks_without_a_lease_are_nobody_elses_while_the_prefill_goes_on(
    rig: Rig, ends: bool
) -> None:
    execute, computing = rig.executor.execute, threading.Semaphore(1)

    def one_by_one(plan: StepPlan) -> StepResult:
        assert computing.acquire(timeout=10)
        return execute(plan)

    rig.executor.execute = one_by_one  # type: ignore[method-assign]
    one = request(48)
    call = rig.worker.prefill(one, Claim(1))
    rig.calls.append(call)
    ref = await anext(call)
    assert isinstance(ref, KvRef)
    rig.producer.release(ref.lease_id, committed=False)  # the consumer has given up
    await asyncio.sleep(0.05)
    assert rig.worker.load().free_blocks == CAPACITY.blocks - 12
    computing.release(9)
    if ends:
        done = await anext(call)
        assert isinstance(done, Prefilled)
        assert list(done.output.token_ids) == expected_tokens(one, 0, TOKEN_OF)[:1]
    else:
        await call.aclose()
    await rig.all_free()
    assert rig.registry.get_sample_value("baton_prefill_kv_blocks_used") == 0


async def test_a_stale_claim_ends_the_prefill(rig: Rig) -> None:
    call = rig.worker.prefill(request(100), Claim(7))
    assert isinstance(await anext(call), KvRef)
    (entry,) = rig.worker.progress()
    assert (entry.request_id, entry.fence, entry.generated) == ("r", 7, 0)
    rig.worker.drop(entry, Verdict.STALE)
    with pytest.raises(Unavailable, match="stale"):
        await anext(call)


async def test_a_draining_worker_takes_nothing_new(rig: Rig) -> None:
    rig.worker.draining = True
    assert rig.worker.load().draining
    with pytest.raises(Unavailable):
        await rig.run(request(3))


async def test_a_better_level_goes_between_the_chunks_of_a_long_prompt() -> None:
    """And what is preempted keeps what it has computed."""
    async with Rig(policy="skip-join-mlfq") as rig:
        order: list[str] = []
        execute = rig.executor.execute

        def watch(plan: StepPlan) -> StepResult:
            order.extend(chunk.sequence.request.id.partition("/")[0] for chunk in plan.chunks)
            if len(order) == 2:
                short.set()
                assert submitted.wait(10)
            return execute(plan)

        short, submitted = threading.Event(), threading.Event()
        rig.executor.execute = watch  # type: ignore[method-assign]
        long = asyncio.create_task(rig.run(replace(request(80), id="long", level=2)))
        await asyncio.to_thread(short.wait, 10)
        other = tuple(range(32, 0, -1))  # it begins as nothing that is known
        better = asyncio.create_task(
            rig.run(replace(request(32), id="better", level=0, prompt_ids=other))
        )
        await asyncio.sleep(0)  # it is in the scheduler now, while a pass runs
        submitted.set()
        (ref, done), (first_ref, first) = await asyncio.gather(long, better)
        assert order == ["long"] * 2 + ["better"] * 2 + ["long"] * 3
        for one, (lease, prefilled) in (("long", (ref, done)), ("better", (first_ref, first))):
            whole = replace(request(80), prompt_ids=other) if one == "better" else request(80)
            expected = expected_tokens(whole, 0, TOKEN_OF)[:1]
            assert list(prefilled.output.token_ids) == expected
            rig.producer.revoke(lease.lease_id)
