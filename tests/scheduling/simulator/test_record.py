"""Lines of a recorded run, there and back."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.types import LengthEstimate, PriorOutput, Request, Sampling, Stopping
from scheduling.cost import LinearCost
from scheduling.plan import Capacity, Chunk, StepPlan, Swap
from scheduling.sequence import Sequence
from scheduling.simulator import record
from scheduling.simulator.record import GOES_ON, STOPS, RequestRecord, RunHeader

REQUEST = Request(
    "gateway/1",
    (7, 8, 9),
    Sampling(n=2, temperature=1.0, seed=3),
    Stopping(
        max_tokens=6, min_tokens=2, stop_token_ids=frozenset({5}), eos_token_ids=frozenset({4})
    ),
    priority=1,
    level=2,
    arrived_at=0.1,
    deadline=9.5,
    prior_outputs=(PriorOutput((1, 2), finished=True), PriorOutput((3,))),
    estimate=LengthEstimate(10, 16),
)
HEADER = RunHeader("decode", Capacity(8, 4, 16, 4, 32, 6), {"policy": "fcfs"}, LinearCost(0.1))

floats = st.floats(allow_nan=False, allow_infinity=False)
requests = st.builds(
    RequestRecord,
    id=st.text(),
    prompt=st.integers(1, 99),
    max_tokens=st.integers(1, 99),
    n=st.integers(1, 4),
    priority=st.integers(-2, 2),
    level=st.integers(0, 4),
    arrived_at=floats,
    deadline=st.none() | floats,
    prior=st.lists(st.tuples(st.integers(0, 9), st.booleans())).map(tuple),
    estimate=st.none() | st.tuples(st.integers(), st.integers()),
)
numbers = st.lists(st.integers(0, 99)).map(tuple)
records = st.one_of(
    st.builds(record.Submit, floats, requests, st.booleans()),
    st.builds(record.Reserve, floats, requests, st.booleans()),
    st.builds(record.Arrived, floats, st.text(), st.sampled_from([GOES_ON, STOPS])),
    st.builds(record.Lost, floats, st.text(), st.sampled_from([GOES_ON, STOPS])),
    st.builds(record.Abort, floats, st.text()),
    st.builds(record.Quiet, st.text()),
    st.builds(record.Release, numbers),
    st.builds(record.Plan, floats, st.none() | st.text(), *[st.integers(0, 9)] * 4),
    st.builds(
        record.Apply,
        floats,
        floats,
        st.lists(st.none() | st.sampled_from([GOES_ON, STOPS])).map(tuple),
        numbers,
    ),
    st.builds(record.Fail, floats),
)


@given(records)
def test_a_record_survives_its_line(one: record.Record) -> None:
    line = record.record_line(one)
    assert "\n" not in line
    assert record.read_record(line) == one


def test_a_header_survives_its_line_and_comes_first() -> None:
    lines = [record.header_line(HEADER), record.record_line(record.Fail(1.5))]
    header, rest = record.read_run(lines)
    assert header == HEADER
    assert list(rest) == [record.Fail(1.5)]


@pytest.mark.parametrize("line", ["[]", '{"call":"fail","now":1.0}', "not JSON"])
def test_what_is_no_header_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match=r"recorded run|Expecting value"):
        record.read_header(line)


def test_a_request_comes_back_with_all_that_a_scheduler_sees_and_no_token() -> None:
    kept = RequestRecord.of(REQUEST)
    back = kept.request(4)
    assert RequestRecord.of(back) == kept
    assert set(back.prompt_ids) == {GOES_ON}
    before, after = Sequence.start(REQUEST, 1, 3.0), Sequence.start(back, 1, 3.0)
    assert (len(after.tokens), after.generated) == (len(before.tokens), before.generated)
    assert json.loads(record.record_line(record.Submit(0.0, kept)))["request"]["prompt"] == 3


@pytest.mark.parametrize(
    ("generated", "token", "kind"),
    [(2, 5, GOES_ON), (3, 5, STOPS), (3, 4, STOPS), (3, 6, GOES_ON), (6, 6, GOES_ON)],
)
def test_a_token_is_kept_as_what_it_means(generated: int, token: int, kind: int) -> None:
    assert record.token_of(REQUEST, generated, token) == kind
    # ... and means the same to a sequence, of the request itself and of its record.
    sequence = Sequence.start(REQUEST, 1, 0.0)
    replayed = Sequence.start(RequestRecord.of(REQUEST).request(4), 1, 0.0)
    for _ in range(generated - sequence.generated - 1):
        sequence.append(100)
        replayed.append(GOES_ON)
    ended, again = sequence.append(token), replayed.append(kind)
    assert (ended and ended.reason) == (again and again.reason)


def test_the_digest_is_of_chunks_blocks_and_swaps() -> None:
    sequence = Sequence.start(REQUEST, 1, 0.0)
    sequence.blocks = [2, 1]
    swap = Swap(3, sequence, (2, 1), (5, 6))
    plan = StepPlan((Chunk(sequence, 0, 2, sample=False),), swap_out=(swap,))
    others = [
        StepPlan((Chunk(sequence, 0, 3, sample=False),), swap_out=(swap,)),
        StepPlan(plan.chunks, swap_in=(swap,)),
        StepPlan(plan.chunks, swap_out=(replace(swap, host=(6, 5)),)),
        replace(plan, swaps_first=True),
        StepPlan(plan.chunks),
    ]
    digests = {record.plan_digest(other) for other in (plan, *others)}
    assert len(digests) == 6
    kept = record.Plan.of(plan, 1.0)
    assert (kept.digest, kept.chunks, kept.tokens) == (record.plan_digest(plan), 1, 2)
    sequence.blocks = [1, 2]
    assert record.plan_digest(plan) not in digests
    assert record.Plan.of(None, 1.0).digest is None
