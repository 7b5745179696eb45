"""The engine loop with several plans in flight."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from typing import Any

import pytest

from engine.executor import ExecutorBroken
from engine.simulated import CostModelExecutor, checksum_token, expected_tokens
from scheduling.plan import StepPlan, StepResult
from tests.engine.test_loop import CAPACITY, Engine, request


class Go(threading.Event):
    """When it is set, `news` is, too."""

    def __init__(self, news: threading.Event) -> None:
        super().__init__()
        self._news = news

    def set(self) -> None:
        super().set()
        self._news.set()


class Stages(CostModelExecutor):
    """A pipeline that can be held up and that breaks on demand."""

    def __init__(self, depth: int) -> None:
        super().__init__(replace(CAPACITY, depth=depth))
        self.news = threading.Event()  # for `ready`
        self.go = Go(self.news)
        self.go.set()
        self.waits = threading.Event()  # in `ready`, with nothing to tell
        self.interrupts = 0
        self.under_way: list[StepPlan] = []
        self.most = 0  # under way at a time
        self.full = threading.Event()
        self.refused: Exception | None = None  # what the next `submit` raises
        self.broken: Exception | None = None  # what the next `result` raises

    def execute(self, plan: StepPlan) -> StepResult:
        raise AssertionError("a pipeline is given plans by `submit`")

    def submit(self, plan: StepPlan) -> Any:
        if self.refused is not None:
            error, self.refused = self.refused, None
            raise error
        self.under_way.append(plan)
        self.most = max(self.most, len(self.under_way))
        if len(self.under_way) == self.capacity.depth:
            self.full.set()
        return super().submit(plan)

    def ready(self, handle: Any) -> bool:
        assert handle.plan is self.under_way[0]
        if not self.go.is_set():
            self.waits.set()
            assert self.news.wait(10)
            self.waits.clear()
        self.news.clear()
        return self.go.is_set()

    def interrupt(self) -> None:
        self.interrupts += 1
        self.news.set()

    def result(self, handle: Any) -> StepResult:
        assert self.go.wait(10)
        assert handle.plan is self.under_way.pop(0)
        if self.broken is not None:
            error, self.broken = self.broken, None
            raise error
        return super().result(handle)


@pytest.fixture
async def pipeline():
    made = Engine(Stages(depth=3))
    made.loop.start()
    yield made
    made.executor.go.set()
    await made.loop.stop()
    assert not made.executor.under_way
    made.scheduler.check_integrity()


async def test_a_pipeline_is_kept_full_and_gives_the_right_tokens(pipeline) -> None:
    requests = [request(f"r{i}", prompt=3 + i, most=12) for i in range(7)]
    with pipeline.loop.lock:
        for r in requests:
            pipeline.submit(r)
    await pipeline.idle()
    for r in requests:
        assert pipeline.tokens[r.id] == expected_tokens(r, 0, checksum_token(1000))
    assert pipeline.executor.most == 3


async def test_plans_in_flight_are_of_different_requests(pipeline) -> None:
    pipeline.executor.go.clear()
    with pipeline.loop.lock:
        for name in "abc":
            pipeline.submit(request(name, prompt=16))
    assert await asyncio.to_thread(pipeline.executor.full.wait, 10)
    members = [c.sequence for plan in pipeline.executor.under_way for c in plan.chunks]
    assert len(members) == len(set(members)) >= 3
    with pipeline.loop.lock:
        assert pipeline.scheduler.abort("b", 0.0)
    pipeline.open.discard("b")
    pipeline.executor.go.set()
    await pipeline.idle()
    assert set(pipeline.tokens) == {"a", "c"}


async def test_who_comes_while_there_is_room_does_not_wait_for_the_oldest_pass(pipeline) -> None:
    executor = pipeline.executor
    executor.go.clear()
    for count, name in enumerate("abc", 1):
        assert len(executor.under_way) == count - 1
        pipeline.submit(request(name))
        began = executor.full if name == "c" else executor.waits
        assert await asyncio.to_thread(began.wait, 10)
        executor.waits.clear()
        members = {c.sequence.request.id for plan in executor.under_way for c in plan.chunks}
        assert members == set("abc"[:count])
    assert pipeline.loop.steps == 0
    interrupts = executor.interrupts
    pipeline.submit(request("d"))  # no room
    assert executor.interrupts == interrupts
    executor.go.set()
    await pipeline.idle()
    for name in "abcd":
        assert pipeline.tokens[name] == expected_tokens(request(name), 0, checksum_token(1000))


async def test_news_that_give_nothing_to_plan_end_no_pass(pipeline) -> None:
    pipeline.executor.go.clear()
    pipeline.submit(request("a"))
    assert await asyncio.to_thread(pipeline.executor.waits.wait, 10)
    for _ in range(5):
        pipeline.loop.wake()
        await asyncio.sleep(0.002)
    assert pipeline.loop.steps == 0
    assert len(pipeline.executor.under_way) == 1
    pipeline.executor.go.set()
    await pipeline.idle()
    assert pipeline.tokens["a"] == expected_tokens(request("a"), 0, checksum_token(1000))


@pytest.mark.parametrize("where", ["refused", "broken"])
async def test_a_pass_that_breaks_in_a_pipeline_fails_its_own_requests(
    pipeline, caplog, where: str
) -> None:
    setattr(pipeline.executor, where, RuntimeError("a stage is on fire"))
    requests = [request(name, prompt=16) for name in "abc"]
    with pipeline.loop.lock:
        for r in requests:
            pipeline.submit(r)
    await pipeline.idle()
    assert pipeline.failed[0] == "a"
    others = [r for r in requests if r.id not in pipeline.failed]
    assert others
    for r in others:
        assert pipeline.tokens[r.id] == expected_tokens(r, 0, checksum_token(1000))
    assert "a stage is on fire" in caplog.text
    assert pipeline.scheduler.load().free_blocks == CAPACITY.blocks


@pytest.mark.parametrize("where", ["refused", "broken"])
async def test_a_broken_pipeline_ends_the_loop(where: str) -> None:
    engine = Engine(Stages(depth=2))
    setattr(engine.executor, where, ExecutorBroken("a rank is gone"))
    engine.loop.start()
    engine.submit(request("a"))
    engine.submit(request("b"))
    with pytest.raises(ExecutorBroken):
        async with asyncio.timeout(10):
            await engine.loop.wait_closed()


@pytest.mark.parametrize("cancelled", [False, True])
async def test_a_pipeline_that_stops_takes_what_is_under_way(cancelled: bool) -> None:
    executor = Stages(depth=3)
    engine = Engine(executor)
    executor.go.clear()
    engine.loop.start()
    with engine.loop.lock:
        for name in "abc":
            engine.submit(request(name, prompt=16, most=50))
    assert await asyncio.to_thread(executor.full.wait, 10)
    if cancelled:
        assert engine.loop._task is not None
        engine.loop._task.cancel()
    stopping = asyncio.create_task(engine.loop.stop())
    threading.Timer(0.02, executor.go.set).start()
    async with asyncio.timeout(10):
        (ended,) = await asyncio.gather(stopping, return_exceptions=True)
    assert isinstance(ended, asyncio.CancelledError) == cancelled
    assert not executor.under_way
    assert engine.scheduler.plan(0.0) is not None  # everything was applied
