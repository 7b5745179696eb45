from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

import pytest

from baton.types import Output, Request, Sampling, Stopping
from engine.executor import ExecutorBroken
from engine.loop import EngineLoop
from engine.simulated import CostModelExecutor, checksum_token, expected_tokens
from scheduling.cost import Work
from scheduling.decode import DecodeScheduler
from scheduling.events import DecodeEvent, RequestFailed
from scheduling.order import make_policy
from scheduling.plan import Capacity, StepPlan, StepResult

CAPACITY = Capacity(blocks=64, block_size=4, max_tokens=16, max_sequences=8, max_context=128)


def request(id: str, prompt: int = 10, most: int = 5) -> Request:
    return Request(id, tuple(range(prompt)), Sampling(), Stopping(most))


class Gate(CostModelExecutor):
    """Passes wait until the test lets them go, and break on demand."""

    def __init__(self) -> None:
        super().__init__(CAPACITY)
        self.entered = threading.Event()
        self.go = threading.Event()
        self.go.set()
        self.breaks = 0
        self.broken = False
        self.stopped = threading.Event()
        self.stop_at = 0  # the pass that waits; 0 for none
        self.calls = 0
        self.threads: set[int] = set()

    def execute(self, plan: StepPlan) -> StepResult:
        self.threads.add(threading.get_ident())
        self.calls += 1
        if self.calls == self.stop_at:
            self.go.clear()
            self.stopped.set()
        self.entered.set()
        assert self.go.wait(10)
        if self.breaks:
            self.breaks -= 1
            raise RuntimeError("the device is on fire")
        if self.broken:
            raise ExecutorBroken("there is no device")
        return super().execute(plan)


class Engine:
    """A loop and everything that its events said."""

    def __init__(self, executor: CostModelExecutor | None = None) -> None:
        self.executor = executor or Gate()
        self.scheduler = DecodeScheduler(
            self.executor.capacity, make_policy("fcfs"), max_waiting=100
        )
        self.loop = EngineLoop(self.scheduler, self.executor, self.on_events)
        self.tokens: dict[str, list[int]] = {}
        self.failed: list[str] = []
        self.open: set[str] = set()
        self.changed = asyncio.Event()
        self.threads: set[int] = set()

    def on_events(self, plan: StepPlan, events: list[DecodeEvent], seconds: float) -> None:
        self.threads.add(threading.get_ident())
        assert seconds >= 0
        for event in events:
            if isinstance(event, Output):
                self.tokens.setdefault(event.request_id, []).extend(event.token_ids)
                if event.finish is not None:
                    self.open.discard(event.request_id)
            elif isinstance(event, RequestFailed):
                self.failed.append(event.request_id)
                self.open.discard(event.request_id)
        self.changed.set()

    def submit(self, request: Request) -> None:
        self.open.add(request.id)
        with self.loop.lock:
            self.scheduler.submit(request, 0.0)
        self.loop.wake()

    async def idle(self) -> None:
        async with asyncio.timeout(10):
            while self.open:
                self.changed.clear()
                await self.changed.wait()


@pytest.fixture
async def engine():
    made = Engine()
    made.loop.start()
    yield made
    made.executor.go.set()
    await made.loop.stop()
    made.scheduler.check_integrity()


async def test_requests_that_come_at_different_times_all_finish(engine) -> None:
    requests = [request(f"r{i}", prompt=3 + 7 * i, most=2 + i) for i in range(6)]
    for r in requests:
        engine.submit(r)
        await asyncio.sleep(0.002)
    await engine.idle()
    for r in requests:
        assert engine.tokens[r.id] == expected_tokens(r, 0, checksum_token(1000))
    assert engine.loop.steps == len(engine.loop.recent) > 0
    assert all(step.work != Work() and step.seconds > 0 for step in engine.loop.recent)


async def test_all_verbs_run_on_one_thread_and_events_on_the_event_loop(engine) -> None:
    verbs = set()

    def noted(verb: Callable[..., object]) -> Callable[..., object]:
        def note(*given: object) -> object:
            verbs.add(threading.get_ident())
            return verb(*given)

        return note

    engine.scheduler.plan = noted(engine.scheduler.plan)
    engine.scheduler.apply = noted(engine.scheduler.apply)
    engine.submit(request("a"))
    await engine.idle()
    assert engine.threads == {threading.get_ident()}
    assert len(engine.executor.threads) == 1
    assert verbs == engine.executor.threads
    assert not engine.threads & engine.executor.threads


async def test_a_pass_is_told_while_the_next_one_runs(engine) -> None:
    engine.executor.stop_at = 2
    engine.submit(request("a"))
    async with asyncio.timeout(10):
        await engine.changed.wait()
    assert engine.loop.steps == 1
    assert len(engine.tokens["a"]) == 1
    assert await asyncio.to_thread(engine.executor.stopped.wait, 10)  # the second one has begun
    engine.executor.go.set()
    await engine.idle()


