"""A recorded run (record.py) through fresh schedulers: the same calls must give the same plans.

This is what makes the simulator's claims hold for the workers: what drives a scheduler there and
here differs, what it decides does not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from baton.config import DecodeConfig
from baton.errors import AlreadyExists, InvalidRequest, Overloaded
from scheduling.cost import CostTracker
from scheduling.decode import DecodeScheduler
from scheduling.order import policy_from
from scheduling.plan import Capacity, Sampled, StepPlan, StepResult
from scheduling.prefill import PrefillScheduler
from scheduling.rules import Rules
from scheduling.sequence import Sequence
from scheduling.simulator.block_numbers import replayed_keys
from scheduling.simulator.record import (
    Abort,
    AbortSequence,
    Apply,
    Arrived,
    Fail,
    Lost,
    Plan,
    Quiet,
    Record,
    Release,
    Reserve,
    RunHeader,
    Submit,
    read_run,
)


@dataclass(frozen=True, slots=True)
class Difference:
    """Where a replay first went another way. `line` counts from 1, in the file of the run."""

    line: int
    recorded: str
    replayed: str

    def __str__(self) -> str:
        return f"line {self.line}: recorded {self.recorded}; replayed {self.replayed}"


@dataclass(frozen=True, slots=True)
class Replay:
    """What came of a replay: `plans` that were the same, up to the end or the difference."""

    plans: int
    difference: Difference | None = None


def replay(lines: Iterable[str]) -> Replay:
    """Replay a run, given as the lines of its file.

    Raises ValueError for what is no recorded run of this version.
    """
    header, records = read_run(lines)
    scheduler = _scheduler(header)
    plans = 0
    for line, record in enumerate(records, start=2):
        difference = scheduler.call(record)
        if difference is not None:
            return Replay(plans, Difference(line, *difference))
        plans += isinstance(record, Plan) and record.digest is not None
    return Replay(plans)


def _scheduler(header: RunHeader) -> _Calls:
    config = DecodeConfig.model_construct(**header.settings)
    cost = CostTracker(header.cost)
    policy = policy_from(config, cost)
    waiting, capacity = int(config.max_waiting), header.capacity
    block_keys = replayed_keys if config.prefix_cache else None
    if header.role == "prefill":
        prefill = PrefillScheduler(
            capacity, policy, max_waiting=waiting, cost=cost, block_keys=block_keys
        )
        return _PrefillCalls(prefill, capacity)
    decode = DecodeScheduler(
        capacity,
        policy,
        max_waiting=waiting,
        rules=Rules.of(config),
        cost=cost,
        block_keys=block_keys,
    )
    return _DecodeCalls(decode, capacity)


_Different = tuple[str, str] | None
"""What was recorded and what happened instead; None if they are the same."""


class _Calls:
    """Makes the calls that every scheduler has."""

    def __init__(self, scheduler: DecodeScheduler | PrefillScheduler, capacity: Capacity) -> None:
        self._scheduler = scheduler
        self._block_size = capacity.block_size
        self._plans: deque[StepPlan] = deque()  # those that run, oldest first

    def call(self, record: Record) -> _Different:
        """Make one call, and compare."""
        match record:
            case Submit(now, request, refused):
                submitted = request.request(self._block_size)
                return _refusal(refused, lambda: self._scheduler.submit(submitted, now))
            case Abort(now, request_id):
                self._scheduler.abort(request_id, now)
            case Plan():
                return self._next_plan(record)
            case Apply(now):
                self._scheduler.apply(self._running(), _result(record), now)
            case Fail(now):
                self._scheduler.fail(self._running(), now)
            case _:
                raise ValueError(f"this kind of scheduler has no {type(record).__name__.lower()}")
        return None

    def _next_plan(self, recorded: Plan) -> _Different:
        plan = self._scheduler.plan(recorded.now)
        if plan is not None:
            self._plans.append(plan)
        found = Plan.of(plan, recorded.now)
        return None if found == recorded else (str(recorded), _describe(found, plan))

    def _running(self) -> StepPlan:
        if not self._plans:
            raise ValueError("a result without a plan")
        return self._plans.popleft()


class _PrefillCalls(_Calls):
    def __init__(self, scheduler: PrefillScheduler, capacity: Capacity) -> None:
        super().__init__(scheduler, capacity)
        self._prefill = scheduler

    def call(self, record: Record) -> _Different:
        if isinstance(record, Release):
            self._prefill.release(record.blocks)
            return None
        return super().call(record)


class _DecodeCalls(_Calls):
    def __init__(self, scheduler: DecodeScheduler, capacity: Capacity) -> None:
        super().__init__(scheduler, capacity)
        self._decode = scheduler
        self._reserved: dict[str, Sequence] = {}

    def call(self, record: Record) -> _Different:
        match record:
            case Reserve(_, _, refused):
                return _refusal(refused, lambda: self._reserve(record))
            case Arrived(now, request_id, token):
                self._decode.arrived(self._reserved[request_id], token, now)
            case Lost(now, request_id, token):
                self._decode.lost(self._reserved[request_id], token, now)
            case AbortSequence(request_id, index):
                self._decode.abort_sequence(request_id, index)
            case Quiet(request_id):
                self._decode.quiet(self._reserved[request_id])
            case _:
                return super().call(record)
        return None

    def _reserve(self, record: Reserve) -> None:
        sequence = self._decode.reserve(record.request.request(self._block_size), record.now)
        self._reserved[record.request.id] = sequence


def _refusal(recorded: bool, call: Callable[[], object]) -> _Different:
    """Make a call that may raise, and compare whether it did."""
    try:
        call()
    except (InvalidRequest, Overloaded, AlreadyExists) as error:
        return None if recorded else ("accepted", f"refused: {error}")
    return ("refused", "accepted") if recorded else None


def _result(record: Apply) -> StepResult:
    sampled = tuple(None if token is None else Sampled(token) for token in record.sampled)
    return StepResult(sampled, ((),) * len(sampled), record.seconds, record.swapped)


def _describe(found: Plan, plan: StepPlan | None) -> str:
    if plan is None:
        return "nothing to run"
    chunks = ", ".join(
        f"{'/'.join(map(str, c.sequence.id))}[{c.start}:{c.start + c.length}]" for c in plan.chunks
    )
    return f"{found} with {chunks}"
