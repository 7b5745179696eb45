"""Records what crosses a scheduler's boundary, for the simulator to replay.

The format, and what is left out of it, is scheduling/simulator/record.py.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar, cast

from baton.config import WorkerConfig
from baton.errors import BatonError, ConfigError
from baton.types import Request
from scheduling.cost import LinearCost
from scheduling.decode import DecodeScheduler
from scheduling.events import DecodeEvent, PrefillEvent
from scheduling.order import Policy
from scheduling.plan import Capacity, StepPlan, StepResult
from scheduling.prefill import PrefillScheduler
from scheduling.sequence import Sequence
from scheduling.simulator import record
from scheduling.simulator.block_numbers import BlockNumbers
from scheduling.simulator.record import GOES_ON, RequestRecord, RunHeader, token_of

Submitted = TypeVar("Submitted")
Submitted_co = TypeVar("Submitted_co", covariant=True)
Event = TypeVar("Event")


class RunRecorder:
    """Writes one run to one file, in the order of the calls. Ends with `close`."""

    def __init__(self, path: Path, header: RunHeader) -> None:
        """Overwrites the file. Raises OSError if that cannot be done."""
        self._numbers = (
            BlockNumbers(header.capacity.block_size)
            if header.settings.get("prefix_cache")
            else None
        )
        self._file = path.open("w")
        self._file.write(record.header_line(header) + "\n")

    def write(self, one: record.Record) -> None:
        """The next call."""
        self._file.write(record.record_line(one) + "\n")

    def applied(self, plan: StepPlan, result: StepResult, now: float) -> None:
        """The plan's result, which the scheduler does not know yet."""
        sampled = tuple(
            None if token is None else self.token(chunk.sequence, token.token_id)
            for chunk, token in zip(plan.chunks, result.sampled, strict=True)
        )
        self.write(record.Apply(now, result.seconds, sampled, result.swapped))

    def request(self, request: Request) -> RequestRecord:
        """What is kept of it."""
        return RequestRecord.of(request, self._numbers)

    def token(self, sequence: Sequence, token_id: int) -> int:
        """What is kept of its next token."""
        kind = token_of(sequence.request, sequence.generated + 1, token_id)
        if kind == GOES_ON and self._numbers is not None:
            return self._numbers.of_next(sequence, token_id) or kind
        return kind

    def close(self) -> None:
        """Write out the rest."""
        self._file.close()


class _Scheduler(Protocol[Submitted_co, Event]):
    """What both schedulers have."""

    def submit(self, request: Request, now: float) -> Submitted_co: ...

    def abort(self, request_id: str, now: float) -> bool: ...

    def plan(self, now: float) -> StepPlan | None: ...

    def apply(self, plan: StepPlan, result: StepResult, now: float) -> list[Event]: ...

    def fail(self, plan: StepPlan, now: float) -> list[Event]: ...


class _Recorded(Generic[Submitted, Event]):
    """Stands before a scheduler among the bases of a class, and records the calls to what both
    schedulers have. `_recorder` is there before the first call."""

    _recorder: RunRecorder
    _failing = False  # what `fail` calls itself is no call from outside

    @property
    def _plain(self) -> _Scheduler[Submitted, Event]:
        """The same object as the scheduler that comes after this class."""
        return cast("_Scheduler[Submitted, Event]", super())

    def submit(self, request: Request, now: float) -> Submitted:
        """As the scheduler's."""
        try:
            submitted = self._plain.submit(request, now)
        except BatonError:
            self._recorder.write(record.Submit(now, self._recorder.request(request), refused=True))
            raise
        self._recorder.write(record.Submit(now, self._recorder.request(request)))
        return submitted

    def abort(self, request_id: str, now: float) -> bool:
        """As the scheduler's."""
        if not self._failing:
            self._recorder.write(record.Abort(now, request_id))
        return self._plain.abort(request_id, now)

    def plan(self, now: float) -> StepPlan | None:
        """As the scheduler's."""
        plan = self._plain.plan(now)
        self._recorder.write(record.Plan.of(plan, now))
        return plan

    def apply(self, plan: StepPlan, result: StepResult, now: float) -> list[Event]:
        """As the scheduler's."""
        self._recorder.applied(plan, result, now)
        return self._plain.apply(plan, result, now)

    def fail(self, plan: StepPlan, now: float) -> list[Event]:
        """As the scheduler's."""
        self._recorder.write(record.Fail(now))
        self._failing = True
        try:
            return self._plain.fail(plan, now)
        finally:
            self._failing = False


class RecordedDecodeScheduler(_Recorded[list[Sequence], DecodeEvent], DecodeScheduler):
    """A DecodeScheduler that records every call."""

    def __init__(
        self, capacity: Capacity, policy: Policy, recorder: RunRecorder, **options: Any
    ) -> None:
        """`options` are those of DecodeScheduler."""
        super().__init__(capacity, policy, **options)
        self._recorder = recorder

    def reserve(self, request: Request, now: float) -> Sequence:
        """As DecodeScheduler."""
        try:
            sequence = super().reserve(request, now)
        except BatonError:
            self._recorder.write(record.Reserve(now, self._recorder.request(request), refused=True))
            raise
        self._recorder.write(record.Reserve(now, self._recorder.request(request)))
        return sequence

    def arrived(self, sequence: Sequence, first_token: int, now: float) -> list[DecodeEvent]:
        """As DecodeScheduler."""
        token = self._recorder.token(sequence, first_token)
        self._recorder.write(record.Arrived(now, sequence.request.id, token))
        return super().arrived(sequence, first_token, now)

    def lost(self, sequence: Sequence, first_token: int, now: float) -> list[DecodeEvent]:
        """As DecodeScheduler."""
        token = self._recorder.token(sequence, first_token)
        self._recorder.write(record.Lost(now, sequence.request.id, token))
        return super().lost(sequence, first_token, now)

    def abort_sequence(self, request_id: str, index: int) -> bool:
        """As DecodeScheduler."""
        self._recorder.write(record.AbortSequence(request_id, index))
        return super().abort_sequence(request_id, index)

    def quiet(self, sequence: Sequence) -> None:
        """As DecodeScheduler."""
        self._recorder.write(record.Quiet(sequence.request.id))
        super().quiet(sequence)


class RecordedPrefillScheduler(_Recorded[Sequence, PrefillEvent], PrefillScheduler):
    """A PrefillScheduler that records every call."""

    def __init__(
        self, capacity: Capacity, policy: Policy, recorder: RunRecorder, **options: Any
    ) -> None:
        """`options` are those of PrefillScheduler."""
        super().__init__(capacity, policy, **options)
        self._recorder = recorder

    def release(self, blocks: Items[int]) -> None:
        """As PrefillScheduler."""
        self._recorder.write(record.Release(tuple(blocks)))
        super().release(blocks)


def recorder_from(
    config: WorkerConfig, role: Literal["prefill", "decode"], capacity: Capacity, cost: LinearCost
) -> RunRecorder | None:
    """What a worker's configuration asks for; `cost` is the model that its CostTracker begins
    with. Raises ConfigError if the file cannot be written."""
    if config.record_run is None:
        return None
    settings = {name: getattr(config, name) for name in record.SETTINGS if hasattr(config, name)}
    try:
        return RunRecorder(config.record_run, RunHeader(role, capacity, settings, cost))
    except OSError as error:
        raise ConfigError(f"--record-run {config.record_run}: {error}") from error