async def test_an_event_loop_that_is_busy_holds_the_engine_up_after_one_pass(engine) -> None:
    engine.submit(request("a", most=40))
    await engine.changed.wait()
    told = len(engine.tokens["a"])
    time.sleep(0.05)  # noqa: ASYNC251 - passes take no time here: without a bound they would all be over
    assert engine.executor.calls <= told + 2
    await engine.idle()
    assert engine.tokens["a"] == expected_tokens(request("a", most=40), 0, checksum_token(1000))


async def test_the_scheduler_is_not_planning_while_somebody_holds_the_lock(engine) -> None:
    with engine.loop.lock:
        engine.submit(request("a"))
        time.sleep(0.02)  # noqa: ASYNC251 - the event loop is to stand still
        assert engine.executor.calls == 0
        assert engine.scheduler.abort("a", 0.0)
    engine.submit(request("b"))
    await asyncio.sleep(0)
    engine.open.discard("a")
    await engine.idle()
    assert set(engine.tokens) == {"b"}


async def test_an_idle_engine_neither_plans_nor_runs(engine) -> None:
    plans = 0
    plan = engine.scheduler.plan

    def count(now: float) -> StepPlan | None:
        nonlocal plans
        plans += 1
        return plan(now)

    engine.scheduler.plan = count
    await asyncio.sleep(0.05)
    assert plans <= 1
    engine.submit(request("a", most=1))
    await engine.idle()
    await asyncio.sleep(0.05)
    assert plans <= 4
    assert engine.tokens["a"]


async def test_requests_come_and_go_while_a_pass_runs(engine) -> None:
    engine.executor.go.clear()
    engine.submit(request("doomed"))
    engine.submit(request("stays"))
    await asyncio.to_thread(engine.executor.entered.wait, 10)
    with engine.loop.lock:
        assert engine.scheduler.abort("doomed", 0.0)
    engine.open.discard("doomed")
    engine.submit(request("late"))
    engine.executor.go.set()
    await engine.idle()
    assert set(engine.tokens) == {"stays", "late"}
    assert engine.tokens["late"] == expected_tokens(request("late"), 0, checksum_token(1000))


async def test_a_broken_pass_fails_its_requests_and_the_engine_goes_on(engine, caplog) -> None:
    engine.executor.breaks = 1
    engine.submit(request("unlucky"))
    await engine.idle()
    engine.submit(request("lucky"))
    await engine.idle()
    assert engine.failed == ["unlucky"]
    assert len(engine.tokens["lucky"]) == 5
    assert "the device is on fire" in caplog.text
    assert engine.scheduler.load().free_blocks == CAPACITY.blocks


async def test_stop_waits_for_the_running_pass_and_starts_no_other() -> None:
    engine = Engine()
    engine.executor.go.clear()
    engine.loop.start()
    engine.submit(request("a"))
    await asyncio.to_thread(engine.executor.entered.wait, 10)
    stopping = asyncio.create_task(engine.loop.stop())
    await asyncio.sleep(0.02)
    assert not stopping.done()
    engine.executor.go.set()
    await stopping
    assert engine.loop.steps == 1
    assert len(engine.tokens["a"]) == 1


async def test_an_error_in_the_worker_itself_comes_out_of_wait_closed() -> None:
    engine = Engine()
    engine.on_events = lambda *_: 1 / 0
    engine.loop = EngineLoop(engine.scheduler, engine.executor, engine.on_events)
    engine.loop.start()
    engine.submit(request("a"))
    with pytest.raises(ZeroDivisionError):
        async with asyncio.timeout(10):
            await engine.loop.wait_closed()


async def test_a_broken_executor_ends_the_loop() -> None:
    engine = Engine()
    engine.executor.broken = True
    engine.loop.start()
    engine.submit(request("a"))
    with pytest.raises(ExecutorBroken):
        async with asyncio.timeout(10):
            await engine.loop.wait_closed()


async def test_a_loop_whose_task_is_cancelled_ends_its_thread() -> None:
    engine = Engine()
    engine.loop.start()
    engine.submit(request("a", most=100))
    await engine.changed.wait()
    assert engine.loop._task is not None
    engine.loop._task.cancel()
    with pytest.raises(asyncio.CancelledError):
        async with asyncio.timeout(10):
            await engine.loop.wait_closed()
    assert not any(thread.name == "engine" for thread in threading.enumerate())


async def test_a_loop_is_started_once(engine) -> None:
    with pytest.raises(RuntimeError, match="started before"):
        engine.loop.start()
