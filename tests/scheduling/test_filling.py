"""When waiting sequences may join the batch."""

from __future__ import annotations

from scheduling.decode import DecodeScheduler
from scheduling.order import make_policy
from scheduling.plan import Capacity, Sampled, StepResult
from scheduling.rules import Rules

CAPACITY = Capacity(blocks=64, block_size=4, max_tokens=64, max_sequences=2, max_context=64)


class Worker:
    """A scheduler whose passes take a second."""

    def __init__(self, **rules) -> None:
        self.scheduler = DecodeScheduler(
            CAPACITY, make_policy("fcfs"), max_waiting=9, rules=Rules(**rules)
        )
        self.now = 0.0

    def step(self) -> str:
        """One pass; the ids in it."""
        plan = self.scheduler.plan(self.now)
        if plan is None:
            return ""
        self.now += 1.0
        result = StepResult((Sampled(1),) * len(plan.chunks), ((),) * len(plan.chunks), 1.0)
        self.scheduler.apply(plan, result, self.now)
        return "".join(sorted(chunk.sequence.request.id for chunk in plan.chunks))


def serve(worker: Worker, make_request, passes: int) -> list[str]:
    """Three requests, "a" shorter than "b"."""
    for id, most in (("a", 1), ("b", 3), ("c", 1)):
        worker.scheduler.submit(make_request(id, prompt=4, most=most), 0.0)
    return [worker.step() for _ in range(passes)]


def test_continuous_filling_gives_a_slot_away_at_once(make_request) -> None:
    assert serve(Worker(), make_request, 3) == ["ab", "bc", "b"]


def test_static_filling_waits_until_the_whole_batch_has_ended(make_request) -> None:
    assert serve(Worker(filling="static"), make_request, 4) == ["ab", "b", "b", "c"]


def test_dynamic_filling_waits_for_a_full_batch_or_for_its_time(make_request) -> None:
    worker = Worker(filling="dynamic", dynamic_wait=5.0)
    assert serve(worker, make_request, 4) == ["ab", "b", "b", ""]
    assert worker.scheduler.opens_at == 5.0
    worker.now = 5.0
    assert worker.step() == "c"
    assert worker.scheduler.opens_at is None
